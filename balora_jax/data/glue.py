"""Rows with a label: GLUE's tasks and your own, their texts and their label.

The order of the label names is the official one, so that ids agree with the hub's data sets and
with the published checkpoints: an entailment is class 0 in MNLI, QNLI and RTE, but 1 in WNLI.
"""

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from balora_jax.data.templates import Row, cell_text
from balora_jax.errors import InputError
from balora_jax.untyped.shown import shown

Label = int | np.float32

_NAMES_IN_A_MESSAGE = 6
_LARGEST_SCORE = float(np.finfo(np.float32).max)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,9})?", re.ASCII)


@dataclasses.dataclass(frozen=True)
class LabelsTask:
    """A task of classification, or of regression where there are no label names.

    Attributes:
        name: What messages and metrics call it.
        text_columns: The column of the text, or the two of a pair.
        label_columns: The column of the label and, if files differ, its other names; the first
            that a row has is read.
        labels: The names of the classes in the order of their ids; empty for regression.
        metrics: Names that `evals.classification.score_labels` knows, the main one first.
        hub: The hub data set as `load_rows` takes it; None for your own files.
        train_split: The hub's split to train on.
        validation_splits: Title of a validation set -> the hub's split.
        score_range: Least and greatest score of a regression; None if any number will do.
    """

    name: str
    text_columns: tuple[str, ...]
    label_columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    hub: str | None = None
    train_split: str = "train"
    validation_splits: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {"validation": "validation"}, hash=False
    )
    score_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if len(self.text_columns) not in (1, 2):
            raise InputError(
                f"text_columns: expected one column or two, got {len(self.text_columns)}. "
                "Name the column of the text, or the two of a pair."
            )
        shown = [column for column in self.text_columns if column in self.label_columns]
        if shown:
            raise InputError(
                f"text_columns: expected columns of the input, got the label column {shown[0]!r}, "
                "which would show the answer. Take it out."
            )
        names = {name.strip() for name in self.labels}
        if self.labels and (len(self.labels) < 2 or len(names) < len(self.labels) or "" in names):
            raise InputError(
                f"labels: expected at least two different names, got {list(self.labels)}. "
                "Name each class once."
            )

    @property
    def regression(self) -> bool:
        """Whether the label is a score rather than a class."""
        return not self.labels

    @property
    def outputs(self) -> int:
        """Logits that a head for this task has: one a class, or one score."""
        return len(self.labels) or 1


def _glue(
    name: str,
    text_columns: tuple[str, ...],
    labels: tuple[str, ...],
    *metrics: str,
    **others: Any,
) -> LabelsTask:
    options = {"label_columns": ("label",), "hub": f"nyu-mll/glue:{name}"} | others
    return LabelsTask(name, text_columns, labels=labels, metrics=metrics, **options)


_PAIR = ("sentence1", "sentence2")
_DUPLICATE = ("not_duplicate", "duplicate")
_ENTAILMENT = ("entailment", "not_entailment")

GLUE: dict[str, LabelsTask] = {
    task.name: task
    for task in (
        _glue("cola", ("sentence",), ("unacceptable", "acceptable"), "matthews"),
        _glue("sst2", ("sentence",), ("negative", "positive"), "accuracy"),
        _glue("mrpc", _PAIR, ("not_equivalent", "equivalent"), "accuracy", "f1"),
        _glue(
            "stsb",
            _PAIR,
            (),
            "pearson",
            "spearman",
            label_columns=("label", "score"),
            score_range=(0.0, 5.0),
        ),
        _glue("qqp", ("question1", "question2"), _DUPLICATE, "accuracy", "f1"),
        _glue(
            "mnli",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            "accuracy",
            validation_splits={
                "validation_matched": "validation_matched",
                "validation_mismatched": "validation_mismatched",
            },
        ),
        _glue("qnli", ("question", "sentence"), _ENTAILMENT, "accuracy"),
        _glue("rte", _PAIR, _ENTAILMENT, "accuracy"),
        _glue("wnli", _PAIR, ("not_entailment", "entailment"), "accuracy"),
    )
}
"""The nine tasks by their hub names. **Source:** Wang et al., GLUE, and the hub's `nyu-mll/glue`
for columns, splits and the order of the labels."""


def glue_task(name: str) -> LabelsTask:
    """The GLUE task of that name.

    Raises:
        InputError: There is none.

    >>> glue_task("rte").labels
    ('entailment', 'not_entailment')
    """
    if name not in GLUE:
        raise InputError(
            f"data.glue: expected one of {', '.join(GLUE)}, got {name!r}."
            f"{did_you_mean(name, GLUE)} Choose one of these."
        )
    return GLUE[name]


def custom_task(
    text_columns: str | Sequence[str],
    label_column: str,
    labels: Sequence[str] = (),
    *,
    regression: bool = False,
) -> LabelsTask:
    """A task for your own files.

    Args:
        text_columns: The column of the text, or the two of a pair.
        label_column: The column of the label.
        labels: The names of the classes in the order of their ids; none for regression.
        regression: Whether the label is a number to predict.

    Returns:
        A task without a hub data set. Its metrics are Pearson's and Spearman's correlation,
        accuracy and F1 of class 1 for two classes, or accuracy for more.

    Raises:
        InputError: Both or neither of `labels` and `regression` are given, a name occurs twice,
            or the columns are not one or two, or the label's own.

    >>> custom_task("review", "stars", ["bad", "fair", "good"]).metrics
    ('accuracy',)
    """
    if regression and labels:
        raise InputError(
            f"labels: expected none for regression, got {', '.join(labels)}. "
            "Leave them out or set regression to false."
        )
    if not regression and not labels:
        raise InputError(
            "labels: expected the names of the classes, got none. "
            "Name them in the order of their ids, or set regression to true."
        )
    columns = (text_columns,) if isinstance(text_columns, str) else tuple(text_columns)
    if regression:
        metrics = ("pearson", "spearman")
    else:
        metrics = ("accuracy", "f1") if len(labels) == 2 else ("accuracy",)
    return LabelsTask("custom", columns, (label_column,), tuple(labels), metrics)


def texts_of(row: Row, task: LabelsTask, where: str) -> list[str]:
    """The one or two texts of a row. One of a pair may be empty (a few of QQP's are), not both.

    Raises:
        InputError: A column is missing or holds no text, or all texts are blank.

    >>> texts_of({"sentence1": "a", "sentence2": "b", "label": 1}, GLUE["mrpc"], "row 1")
    ['a', 'b']
    """
    texts = []
    for column in task.text_columns:
        cell = row.get(column)
        texts.append(cell if isinstance(cell, str) else cell_text(row, column, where))
    if not any(text.strip() for text in texts):
        raise InputError(
            f"{where}: expected text in {' or '.join(map(repr, task.text_columns))}, got an empty "
            "cell. Fill the cell or leave the row out."
        )
    return texts


def label_cell(row: Row, task: LabelsTask, where: str) -> Any:
    """The cell of the label, as it stands in the row.

    Raises:
        InputError: The row has no column for it.
    """
    for column in task.label_columns:
        if column in row:
            return row[column]
    raise InputError(
        f"{where}: expected a column {' or '.join(map(repr, task.label_columns))} with the label, "
        f"got the columns {', '.join(row)}.{did_you_mean(task.label_columns[0], row)} "
        "Name the column of your data."
    )


def label_of(cell: Any, task: LabelsTask, where: str) -> Label | None:
    """The label that a cell spells: a class id, a score, or None if it says that there is none.

    A class may be given by its name or its id, the id as a number or as text. Where a name is a
    number itself (stars from "1" to "5"), a number is always a name, by its value: 1, 1.0, "1" and
    "1.0" are the same star. ``true`` and ``false`` of JSON and parquet are the names that spell so,
    in whatever case. No label is an empty cell, NaN, or the -1 of GLUE's test sets (unless -1 is a
    name or a possible score).

    Args:
        cell: The content of the label's column.
        task: The task.
        where: What to call the row in an error, such as ``row 3``.

    Raises:
        InputError: The cell spells no label of the task.

    >>> [label_of(cell, GLUE["rte"], "row 1") for cell in ("not_entailment", 1, "0", -1)]
    [1, 1, 0, None]
    """
    if cell is None or (isinstance(cell, float) and math.isnan(cell)) or str(cell).strip() == "":
        return None
    return _score(cell, task, where) if task.regression else _class_id(cell, task, where)


def _score(cell: Any, task: LabelsTask, where: str) -> np.float32 | None:
    number = _number(cell)
    low, high = task.score_range or (-_LARGEST_SCORE, _LARGEST_SCORE)
    if number is not None and low <= number <= high:
        return np.float32(float(number))
    if number == -1:
        return None
    wanted = f"a score from {low:g} to {high:g}" if task.score_range else "a number"
    if number is not None and not task.score_range:
        wanted = f"a number from {low:g} to {high:g}, as 32 bits hold,"
    raise InputError(f"{where}: expected {wanted} as label, got {shown(cell)}. Fix the row.")


def _class_id(cell: Any, task: LabelsTask, where: str) -> int | None:
    names, values = _names(task.labels)
    number = _number(cell)
    for found in _places_of(cell, names), _places(number, values):
        if len(found) == 1:
            return found[0]
    if number == -1:
        return None
    ids_count = values.count(None) == len(values)
    if ids_count and (found := _places(number, range(len(names)))):
        return found[0]
    listed = ", ".join(names[:_NAMES_IN_A_MESSAGE]) + (
        ", …" if len(names) > _NAMES_IN_A_MESSAGE else ""
    )
    ids = f" or an id from 0 to {len(names) - 1}" if ids_count else ""
    raise InputError(
        f"{where}: expected a label of {task.name} ({listed}){ids}, got {shown(cell)}."
        f"{did_you_mean(cell[:100], names) if isinstance(cell, str) else ''} Fix the row or the "
        "list of labels."
    )


@functools.cache
def _names(labels: tuple[str, ...]) -> tuple[list[str], list[Decimal | None]]:
    """The names of the classes, and the numbers that they spell."""
    names = [name.strip() for name in labels]
    return names, [_number(name) for name in names]


def _places_of(cell: Any, names: Sequence[str]) -> list[int]:
    """Where the names stand that a cell spells."""
    if isinstance(cell, bool | np.bool_):
        return _places(str(cell).lower(), [name.lower() for name in names])
    return _places(cell.strip(), names) if isinstance(cell, str) else []


def _places(value: Any, values: Iterable[Any]) -> list[int]:
    return [i for i, one in enumerate(values) if value is not None and one == value]


def _number(cell: Any) -> Decimal | None:
    """The finite number that a cell holds or spells, exactly; a truth value is none.

    >>> _number(" 3.50 "), _number("positive"), _number(True), _number("nan"), _number("1_000")
    (Decimal('3.50'), None, None, None, None)
    """
    if isinstance(cell, np.number):
        cell = cell.item()
    if isinstance(cell, str):
        text = cell.strip()
        return Decimal(text) if _NUMBER.fullmatch(text) else None
    if isinstance(cell, bool) or not isinstance(cell, int | float) or not _is_finite(cell):
        return None
    return Decimal(cell)


def _is_finite(number: float) -> bool:
    return isinstance(number, int) or math.isfinite(number)


def did_you_mean(text: str, choices: Iterable[str]) -> str:
    """A hint at the nearest of the choices, with a space before it, or nothing.

    >>> did_you_mean("SST-2", GLUE)
    " Did you mean 'sst2'?"
    """
    near = difflib.get_close_matches(text.lower(), list(choices), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
