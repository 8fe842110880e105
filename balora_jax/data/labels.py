"""Batches of rows with labels, of few lengths, in an order that can be resumed exactly.

Rows are tokenised as the tokenizer itself does it for its model, so that ids, special tokens and
token types are those of `transformers`. Only the padding is ours: on the right, to few lengths.
"""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from balora_jax.data.batches import LOOKED_AT, Resumable
from balora_jax.data.glue import Label, LabelsTask, label_cell, label_of, texts_of
from balora_jax.data.layout import (
    LENGTH_MULTIPLE,
    Batch,
    Epoch,
    Shape,
    drawn_steps,
    in_words,
)
from balora_jax.data.sequences import BadRow
from balora_jax.data.templates import Row
from balora_jax.errors import InputError
from balora_jax.numerics.few import few_lengths
from balora_jax.progress import progress_bar

_CHUNK = 1000
_SHOW_PROGRESS_ABOVE = 2000
_MOST_LENGTHS = 4
_GAIN = 0.03
"""Share of the work of a run that one more length must save, as each is compiled."""
_NO_THREADS = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


@dataclasses.dataclass(frozen=True, eq=False)
class LabelsExample:
    """One row as the model sees it.

    Attributes:
        input_ids: int32 [T], special tokens included.
        token_type_ids: int32 [T], zero throughout if the tokenizer makes none.
        label: The class id as int, or the score as float32.
    """

    input_ids: np.ndarray
    token_type_ids: np.ndarray
    label: Label


@dataclasses.dataclass(frozen=True)
class LabelsReport:
    """Count of what became of the rows.

    Attributes:
        rows: Rows read.
        kept: Examples made.
        truncated: Those that lost the end of a text.
        bad: Rows left out because they cannot be read, by choice.
        tokens: Tokens of all examples.
    """

    rows: int
    kept: int
    truncated: int
    bad: int
    tokens: int

    def __str__(self) -> str:
        bad = f"{self.bad} cannot be read, " if self.bad else ""
        return (
            f"{self.kept} of {self.rows} rows kept ({bad}{self.truncated} truncated), "
            f"{self.tokens} tokens"
        )


class LabelsSet(NamedTuple):
    """The examples, in the order of their rows, what became of the rows, and those left out."""

    examples: list[LabelsExample]
    report: LabelsReport
    bad: list[BadRow]


def encode_labels(
    rows: Any, tokenizer: Any, task: LabelsTask, max_length: int, *, bad_rows: str = "stop"
) -> LabelsSet:
    """Tokenise rows of one text or two, and read their labels.

    Args:
        rows: A sized collection of rows (mappings from column to cell).
        tokenizer: A `transformers` tokenizer; a pair is cut from its longer text first.
        task: Columns and labels.
        max_length: Most tokens of an example, special tokens included.
        bad_rows: ``skip`` leaves out rows that cannot be read, ``stop`` refuses them.

    Returns:
        An example for each row, in their order, the report, and the rows that were left out.

    Raises:
        InputError: No rows, or none that can be read; a row without its text or its label, or a
            label outside the task; a `max_length` that leaves no room for text.
    """
    if len(rows) == 0:
        raise InputError("data: expected at least one row, got none. Add rows.")
    _check_max_length(tokenizer, task, max_length)
    examples: list[LabelsExample] = []
    bad: list[BadRow] = []
    left_out = bad if bad_rows == "skip" else None
    truncated = 0
    with progress_bar(
        total=len(rows), desc="tokenising", unit="row", disable=len(rows) <= _SHOW_PROGRESS_ABOVE
    ) as bar:
        numbered = enumerate(rows, start=1)
        while chunk := list(itertools.islice(numbered, _CHUNK)):
            read = _readable(chunk, task, left_out)
            if read:
                numbers, labels, texts = (list(column) for column in zip(*read, strict=True))
                made = _tokenise(texts, tokenizer, max_length)
                truncated += _count_truncated(texts, made["input_ids"], tokenizer, max_length)
                examples.extend(_examples(made, labels, numbers, left_out))
            bar.update(len(chunk))
    if not examples:
        raise InputError(
            f"data: expected rows that can be read, got none of {len(rows)}. The first says: "
            f"{bad[0].reason}"
        )
    tokens = sum(len(example.input_ids) for example in examples)
    report = LabelsReport(len(rows), len(examples), truncated, len(bad), tokens)
    return LabelsSet(examples, report, bad)


def _readable(
    chunk: Sequence[tuple[int, Row]], task: LabelsTask, bad: list[BadRow] | None
) -> list[tuple[int, Label, list[str]]]:
    """Number, label and texts of each row; one that cannot be read goes to ``bad``, if given."""
    found = []
    for number, row in chunk:
        try:
            label = _label(row, task, f"row {number}")
            found.append((number, label, texts_of(row, task, f"row {number}")))
        except InputError as error:
            if bad is None:
                raise
            bad.append(BadRow(number, str(error)))
    return found


def _check_max_length(tokenizer: Any, task: LabelsTask, max_length: int) -> None:
    texts = len(task.text_columns)
    special = tokenizer.num_special_tokens_to_add(pair=texts == 2)
    if max_length < special + texts:
        raise InputError(
            f"max_length: expected at least {special + texts} ({special} special tokens and one of "
            f"each text), got {max_length}. Raise it."
        )


def _label(row: Row, task: LabelsTask, where: str) -> Label:
    cell = label_cell(row, task, where)
    label = label_of(cell, task, where)
    if label is not None:
        return label
    got = "an empty cell" if cell is None or str(cell).strip() == "" else repr(cell)
    raise InputError(
        f"{where}: expected a label, got {got}. Label the row or leave it out; the labels of "
        "GLUE's test sets are not public (they read -1), so take a validation split instead."
    )


def _tokenise(texts: Sequence[list[str]], tokenizer: Any, max_length: int | None) -> Any:
    first, *second = (list(column) for column in zip(*texts, strict=True))
    # verbose=False: what is too long is counted here, against our own limit.
    limit = {} if max_length is None else {"truncation": "longest_first", "max_length": max_length}
    return tokenizer(first, *second, verbose=False, **limit)


def _count_truncated(
    texts: Sequence[list[str]], ids: Sequence[Sequence[int]], tokenizer: Any, max_length: int
) -> int:
    """How many texts did not fit: only those that fill the limit can be, so only they are asked."""
    full = [text for text, made in zip(texts, ids, strict=True) if len(made) >= max_length]
    if not full:
        return 0
    return sum(len(whole) > max_length for whole in _tokenise(full, tokenizer, None)["input_ids"])


def _examples(
    made: Any, labels: Sequence[Label], numbers: Sequence[int], bad: list[BadRow] | None
) -> Iterator[LabelsExample]:
    types = made.get("token_type_ids") or [[0] * len(ids) for ids in made["input_ids"]]
    for number, ids, kinds, label in zip(numbers, made["input_ids"], types, labels, strict=True):
        if not ids:
            reason = f"row {number}: expected at least one token, got none from the tokenizer. "
            if bad is None:
                raise InputError(reason + "Leave the row out.")
            bad.append(BadRow(number, reason + "Leave the row out."))
            continue
        yield LabelsExample(np.asarray(ids, np.int32), np.asarray(kinds, np.int32), label)


def describe_labels(example: LabelsExample, tokenizer: Any, task: LabelsTask) -> str:
    """One example as a line for a person to check, special tokens included.

    Args:
        example: The example.
        tokenizer: The tokenizer that made it.
        task: The task, for the name of the label.

    Returns:
        Tokens, label and the decoded text, whose line breaks are written as blanks.
    """
    if task.regression:
        said = f"score {example.label:g}"
    else:
        said = f"label {example.label} ({task.labels[int(example.label)]})"
    text = tokenizer.decode(example.input_ids.tolist(), skip_special_tokens=False)
    return f"{len(example.input_ids)} tokens, {said}: {' '.join(text.split())}"


class LabelsBatches(Resumable):
    """Batches without end, each a dict of arrays.

    ================  ==============  =======================  =====================================
    key               dtype           shape                    meaning
    ================  ==============  =======================  =====================================
    `input_ids`       int32           [accumulation, B, T]     tokens; `pad_id` where there is none
    `token_type_ids`  int32           [accumulation, B, T]     first or second text; 0 for padding
    `attention_mask`  int32           [accumulation, B, T]     1 where there is a token
    `labels`          int32, float32  [accumulation, B]        class ids; float32 for regression
    `row`             int32           [accumulation, B]        the example's place in the set
    ================  ==============  =======================  =====================================

    Every epoch takes each example once, in an order of its own; a batch may hold the end of one
    epoch and the start of the next. All rows of a step have one length, the least of a few that
    holds the longest of them. With several hosts, each builds the same iterator and places its own
    part of the batch.

    Attributes:
        shapes: rows and length of a micro-batch, each that a batch may have; the largest last.
    """

    def __init__(
        self,
        examples: Sequence[LabelsExample],
        *,
        batch_size: int,
        accumulation: int,
        length: int,
        seed: int,
        pad_id: int,
    ) -> None:
        """Set up the order; nothing is read yet.

        Args:
            examples: At least one, none longer than `length`.
            batch_size: Rows of a micro-batch (B).
            accumulation: Micro-batches of a step.
            length: Most tokens of a row (T), as `padded_length` gives it.
            seed: Of the order.
            pad_id: The token for empty places.

        Raises:
            InputError: A number below 1, no examples, or one too long.
        """
        for name, value in (("batch_size", batch_size), ("accumulation", accumulation)):
            if value < 1:
                raise InputError(f"{name}: expected at least 1, got {value}. Raise it.")
        _check(examples, length)
        self._rows, self._accumulation = batch_size * accumulation, accumulation
        self._identity = {
            "examples": _digest(examples),
            "batch_size": batch_size,
            "accumulation": accumulation,
            "length": length,
            "seed": seed,
        }
        self._examples, self._pad_id = examples, pad_id
        self._order = grain.MapDataset.range(len(examples)).seed(seed).shuffle()
        self._iterator = iter(
            self._order.repeat(None).to_iter_dataset(_NO_THREADS).batch(self._rows)
        )
        steps = drawn_steps(len(examples), self._rows)
        needs = self._longest(steps).tolist()
        lengths = few_lengths(
            needs, length, multiple=LENGTH_MULTIPLE, most=_MOST_LENGTHS, gain=_GAIN
        )
        self.shapes = tuple(Shape(batch_size, length) for length in lengths)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        taken = next(self._iterator)
        length = self._shape_of(taken).length
        rows = [_padded(self._examples[i], i, length, self._pad_id) for i in taken.tolist()]
        batch = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        return {
            key: value.reshape(self._accumulation, -1, *value.shape[1:])
            for key, value in batch.items()
        }

    def _longest(self, steps: np.ndarray) -> np.ndarray:
        """Tokens of the longest example of each step."""
        lengths = np.array([len(example.input_ids) for example in self._examples])
        return lengths[steps].max(axis=-1)

    def _shape_of(self, taken: np.ndarray) -> Shape:
        longest = max(len(self._examples[i].input_ids) for i in taken.tolist())
        return next(shape for shape in self.shapes if shape.length >= longest)

    @staticmethod
    def tokens(batch: Batch) -> int:
        """Places of a batch that hold a token."""
        return int(np.count_nonzero(batch["attention_mask"]))

    def describe(self) -> str:
        """The shapes of micro-batches, for a person."""
        return in_words(self.shapes) + " tokens"

    def epoch(self) -> Epoch:
        """What one epoch is like; of a long one what its beginning is like."""
        batches = self.batches_per_epoch()
        looked_at = min(batches, max(1, LOOKED_AT // self._rows)) * self._rows
        order = np.array(list(self._order.repeat(None)[:looked_at]))
        found = [self._shape_of(step) for step in order.reshape(-1, self._rows)]
        tokens = sum(len(self._examples[i].input_ids) for i in order.tolist())
        places = self._accumulation * sum(shape.places for shape in found)
        seen = tuple(shape for shape in self.shapes if shape in found)
        return Epoch(batches, tokens / places, seen)

    def batches_per_epoch(self) -> int:
        """Batches that one epoch fills, the last perhaps not wholly."""
        return math.ceil(len(self._examples) / self._rows)


def labels_epoch(
    examples: Sequence[LabelsExample], batch_size: int, length: int, pad_id: int
) -> Iterator[Batch]:
    """Each example once, in order, for evaluation: arrays [B, T] and [B].

    Args:
        examples: At least one, none longer than `length`.
        batch_size: Rows of a batch (B).
        length: Tokens of a row (T).
        pad_id: The token for empty places.

    Yields:
        The keys of `LabelsBatches`, without the axis of accumulation. The last batch is filled up
        with rows whose `row` is -1: one visible padding token, so that no attention is over
        nothing, and label 0.

    Raises:
        InputError: A batch size below 1, no examples, or one too long.
    """
    if batch_size < 1:
        raise InputError(f"batch_size: expected at least 1, got {batch_size}. Raise it.")
    _check(examples, length)
    zero = np.float32(0) if isinstance(examples[0].label, np.floating) else 0
    nothing = LabelsExample(np.full(1, pad_id, np.int32), np.zeros(1, np.int32), zero)
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        rows = [_padded(e, i, length, pad_id) for i, e in enumerate(part, start=start)]
        rows.extend([_padded(nothing, -1, length, pad_id)] * (batch_size - len(rows)))
        yield {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def padded_length(examples: Sequence[LabelsExample], max_length: int) -> int:
    """The length that holds every row: the longest example, rounded up to 8, at most `max_length`.

    >>> ids = np.zeros(13, np.int32)
    >>> padded_length([LabelsExample(ids, ids, 1)], max_length=128)
    16
    """
    longest = max(len(example.input_ids) for example in examples)
    return min(max_length, math.ceil(longest / LENGTH_MULTIPLE) * LENGTH_MULTIPLE)


def _padded(example: LabelsExample, index: int, length: int, pad_id: int) -> Batch:
    """The arrays of one row: [length] for those of tokens, and no axis for label and place."""
    used = len(example.input_ids)
    names = ("token_type_ids", "attention_mask")
    row: Batch = {name: np.zeros(length, np.int32) for name in names}
    row["input_ids"] = np.full(length, pad_id, np.int32)
    row["input_ids"][:used] = example.input_ids
    row["token_type_ids"][:used] = example.token_type_ids
    row["attention_mask"][:used] = 1
    dtype = np.float32 if isinstance(example.label, np.floating) else np.int32
    row["labels"] = np.asarray(example.label, dtype)
    row["row"] = np.asarray(index, np.int32)
    return row


def _check(examples: Sequence[LabelsExample], length: int) -> None:
    if not examples:
        raise InputError("data: expected at least one example, got none. Add rows.")
    longest = max(len(example.input_ids) for example in examples)
    if longest > length:
        raise InputError(
            f"data: expected examples of at most {length} tokens, got one of {longest}. "
            "Encode with a max_length of that size."
        )


def _digest(examples: Sequence[LabelsExample]) -> str:
    """A name for the examples and their order, to tell other data from the same on resume."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example.input_ids).to_bytes(8, "little"))
        digest.update(example.input_ids.astype("<i4").tobytes())
        digest.update(example.token_type_ids.astype("<i4").tobytes())
        digest.update(np.asarray(example.label, "<f8").tobytes())
    return digest.hexdigest()
