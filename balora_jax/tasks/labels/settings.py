"""The settings of a run on labels: those that it does not read, and those that it needs."""

from balora_jax.config import DataConfig
from balora_jax.errors import InputError

UNREAD = (
    "model.attention",  # an encoder's rows are short: one kernel
    "regularizers.top_k",  # the diversity of classes is a covariance
    "regularizers.mask_alignment",  # a row has one label, and no positions
    "regularizers.teacher_cache_folder",  # logits of rows are few
    "regularizers.teacher_fraction",  # and are computed once
    "data.template",
    "data.prompt_column",
    "data.response_column",
    "data.input_column",
    "data.messages_column",
    "data.tools_column",
    "data.assistant_turns",
    "data.conversation",
    "data.chat_template",
    "data.chat_template_kwargs",
    "data.today",
    "data.overlong",  # rows are always cut, as their tokenizer cuts a pair
    "data.packing",
    "training.head",  # C classes fit in memory at once
    "training.head_chunk",
    "training.head_memory_mib",
    "mesh.sequence",
    "eval.grader",
    "eval.marker",
    "eval.max_new_tokens",
    "eval.temperature",
    "eval.top_p",
    "eval.prompt_column",
    "eval.gold_column",
    "eval.samples",
    "eval.prompts",
)

NO_REQUEST = {"data.packing": "none"}
"""Values of unread keys that ask for nothing, beside their defaults."""

SAID_BY_GLUE = ("text_columns", "label_column", "labels", "regression")
"""Of ``data``: what a GLUE task brings along."""


def check(data: DataConfig) -> None:
    """Raises InputError where rows or their columns are missing, or said twice."""
    if not isinstance(data.train, str | None):
        raise InputError(
            "data.train: expected one file with task labels, got a list. Put the rows in one file."
        )
    if data.glue is None and (data.train is None or not data.text_columns):
        raise InputError(
            "data: expected data.glue, or data.train with data.text_columns, for task labels, got "
            "neither. Name a GLUE task, or the file and its columns."
        )
    if data.glue is not None:
        _check_said_once(data)


def _check_said_once(data: DataConfig) -> None:
    for name in SAID_BY_GLUE:
        if getattr(data, name) != DataConfig.model_fields[name].default:
            raise InputError(
                f"data.{name}: expected none with data.glue, got one: {data.glue} has its own. "
                "Leave one of them out."
            )
