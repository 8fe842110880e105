"""Few sizes for many needs, such as the shapes that a program is compiled for."""

from collections.abc import Sequence

import numpy as np

from balora_jax.array_types import Bool, Float

_MOST_LENGTHS = 4
_GAIN = 0.08
"""Share of the work that one more length must save: each is compiled."""


def few_sizes(
    costs: Float[np.ndarray, "S"], fits: Bool[np.ndarray, "S N"], *, most: int, gain: float
) -> list[int]:
    """Choose sizes so that all that is to be done costs little, each by the cheapest that fits.

    Greedy, and after each addition every choice is made once more beside the others; the same
    choice wherever it is made.

    Args:
        costs: Of each size, above 0.
        fits: Whether a size serves a need; at least one size serves all.
        most: Sizes to choose.
        gain: Share of the cost that one more size must save.

    Returns:
        Indices of sizes, the cheapest first.

    >>> costs = np.array([1.0, 2.0, 3.0])
    >>> fits = np.array([[True, True, False], [True, True, False], [True, True, True]])
    >>> few_sizes(costs, fits, most=2, gain=0.1), few_sizes(costs, fits, most=1, gain=0.1)
    ([0, 2], [2])
    """
    table = np.where(fits, costs[:, None], np.inf)
    chosen: list[int] = []
    least = np.inf
    while len(chosen) < most:
        found = [*chosen, _next(table, chosen)]
        for i in range(len(found) - 1):
            rest = found[:i] + found[i + 1 :]
            found = [*rest[:i], _next(table, rest), *rest[i:]]
        total = _total(table, found)
        if chosen and total > (1.0 - gain) * least:
            break
        chosen, least = found, total
    return sorted(set(chosen), key=lambda i: (costs[i], i))


def _next(table: np.ndarray, chosen: list[int]) -> int:
    """The size that saves most beside others."""
    held = table[chosen].min(axis=0, initial=np.inf)
    return int(np.argmin(np.minimum(table, held).sum(axis=1)))


def _total(table: np.ndarray, chosen: list[int]) -> float:
    return float(table[chosen].min(axis=0).sum())


def few_lengths(
    needs: Sequence[int], longest: int, *, multiple: int, most: int, gain: float, more: int = 0
) -> list[int]:
    """Lengths that rows are padded to: few of them, ascending, ``longest`` among them.

    Args:
        needs: Length of the longest row of each batch.
        longest: Length that holds every row.
        multiple: Of the others.
        most: Lengths in all.
        gain: Share of the work that one more must save.
        more: Tokens of work that each row has besides its own.

    >>> few_lengths([30, 9, 10, 11], 30, multiple=8, most=2, gain=0.1)
    [16, 30]
    """
    lengths = sorted(
        {min(max(1, -(-need // multiple)) * multiple, longest) for need in needs} | {longest}
    )
    sizes = np.array(lengths)
    fits = sizes[:, None] >= np.array(needs)[None, :]
    fits[-1] = True
    found = few_sizes((sizes + more).astype(float), fits, most=most, gain=gain)
    if len(found) == most and len(lengths) - 1 not in found:
        found = found[1:]
    return sorted({lengths[i] for i in found} | {longest})


def batches_by_length(
    lengths: Sequence[int], longest: int, *, batch_size: int, multiple: int, more: int = 0
) -> list[tuple[list[int], int]]:
    """Rows in batches of like lengths: the places of the rows, and the length to pad them to.

    Longest first, so that a batch that does not fit in memory is the first. A single batch keeps
    the order of its rows.

    Args:
        lengths: Of each row.
        longest: Length that holds every row.
        batch_size: Rows of a batch; the last may have fewer.
        multiple: Of the lengths below ``longest``.
        more: Tokens of work that each row has besides its own.

    >>> batches_by_length([3, 40, 17, 5, 2], 40, batch_size=2, multiple=8)
    [([1, 2], 40), ([3, 0], 8), ([4], 8)]
    """
    order = list(range(len(lengths)))
    if len(order) > batch_size:
        order.sort(key=lambda i: -lengths[i])
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    needs = [max(lengths[i] for i in batch) for batch in batches]
    sizes = few_lengths(
        needs, longest, multiple=multiple, most=_MOST_LENGTHS, gain=_GAIN, more=more
    )
    return [
        (batch, next(size for size in sizes if size >= need))
        for batch, need in zip(batches, needs, strict=True)
    ]
