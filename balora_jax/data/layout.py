"""Examples laid into rows, and the few shapes that the steps of a run have."""

import bisect
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from balora_jax.data.examples import Example
from balora_jax.numerics.few import few_sizes

Batch = dict[str, np.ndarray]
Rows = Sequence[Sequence[int]]
"""Rows of a micro-batch, each the examples that lie in it one after another."""

LENGTH_MULTIPLE = 8
# Steps whose lengths are looked at to choose the shapes of a run.
_FEWEST_STEPS, _MOST_STEPS, _MOST_EXAMPLES = 16, 128, 8192
_MOST_SHAPES = 6
_GAIN = 0.01
"""Share of the work of a run that one more shape must save, as each is compiled."""
_SPARE = 1.25
"""Rows of the shape for what the sample did not show, over those of the largest in it."""
_LENGTHS = 8
"""Row lengths that are tried between that of a padded row and twice it."""
_FAR = 4096
"""Tokens of a row whose attention takes as long as the rest of its work."""


class Shape(NamedTuple):
    """Rows and tokens of a row of a micro-batch."""

    rows: int
    length: int

    @property
    def places(self) -> int:
        """Tokens that are computed, with padding."""
        return self.rows * self.length

    @property
    def work(self) -> int:
        """Products of attention, in units of a head."""
        return self.rows * self.length**2

    @property
    def cost(self) -> float:
        """Work, in tokens of a short row: attention grows with the length."""
        return self.places * (1.0 + self.length / _FAR)


class Placed(NamedTuple):
    """The shape of a step, and the rows of each of its micro-batches, by place in it."""

    shape: Shape
    micro_batches: list[list[list[int]]]


class Epoch(NamedTuple):
    """What one pass over the examples is like.

    Attributes:
        batches: That it fills, the last perhaps not wholly.
        fill: Share of the places that hold a token.
        shapes: Of its micro-batches, the largest last.
    """

    batches: int
    fill: float
    shapes: tuple[Shape, ...]


def in_words(shapes: Sequence[Shape]) -> str:
    """Shapes for a person.

    >>> in_words([Shape(9, 512), Shape(11, 512), Shape(32, 512)])
    '9, 11 or 32 rows of 512'
    """
    found = []
    for length in dict.fromkeys(shape.length for shape in shapes):
        *rows, last = [str(shape.rows) for shape in shapes if shape.length == length]
        found.append(f"{', '.join(rows)}{' or ' if rows else ''}{last} rows of {length}")
    return ", or ".join(found)


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Places of ``lengths`` in rows of ``room`` tokens: longest first, each where least is left.

    Both the rows and what lies in one are in the order of the places.

    >>> best_fit([3, 6, 5, 2], 8)
    [[0, 2], [1, 3]]
    """
    rows: list[list[int]] = []
    left: list[tuple[int, int]] = []
    for place in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        need = lengths[place]
        at = bisect.bisect_left(left, (need, -1))
        free, row = left.pop(at) if at < len(left) else (room, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(place)
        bisect.insort(left, (free - need, row))
    return sorted(sorted(row) for row in rows)


def shapes_for(
    steps: Sequence[Rows], padded: Shape, *, row_multiple: int, length_multiple: int
) -> tuple[Shape, ...]:
    """Few shapes for the micro-batches of a run, the cheapest first and ``padded`` the last.

    None needs more tokens than ``padded``, nor more products of attention, rows x length².

    Args:
        steps: A sample: the lengths of the examples of each micro-batch of each step. All
            micro-batches of a step have one shape.
        padded: The shape with one example in a row, which holds whatever comes.
        row_multiple: Of the rows, which devices share.
        length_multiple: Of a row's tokens.
    """
    unit = math.lcm(LENGTH_MULTIPLE, length_multiple)
    tried = {padded.length * (_LENGTHS + i) // _LENGTHS for i in range(1, _LENGTHS + 1)}
    lengths = sorted({padded.length} | {-(-length // unit) * unit for length in tried})
    needs = {
        length: np.array([_rows_needed(step, length, row_multiple) for step in steps])
        for length in lengths
    }
    candidates = [
        Shape(rows, length)
        for length, need in needs.items()
        for rows in sorted(set(need.tolist()))
        if Shape(rows, length).work <= padded.work
    ]
    candidates = [shape for shape in candidates if shape != padded] + [padded]
    costs = np.array([shape.cost for shape in candidates])
    fits = np.stack([needs[shape.length] <= shape.rows for shape in candidates])
    fits[-1] = True
    found = few_sizes(costs, fits, most=_MOST_SHAPES, gain=_GAIN)
    chosen = {candidates[i] for i in found} | {padded}
    chosen |= _spare(chosen - {padded}, padded, row_multiple)
    return tuple(sorted(chosen, key=lambda shape: (shape.cost, shape)))


def drawn_steps(count: int, size: int, weighted: Sequence[tuple[int, float]] = ()) -> np.ndarray:
    """Numbers of the examples of some steps, as an epoch might take them; always the same.

    Args:
        count: Of all examples.
        size: Examples of a step.
        weighted: Count and weight of each set, as :class:`TextBatches` takes them.

    Returns:
        int [steps, size].
    """
    rng = np.random.default_rng(0)
    steps = max(_FEWEST_STEPS, min(_MOST_STEPS, _MOST_EXAMPLES // size))
    if weighted:
        chance = np.concatenate([np.full(held, weight / held) for held, weight in weighted])
        return rng.choice(count, (steps, size), p=chance / chance.sum())
    epochs = [rng.permutation(count) for _ in range(-(-steps * size // count))]
    return np.concatenate(epochs)[: steps * size].reshape(steps, size)


def _rows_needed(step: Rows, length: int, multiple: int) -> int:
    rows = max(len(best_fit(lengths, length)) for lengths in step)
    return -(-rows // multiple) * multiple


def _spare(chosen: set[Shape], padded: Shape, multiple: int) -> set[Shape]:
    """A shape for a step that is larger than those of the sample, if it is below ``padded``."""
    if not chosen:
        return set()
    largest = max(chosen, key=lambda shape: shape.places)
    rows = math.ceil(largest.rows * _SPARE / multiple) * multiple
    spare = Shape(rows, largest.length)
    return {spare} if spare.work <= padded.work else set()


def placed(lengths: Rows, shapes: Sequence[Shape]) -> Placed:
    """The first of ``shapes`` that holds every micro-batch of a step, and how they lie in it.

    Args:
        lengths: Of the examples of each micro-batch.
        shapes: As :func:`shapes_for` gives them.
    """
    tried: dict[int, list[list[list[int]]]] = {}
    for shape in shapes:
        length = shape.length
        if length not in tried:
            tried[length] = [best_fit(one, length) for one in lengths]
        if all(len(rows) <= shape.rows for rows in tried[length]):
            return Placed(shape, tried[length])
    raise ValueError("placed: expected a shape that holds every step, got none. Add one.")


def laid_out(
    examples: Sequence[Example], rows: Rows, shape: Shape, pad_id: int, *, numbered: bool
) -> Batch:
    """The arrays of a micro-batch, int32 [rows, length]; see :class:`TextBatches`.

    Args:
        examples: Of the run.
        rows: The examples of each row, by number; those that are missing stay empty.
        shape: Rows and length, enough for them.
        pad_id: The token for empty places.
        numbered: With ``example_ids``.

    >>> ids, mask = np.array([7, 8], np.int32), np.array([0, 1], np.int8)
    >>> made = laid_out([Example(ids, mask)], [[0, 0]], Shape(1, 5), 9, numbered=False)
    >>> made["input_ids"].tolist(), made["segment_ids"].tolist(), made["positions"].tolist()
    ([[7, 8, 7, 8, 9]], [[1, 1, 2, 2, 0]], [[0, 1, 0, 1, 0]])
    """
    names = ("loss_mask", "segment_ids", "positions")
    made: Batch = {"input_ids": np.full(shape, pad_id, np.int32)}
    made |= {name: np.zeros(shape, np.int32) for name in names}
    if numbered:
        made["example_ids"] = np.full(shape, -1, np.int32)
    for r, row in enumerate(rows):
        start = 0
        for segment, number in enumerate(row, start=1):
            example = examples[number]
            here = slice(start, start + len(example.input_ids))
            made["input_ids"][r, here] = example.input_ids
            made["loss_mask"][r, here] = example.loss_mask
            made["segment_ids"][r, here] = segment
            made["positions"][r, here] = np.arange(len(example.input_ids))
            if numbered:
                made["example_ids"][r, here] = number
            start = here.stop
    return made
