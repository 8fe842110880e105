"""The K largest of many logits in a row, exactly, without sorting the row.

The maxima of blocks are found first; the K best blocks hold the K best entries, so only those are
searched. Ties go to the lower column, as in ``jax.lax.top_k``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from balora_jax.array_types import Array, Bool, Float, Int

BLOCK = 128
"""Entries of a block: near ``sqrt(V / K)``, where the two searches are shortest, at a large V."""


class Largest(NamedTuple):
    """The K largest entries of each row.

    Attributes:
        values: Descending, ``[N, K]``.
        columns: Where they stand, ``[N, K]``, int32.
    """

    values: Float[Array, "N K"]
    columns: Int[Array, "N K"]


def largest(logits: Float[Array, "N V"], k: int, axis: str | None = None) -> Largest:
    """Return the k largest entries of each row, as ``jax.lax.top_k`` would.

    Args:
        logits: Finite scores, ``[N, V]``; this device's columns if they are split over ``axis``.
        k: At least 1 and at most the number of columns over all devices.
        axis: Mesh axis inside ``jax.shard_map`` over which columns are split, in order.

    Returns:
        Values and columns; the columns count over all devices.

    >>> import jax.numpy as jnp
    >>> found = largest(jnp.array([[1.0, 3.0, 2.0, 3.0]]), 2)
    >>> found.values.tolist(), found.columns.tolist()
    ([[3.0, 3.0]], [[1, 3]])
    """
    columns = logits.shape[1]
    own = _of_blocks(logits, min(k, columns))
    if axis is None:
        return own
    shifted = own.columns + jax.lax.axis_index(axis).astype(jnp.int32) * columns
    # Gathered in the order of the columns, so position still breaks ties in favour of the lower.
    values = jax.lax.all_gather(own.values, axis, axis=1, tiled=True)
    everywhere = jax.lax.all_gather(shifted, axis, axis=1, tiled=True)
    best, position = _top_k(values, k)
    return Largest(best, jnp.take_along_axis(everywhere, position, axis=1))


def chosen(
    logits: Float[Array, "N V"], found: Largest, axis: str | None = None
) -> Bool[Array, "N V"]:
    """Return which entries of ``logits`` are among ``found``, by comparison: no scatter.

    >>> import jax.numpy as jnp
    >>> logits = jnp.array([[1.0, 3.0, 3.0, 3.0]])
    >>> chosen(logits, largest(logits, 2)).tolist()
    [[False, True, True, False]]
    """
    least = found.values[:, -1:]
    # Among entries equal to the K-th value those up to the last chosen column are in.
    last = jnp.max(jnp.where(found.values == least, found.columns, -1), axis=1, keepdims=True)
    column = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    if axis is not None:
        column = column + jax.lax.axis_index(axis).astype(jnp.int32) * logits.shape[1]
    return (logits > least) | ((logits == least) & (column <= last))


def _of_blocks(logits: Array, k: int) -> Largest:
    rows, columns = logits.shape
    count = -(-columns // BLOCK)
    if count <= k:
        return Largest(*_top_k(logits, k))
    padding = ((0, 0), (0, count * BLOCK - columns))
    blocks = jnp.pad(logits, padding, constant_values=-jnp.inf).reshape(rows, count, BLOCK)
    _, best = _top_k(jnp.max(blocks, axis=2), k)
    # In the order of the columns, so that ties among the candidates go to the lower column too.
    best = jnp.sort(best, axis=1)
    candidates = jnp.take_along_axis(blocks, best[:, :, None], axis=1).reshape(rows, k * BLOCK)
    values, position = _top_k(candidates, k)
    block = jnp.take_along_axis(best, position // BLOCK, axis=1)
    return Largest(values, block * BLOCK + position % BLOCK)


def _top_k(rows: Array, k: int) -> tuple[Array, Array]:
    # On CPU the compiler sorts whole rows where a slice of top_k's result is used; the barriers
    # keep the slice away from it. One around both results makes the compiler fail on some meshes.
    values, columns = jax.lax.top_k(rows, k)
    return jax.lax.optimization_barrier(values), jax.lax.optimization_barrier(columns)
