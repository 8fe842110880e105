"""Token ids of rows before the limit, and how they travel between hosts as one array."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from balora_jax.errors import InputError

_BAD = -1


class Tokens(NamedTuple):
    """Token ids of an example, with the spans [start, end) that are learnt."""

    ids: Sequence[int] | np.ndarray
    spans: list[tuple[int, int]]


class BadRow(NamedTuple):
    """A row that was left out, counted from 1, and why."""

    row: int
    reason: str


Found = Tokens | BadRow


def packed(found: Iterable[Found]) -> np.ndarray:
    """One after another in an int32 array: two counts, the spans and the ids.

    Of a bad row: the bytes of its reason and -1, its number, the bytes.
    """
    parts = [np.zeros(0, np.int32)]
    for one in found:
        if isinstance(one, BadRow):
            said = one.reason.encode()
            parts.append(np.fromiter((len(said), _BAD, one.row, *said), np.int32))
        else:
            spans = itertools.chain.from_iterable(one.spans)
            counts = (len(one.ids), len(one.spans))
            parts.append(np.fromiter(itertools.chain(counts, spans, one.ids), np.int32))
    return np.concatenate(parts)


def unpacked(array: np.ndarray) -> Iterator[Found]:
    """What was packed, in order.

    >>> found = [Tokens([5, 6, 7], [(1, 3)]), BadRow(2, "empty")]
    >>> tokens, bad = unpacked(packed(found))
    >>> tokens.ids.tolist(), tokens.spans, bad
    ([5, 6, 7], [(1, 3)], BadRow(row=2, reason='empty'))
    """
    start = 0
    while start < len(array):
        length, count = array[start : start + 2].tolist()
        if count == _BAD:
            first = start + 3
            said = bytes(array[first : first + length].tolist()).decode()
            yield BadRow(int(array[start + 2]), said)
        else:
            first = start + 2 + 2 * count
            spans = array[start + 2 : first].reshape(count, 2).tolist()
            yield Tokens(array[first : first + length], [(begin, end) for begin, end in spans])
        start = first + length


def or_bad(number: int, work: Callable[[], list[Tokens]], *, skip: bool) -> list[Found]:
    """What a row gives; with ``skip`` one that cannot be read gives its reason.

    Raises:
        InputError: it cannot be read, and is not to be left out.
    """
    try:
        return [*work()]
    except InputError as error:
        if not skip:
            raise
        return [BadRow(number, str(error))]
