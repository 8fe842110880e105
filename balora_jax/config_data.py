"""The section ``data`` of the run's schema."""

import datetime
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from balora_jax.config_types import Positive, Section
from balora_jax.untyped.shown import shown


class TrainSet(Section):
    """One of several training sets; what is not given is as in ``data``.

    Attributes:
        path: a file or a hub data set, as ``data.train``.
        weight: share of the examples that are drawn, relative to the other sets; all have one or
            none, and without them each example is drawn once in an epoch.
        split, limit: as ``data.split`` and ``data.train_limit``.
        template, prompt_column, response_column, input_column, messages_column: as in ``data``.
    """

    path: str
    weight: Annotated[float, Field(gt=0)] | None = None
    split: str | None = None
    limit: Positive | None = None
    template: str | None = None
    prompt_column: str | None = None
    response_column: str | None = None
    input_column: str | None = None
    messages_column: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


ONE_FILE, SEVERAL = "train as one file", "train as a list"
Train = Annotated[
    Annotated[str, Tag(ONE_FILE)]
    | Annotated[tuple[TrainSet, ...], Field(min_length=1), Tag(SEVERAL)],
    Discriminator(lambda value: ONE_FILE if isinstance(value, str) else SEVERAL),
]
"""A file, or a list of files and sets; an error of one names no branch of the other."""


def no_number(value: Any) -> Any:
    """A day is written as one: a number would be read as seconds since 1970."""
    if not isinstance(value, str | datetime.date | None):
        raise ValueError(f"expected a day such as 2026-01-31, got {shown(value)}. Write it so.")
    return value


def packing_name(value: Any) -> Any:
    """A packing by its name, from what older configs and checkpoints say: true or false."""
    return {True: "rows", False: "none"}[value] if isinstance(value, bool) else value


Packing = Annotated[Literal["batch", "rows", "none"], BeforeValidator(packing_name)]


Day = Annotated[datetime.date, BeforeValidator(no_number)]


class DataConfig(Section):
    """Rows, and how each becomes tokens.

    Attributes:
        train, validation: a JSON, CSV, TSV, parquet or Arrow file, a folder that ``datasets``
            saved, or a hub data-set name. With ``glue`` the hub's splits where not given, and
            ``{glue}`` in a path is the task. ``train`` may be a list of these, or of sets with
            the keys ``path``, ``weight``, ``split``, ``limit``, ``template``,
            ``prompt_column``, ``response_column``, ``input_column``, ``messages_column``.
        glue: name of a GLUE task (``task: labels``): columns, labels and metrics follow from it.
        text_columns, label_column, labels, regression: the same for your own data: one text
            or two, names of the classes in the order of their ids, or a score instead.
        split, validation_split: of hub data sets.
        train_limit, validation_limit: use the first rows only.
        template: ``alpaca`` (with or without an input, by the row), ``plain`` (the prompt column as
            it stands), ``text`` (no prompt: all of the response column is learnt), ``chat`` (the
            tokenizer's), or a text with ``{column}`` places, or the path of a file with one.
        prompt_column, response_column: columns of a row; with ``chat`` texts or lists of turns.
        input_column: column of Alpaca's input, which rows need not have.
        messages_column: column with chat messages instead (``template: chat``).
        tools_column: column of the functions that a conversation may call.
        assistant_turns: ``all`` turns of the assistant are learnt, or the ``last``.
        conversation: ``whole``: one example; ``turns``: one for each learnt turn, as it is when the
            conversation ends there; ``auto``: whole where the chat template allows it.
        chat_template: file of a Jinja template instead of the tokenizer's.
        chat_template_kwargs: variables that it is given, such as ``enable_thinking``.
        today: day that a chat template is told which asks for it, as ``2026-01-31``; that of the
            run's first start where not given.
        max_length: tokens of an example, and of a row with ``packing: rows``.
        overlong: what happens to longer rows: ``truncate``, ``drop``, or ``split`` into several
            (``template: text``); all are counted.
        bad_rows: ``stop`` at a row that cannot be read, or ``skip``: count it, and list it in
            ``skipped_rows.jsonl``.
        packing: several examples in one row, each attending to itself only: ``batch``, those of a
            micro-batch, which are the same as without packing, in as few rows as fit; ``rows``, as
            many as fit in each of ``batch_size`` rows, so that a step takes more examples; or
            ``none``. ``true`` and ``false`` are read as ``rows`` and ``none``.
    """

    train: Train | None = None
    validation: str | None = None
    glue: str | None = None
    text_columns: tuple[str, ...] = ()
    label_column: str = "label"
    labels: tuple[str, ...] = ()
    regression: bool = False
    split: str = "train"
    validation_split: str = "validation"
    train_limit: Positive | None = None
    validation_limit: Positive | None = None
    template: str = "alpaca"
    prompt_column: str = "instruction"
    response_column: str = "output"
    input_column: str = "input"
    messages_column: str | None = None
    tools_column: str = "tools"
    assistant_turns: Literal["all", "last"] = "all"
    conversation: Literal["auto", "whole", "turns"] = "auto"
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = {}
    today: Day | None = None
    max_length: Positive = 512
    overlong: Literal["truncate", "drop", "split"] = "truncate"
    bad_rows: Literal["stop", "skip"] = "stop"
    packing: Packing = "batch"
