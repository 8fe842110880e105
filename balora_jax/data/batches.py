"""Batches of one shape from examples, in an order that can be resumed exactly.

The order, the packing and the position are grain's: a shuffle that is a function of the seed and
the epoch, repeated for ever, and a state of a few integers.
"""

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import grain
import grain.experimental
import numpy as np

from balora_jax.data.examples import Example
from balora_jax.errors import InputError

Batch = dict[str, np.ndarray]
Mode = Literal["padding", "packing"]

_LENGTH_MULTIPLE = 8
# Rows that grain's packer fills side by side. On GSM8K at 1024 tokens 64 fill 93 % of the places,
# 1 fills 80 %, and 128 only 0.5 % more.
_MOST_BINS = 64
_NO_THREADS = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


class Resumable:
    """An iterator of batches whose position is a few plain values.

    A subclass sets `_iterator`, grain's, and `_identity`: what must be the same for a saved
    position to mean the same batches.
    """

    _iterator: Any
    _identity: dict[str, Any]

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
    """Batches without end, each a dict of arrays [accumulation, batch_size, length].

    ==============  =======  =====================================================================
    key             dtype    meaning
    ==============  =======  =====================================================================
    `input_ids`     int32    tokens; `pad_id` where there is none
    `loss_mask`     int32    1 where the token is a target, 0 at each segment's first token
    `segment_ids`   int32    1, 2, … for the examples in a row, 0 for padding
    `positions`     int32    from 0 in each segment, 0 for padding
    `examples`      int32    number of the example, -1 for padding; if `numbered`
    ==============  =======  =====================================================================

    Every epoch takes each example once, in an order of its own; a batch may hold the end of one
    epoch and the start of the next, and a packed row too. With several hosts, each builds the same
    iterator and places its own part of the batch.
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
        numbered: bool = False,
    ) -> None:
        """Set up the order; nothing is read yet.

        Args:
            examples: At least one, none longer than `length`.
            weighted: How many of the examples, in order, are of each set, and the weight of the
                set; none where every example is drawn once in an epoch. With weights an epoch has
                as many examples as there are, drawn from the sets by weight; each set goes through
                its own in an order of its own, again and again.
            batch_size: Rows of a micro-batch.
            accumulation: Micro-batches of a step.
            length: Tokens of a row, as `common_length` gives it.
            mode: ``padding`` (one example a row) or ``packing`` (as many as fit, first fit).
            seed: Of the order.
            pad_id: The token for empty places; any in the vocabulary does, as no loss sees it.
            numbered: Say of each place whose it is.

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
        self._rows, self._accumulation = batch_size * accumulation, accumulation
        self._length, self._mode, self._pad_id = length, mode, pad_id
        self._identity = {
            "examples": _digest(examples),
            "batch_size": batch_size,
            "accumulation": accumulation,
            "length": length,
            "mode": mode,
            "seed": seed,
        }
        if weighted:
            self._identity["weighted"] = [list(part) for part in weighted]
        source = [
            {"input_ids": e.input_ids, "loss_mask": e.loss_mask.astype(np.int32)} for e in examples
        ]
        self._fill: dict[str, int] = {"input_ids": pad_id, "loss_mask": 0}
        if numbered:
            self._fill["examples"] = -1
            for number, row in enumerate(source):
                row["examples"] = np.full(len(row["input_ids"]), number, np.int32)
        self._size = len(source)
        self._epoch = _mixed(source, weighted, seed)
        # More bins than one epoch fills would put an example beside itself.
        tokens = sum(len(example.input_ids) for example in examples)
        self._bins = min(_MOST_BINS, max(1, tokens // length))
        forever = self._rows_of(self._epoch if weighted else self._epoch.repeat(None))
        forever = forever.batch(self._rows)
        self._iterator = iter(forever)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        shape = (self._accumulation, -1, self._length)
        return {key: value.reshape(shape) for key, value in batch.items()}

    def batches_per_epoch(self) -> int:
        """Batches that one epoch fills, the last perhaps not wholly; packing is tried to count."""
        if self._mode != "packing":
            return math.ceil(self._size / self._rows)
        rows = sum(1 for _ in self._rows_of(self._epoch[: self._size]))
        return math.ceil(rows / self._rows)

    def _rows_of(self, order: grain.MapDataset) -> grain.IterDataset:
        if self._mode == "padding":
            padded = order.map(lambda e: padded_row(e, self._length, self._pad_id))
            return padded.to_iter_dataset(_NO_THREADS)
        packed = grain.experimental.FirstFitPackIterDataset(
            order.to_iter_dataset(_NO_THREADS),
            length_struct=dict.fromkeys(self._fill, self._length),
            padding_struct=self._fill,
            num_packing_bins=self._bins,
        )
        return packed.map(_named)


def _mixed(
    source: Sequence[Batch], weighted: Sequence[tuple[int, float]], seed: int
) -> grain.MapDataset:
    """The examples in the order of an epoch; with weights without an end."""
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
    own = ("input_ids", "loss_mask", "examples")
    return {
        **{name: row[name] for name in own if name in row},
        "segment_ids": row["input_ids_segment_ids"],
        "positions": row["input_ids_positions"],
    }


def padded_row(example: Batch, length: int, pad_id: int) -> Batch:
    """One example padded on the right to `length`: the four arrays of a batch, int32 [length].

    Args:
        example: `input_ids` and `loss_mask`, at most `length` long, perhaps empty.
        length: Tokens of the row.
        pad_id: The token for empty places.

    >>> row = padded_row({"input_ids": np.array([7, 8]), "loss_mask": np.array([0, 1])}, 4, 9)
    >>> row["input_ids"].tolist(), row["segment_ids"].tolist(), row["positions"].tolist()
    ([7, 8, 9, 9], [1, 1, 0, 0], [0, 1, 0, 0])
    """
    used = len(example["input_ids"])
    row = {name: np.zeros(length, np.int32) for name in ("loss_mask", "segment_ids", "positions")}
    row["input_ids"] = np.full(length, pad_id, np.int32)
    row["input_ids"][:used] = example["input_ids"]
    row["loss_mask"][:used] = example["loss_mask"]
    row["segment_ids"][:used] = 1
    row["positions"][:used] = np.arange(used)
    if "examples" in example:
        row["examples"] = np.full(length, -1, np.int32)
        row["examples"][:used] = example["examples"]
    return row


def common_length(examples: Sequence[Example], max_length: int) -> int:
    """One row length for a whole run: the longest example, rounded up to 8, at most `max_length`.

    One length means one compilation. For packing, `max_length` itself packs better.

    >>> ids = np.zeros(13, np.int32)
    >>> common_length([Example(ids, ids)], max_length=512)
    16
    """
    longest = max(len(example.input_ids) for example in examples)
    return min(max_length, math.ceil(longest / _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE)


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
