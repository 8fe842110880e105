"""The settings of a run on text: those that it does not read, and those that it needs."""

from balora_jax.config import DataConfig
from balora_jax.errors import InputError

UNREAD = (
    "regularizers.teacher_head",  # the teacher is the plain model, with the head it has
    "data.glue",
    "data.text_columns",
    "data.label_column",
    "data.labels",
    "data.regression",
)


def check(data: DataConfig) -> None:
    """Raises InputError where there is nothing to train on."""
    if data.train is None:
        raise InputError("data.train: expected a value, got none. Add the key.")
