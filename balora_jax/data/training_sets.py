"""What a run trains on: one set of rows, or several that are mixed."""

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

from balora_jax.data.conversations import unread_keys
from balora_jax.data.examples import (
    EncodingReport,
    Example,
    ShareOut,
    alone,
    describe_example,
    encode_rows,
    first_of_each_branch,
    renderer_for,
)
from balora_jax.data.sequences import BadRow
from balora_jax.data.sources import Rows, load_rows
from balora_jax.data.templates import ExampleSettings, unread_columns
from balora_jax.errors import InputError

_LOOKED_AT = 100
"""Rows whose columns are looked at for what is not read."""


class TrainingSet(NamedTuple):
    """Rows of one source and how they become examples.

    Attributes:
        source, split, limit: as :func:`load_rows` takes them.
        settings: of its examples.
        weight: share of the draws, relative to the other sets; None where nobody has one.
        rows: None until they are read.
    """

    source: str
    split: str
    limit: int | None
    settings: ExampleSettings
    weight: float | None
    rows: Rows | None = None


class TrainingData(NamedTuple):
    """Encoded examples of all sets, one after another.

    Attributes:
        examples: of all sets.
        report: counts of all sets.
        bad: set and row of what was left out, and why.
        weighted: examples and weight of each set; none where all are drawn alike.
        notes: lines about sets and columns.
        others: the first example of each other set or branch of a template: name, description.
    """

    examples: list[Example]
    report: EncodingReport
    bad: list[tuple[str, BadRow]]
    weighted: list[tuple[int, float]]
    notes: list[str]
    others: list[tuple[str, str]]


def load_sets(sets: Sequence[TrainingSet]) -> list[TrainingSet]:
    """Read the rows of all sets.

    Raises:
        InputError: one cannot be read, or some have a weight and others none.
    """
    if len({one.weight is None for one in sets}) > 1:
        raise InputError(
            "data.train: expected a weight for each set or for none, got some. Add the others."
        )
    return [
        one._replace(rows=load_rows(one.source, split=one.split, limit=one.limit)) for one in sets
    ]


def encode_sets(
    sets: Sequence[TrainingSet], tokenizer: Any, *, share_out: ShareOut = alone
) -> TrainingData:
    """Tokenise the rows of all sets; see :func:`encode_rows`.

    Raises:
        InputError: a row cannot be read, or a set gives no example; of several sets it is named.
    """
    several, found = len(sets) > 1, []
    for one in sets:
        try:
            found.append(encode_rows(one.rows, tokenizer, one.settings, share_out=share_out))
        except InputError as error:
            if not several:
                raise
            raise InputError(f"{one.source}: {error}") from error
    named = list(zip(sets, found, strict=True))
    notes = [f"set {one.source}: {encoded.report}" for one, encoded in named if several]
    others = [] if not several else [
        (f"of {one.source}", describe_example(encoded.examples[0], tokenizer))
        for one, encoded in named[1:]
    ]  # fmt: skip
    for one in sets:
        notes += _unread(one, tokenizer)
        others += _branches(one, tokenizer)
    return TrainingData(
        [example for encoded in found for example in encoded.examples],
        functools.reduce(operator.add, (encoded.report for encoded in found)),
        [(one.source, bad) for one, encoded in named for bad in encoded.bad],
        [(len(e.examples), one.weight) for one, e in named if one.weight is not None],
        notes,
        others,
    )


def _unread(one: TrainingSet, tokenizer: Any) -> list[str]:
    """Lines about columns, and keys of turns, that hold something and that no example gets."""
    assert one.rows is not None
    first = [one.rows[i] for i in range(min(len(one.rows), _LOOKED_AT))]
    found = {"columns": [name for row in first for name in unread_columns(row, one.settings)]}
    if one.settings.messages_column is not None:
        chat = renderer_for(tokenizer, one.settings)
        keys = [key for row in first for key in unread_keys(row, one.settings, chat)]
        found["keys of turns"] = keys
    return [
        f"note: {one.source}: {what} that are not used: {', '.join(dict.fromkeys(names))}."
        for what, names in found.items()
        if names
    ]


def _branches(one: TrainingSet, tokenizer: Any) -> list[tuple[str, str]]:
    """The first example of each branch of the template but that of the first row."""
    assert one.rows is not None
    described = []
    for name, index in list(first_of_each_branch(one.rows, one.settings).items())[1:]:
        try:
            example = encode_rows([one.rows[index]], tokenizer, one.settings).examples[0]
        except InputError:  # left out: bad, or too long
            continue
        described.append((name, describe_example(example, tokenizer)))
    return described
