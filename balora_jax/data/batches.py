"""Batches of few shapes from examples, in an order that can be resumed exactly.

The order, the packing over a whole epoch and the position are grain's: a shuffle that is a function
of the seed and the epoch, repeated for ever, and a state of a few integers.
"""

import functools
import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import grain
import grain.experimental
import numpy as np

from balora_jax.data.examples import Example
from balora_jax.data.layout import (
    LENGTH_MULTIPLE,
    Batch,
    Epoch,
    Shape,
    drawn_steps,
    in_words,
    laid_out,
    placed,
    shapes_for,
)
from balora_jax.errors import InputError

Mode = Literal["padding", "batch", "packing"]

# Rows that grain's packer fills side by side. On GSM8K at 1024 tokens 64 fill 93 % of the places,
# 1 fills 80 %, and 128 only 0.5 % more.
_MOST_BINS = 64
LOOKED_AT = 2048
"""Examples that are laid out to tell how full an epoch is."""
_NO_THREADS = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


class Resumable:
    """An iterator of batches whose position is a few plain values.

    A subclass has `_iterator`, grain's, and `_identity`: what must be the same for a saved
    position to mean the same batches.
    """

    _iterator: Any
    _identity: Any

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch given out, as plain JSON values."""
        return {**self._identity, "position": self._iterator.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a saved position: the next batches are bit for bit those that came after it.

        Args:
            state: What `get_state` of an iterator over the same examples gave.

        Raises:
            InputError: The state belongs to other examples or another setting, or is none at all.
        """
        for key in dict.fromkeys((*self._identity, *state)):
            mine = self._identity.get(key)
            if key != "position" and state.get(key) != mine:
                raise InputError(
                    f"data position: expected {key} = {mine}, got {state.get(key)} in the "
                    "checkpoint. Resume with the data and the settings of the first run."
                )
        position = state.get("position")
        if not _same_kind(self._iterator.get_state(), position):
            raise InputError(
                "data position: expected the place of an iterator in the checkpoint, got something "
                "else. Go on from another checkpoint, or use a new --workdir."
            )
        self._iterator.set_state(position)


def _same_kind(known: Any, found: Any) -> bool:
    """Whether a saved position has the keys and types of one; numbers count from 0, in 64 bits."""
    if isinstance(known, dict):
        return (
            isinstance(found, dict)
            and found.keys() == known.keys()
            and all(_same_kind(value, found[key]) for key, value in known.items())
        )
    return type(known) is type(found) and not (isinstance(found, int) and not 0 <= found < 2**62)


class TextBatches(Resumable):
    """Batches without end, each a dict of arrays [accumulation, rows, length].

    ===============  =======  ====================================================================
    key              dtype    meaning
    ===============  =======  ====================================================================
    `input_ids`      int32    tokens; `pad_id` where there is none
    `loss_mask`      int32    1 where the token is a target, 0 at each segment's first token
    `segment_ids`    int32    1, 2, … for the examples in a row, 0 for padding
    `positions`      int32    from 0 in each segment, 0 for padding
    `example_ids`    int32    number of the example, -1 for padding; where `numbered`
    ===============  =======  ====================================================================

    Every epoch takes each example once, in an order of its own; a batch may hold the end of one
    epoch and the start of the next, and a packed row too. With several hosts, each builds the same
    iterator and places its own part of the batch.

    Attributes:
        shapes: rows and length of a micro-batch, each that a batch may have; the largest last.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        accumulation: int,
        length: int,
        mode: Mode,
        seed: int,
        pad_id: int,
        weighted: Sequence[tuple[int, float]] = (),
        row_multiple: int = 1,
        length_multiple: int = 1,
        numbered: bool,
    ) -> None:
        """Set up the order; nothing is read yet.

        Args:
            examples: At least one, none longer than `length`.
            weighted: How many of the examples, in order, are of each set, and the weight of the
                set; none where every example is drawn once in an epoch. With weights an epoch has
                as many examples as there are, drawn from the sets by weight; each set goes through
                its own in an order of its own, again and again.
            batch_size: Rows of a micro-batch; examples of one with ``batch``.
            accumulation: Micro-batches of a step.
            length: Tokens of a row, as `common_length` gives it.
            mode: ``padding`` (one example in a row), ``batch`` (the examples of a micro-batch that
                ``padding`` takes, in as few rows as fit), or ``packing`` (as many examples in each
                row as fit, first fit: more in a step).
            seed: Of the order.
            pad_id: The token for empty places; any in the vocabulary does, as no loss sees it.
            row_multiple: Of the rows with ``batch``, which devices share; `batch_size` is one.
            length_multiple: The same of `length`.
            numbered: With `example_ids`, the place of each token's example in `examples`.

        Raises:
            InputError: A number below 1, no examples, one too long, or an unknown mode.
        """
        for name, value in (("batch_size", batch_size), ("accumulation", accumulation)):
            if value < 1:
                raise InputError(f"{name}: expected at least 1, got {value}. Raise it.")
        if mode not in get_args(Mode):
            raise InputError(
                f"mode: expected one of {', '.join(get_args(Mode))}, got {mode!r}. Choose one."
            )
        _check_lengths(examples, length)
        self._examples, self._accumulation = examples, accumulation
        self._count = batch_size * accumulation
        self._mode, self._pad_id, self._numbered = mode, pad_id, numbered
        self._settings = {
            "batch_size": batch_size,
            "accumulation": accumulation,
            "length": length,
            "mode": mode,
            "seed": seed,
        }
        if weighted:
            self._settings["weighted"] = [list(part) for part in weighted]
        self._epoch = _mixed(len(examples), weighted, seed)
        padded = Shape(batch_size, length)
        self.shapes: tuple[Shape, ...] = (padded,)
        if mode == "batch":
            sample = self._sample(weighted)
            self.shapes = shapes_for(
                sample, padded, row_multiple=row_multiple, length_multiple=length_multiple
            )
        # More bins than one epoch fills would put an example beside itself.
        tokens = sum(len(example.input_ids) for example in examples)
        self._bins = min(_MOST_BINS, max(1, tokens // length))
        forever = self._taken(self._epoch if weighted else self._epoch.repeat(None))
        self._iterator = iter(forever.batch(self._count))

    @functools.cached_property
    def _identity(self) -> dict[str, Any]:
        """With a digest of all examples, which takes its time."""
        return {"examples": _digest(self._examples), **self._settings}

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self._built(next(self._iterator))

    def _built(self, taken: Any) -> Batch:
        """A batch of what the iterator gives: rows of grain's, or numbers of examples."""
        if self._mode == "packing":
            shape = (self._accumulation, *self.shapes[0])
            return {key: value.reshape(shape) for key, value in taken.items()}
        shape, rows = self._rows_of(taken)
        parts = [
            laid_out(self._examples, one, shape, self._pad_id, numbered=self._numbered)
            for one in rows
        ]
        return {key: np.stack([part[key] for part in parts]) for key in parts[0]}

    def _rows_of(self, taken: np.ndarray) -> tuple[Shape, list[list[list[int]]]]:
        """The shape of a step and the rows of its micro-batches, by number of the example."""
        numbers = taken.reshape(self._accumulation, -1).tolist()
        if self._mode == "padding":
            return self.shapes[0], [[[number] for number in one] for one in numbers]
        lengths = [[len(self._examples[number].input_ids) for number in one] for one in numbers]
        shape, found = placed(lengths, self.shapes)
        rows = [
            [[one[place] for place in row] for row in lying]
            for one, lying in zip(numbers, found, strict=True)
        ]
        return shape, rows

    @staticmethod
    def tokens(batch: Batch) -> int:
        """Places of a batch that hold a token."""
        return int(np.count_nonzero(batch["segment_ids"]))

    def describe(self) -> str:
        """The shapes of micro-batches, for a person."""
        if self._mode != "batch":
            return f"rows of {self.shapes[-1].length} tokens"
        examples = self._count // self._accumulation
        return f"{examples} examples in {in_words(self.shapes)} tokens"

    def epoch(self) -> Epoch:
        """What one epoch is like; of a long one with ``batch``, what its beginning is like."""
        batches, padded = self.batches_per_epoch(), self.shapes[-1]
        if self._mode != "batch":
            tokens = sum(len(example.input_ids) for example in self._examples)
            places = batches * self._accumulation * padded.places
            return Epoch(batches, tokens / places, self.shapes)
        looked_at = min(batches, max(1, LOOKED_AT // self._count)) * self._count
        order = list(self._epoch.repeat(None)[:looked_at])
        steps = np.array(order).reshape(-1, self._count)
        found = [self._rows_of(step)[0] for step in steps]
        tokens = sum(len(self._examples[number].input_ids) for number in order)
        places = self._accumulation * sum(shape.places for shape in found)
        seen = tuple(shape for shape in self.shapes if shape in found)
        return Epoch(batches, tokens / places, seen)

    def batches_per_epoch(self) -> int:
        """Batches that one epoch fills, the last perhaps not wholly; packing is tried to count."""
        taken = len(self._examples)
        if self._mode == "packing":
            taken = sum(1 for _ in self._taken(self._epoch[:taken]))
        return math.ceil(taken / self._count)

    def _taken(self, order: grain.MapDataset) -> grain.IterDataset:
        """What a batch is made of: numbers of examples, or packed rows."""
        if self._mode != "packing":
            return order.to_iter_dataset(_NO_THREADS)
        names = ("input_ids", "loss_mask", *(("example_ids",) if self._numbered else ()))
        empty = {"input_ids": self._pad_id, "loss_mask": 0, "example_ids": -1}
        packed = grain.experimental.FirstFitPackIterDataset(
            order.map(self._features).to_iter_dataset(_NO_THREADS),
            length_struct=dict.fromkeys(names, self.shapes[0].length),
            padding_struct={name: empty[name] for name in names},
            num_packing_bins=self._bins,
        )
        return packed.map(_named)

    def _features(self, number: int) -> Batch:
        """An example for grain's packer."""
        example = self._examples[number]
        found = {"input_ids": example.input_ids, "loss_mask": example.loss_mask.astype(np.int32)}
        if self._numbered:
            found["example_ids"] = np.full(len(example.input_ids), number, np.int32)
        return found

    def _sample(self, weighted: Sequence[tuple[int, float]]) -> list[list[list[int]]]:
        """Lengths of the examples of some steps, drawn as an epoch draws them."""
        lengths = np.array([len(example.input_ids) for example in self._examples])
        steps = drawn_steps(len(lengths), self._count, weighted)
        return lengths[steps].reshape(len(steps), self._accumulation, -1).tolist()


def _mixed(count: int, weighted: Sequence[tuple[int, float]], seed: int) -> grain.MapDataset:
    """Numbers of the examples in the order of an epoch; with weights without an end."""
    source = range(count)
    if not weighted:
        return grain.MapDataset.source(source).seed(seed).shuffle()
    ends = list(itertools.accumulate(count for count, _ in weighted))
    sets = [
        grain.MapDataset.source(source[end - count : end]).seed(seed + i).shuffle().repeat(None)
        for i, (end, (count, _)) in enumerate(zip(ends, weighted, strict=True))
    ]
    return grain.MapDataset.mix(sets, weights=[weight for _, weight in weighted])


def _named(row: Batch) -> Batch:
    """Grain's packed row under our names; all features have the same segments."""
    ours = {name: row[name] for name in ("input_ids", "loss_mask", "example_ids") if name in row}
    return ours | {
        "segment_ids": row["input_ids_segment_ids"],
        "positions": row["input_ids_positions"],
    }


def common_length(examples: Sequence[Example], max_length: int) -> int:
    """The length of padded rows: the longest example, rounded up to 8, at most `max_length`.

    For ``packing``, `max_length` itself packs better.

    >>> ids = np.zeros(13, np.int32)
    >>> common_length([Example(ids, ids)], max_length=512)
    16
    """
    longest = max(len(example.input_ids) for example in examples)
    return min(max_length, math.ceil(longest / LENGTH_MULTIPLE) * LENGTH_MULTIPLE)


def _check_lengths(examples: Sequence[Example], length: int) -> None:
    if not examples:
        raise InputError("data: expected at least one example, got none. Add rows.")
    longest = max(len(example.input_ids) for example in examples)
    if longest > length:
        raise InputError(
            f"data: expected examples of at most {length} tokens, got one of {longest}. "
            "Encode with a max_length of that size."
        )


def _digest(examples: Sequence[Example]) -> str:
    """A name for the examples and their order, to tell other data from the same on resume."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example.input_ids).to_bytes(8, "little"))
        digest.update(example.input_ids.astype("<i4").tobytes())
        digest.update(example.loss_mask.astype(np.uint8).tobytes())
    return digest.hexdigest()
