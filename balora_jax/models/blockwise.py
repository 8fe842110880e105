"""Exact attention by blocks of queries and keys, with a backward of its own.

Only blocks that hold an allowed pair are computed, and only the output and the logarithms of the
sums are kept for the backward, so that memory grows with T and not with T². Nothing is
approximated: sums run in another order than in the plain form.

Source: Dao et al. 2022 (FlashAttention), Algorithms 1 and 4.
"""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from balora_jax.array_types import Array, Bool, Float, Int

ANYWHERE = 2**30
"""The window of a layer that has none: farther than any two tokens of a row."""
_LOW = float(jnp.finfo(jnp.float32).min) / 2
_LAST = 2**31 - 1


class Reach(NamedTuple):
    """What a mask is made from, for rows that attend to themselves.

    Positions rise with the column within a segment; segment 0 is padding.
    """

    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    window: Int[Array, ""]


class Form(NamedTuple):
    """What is fixed when it is traced."""

    scale: float
    soft_cap: float | None
    block: int


class _Rows(NamedTuple):
    """Blocks [n, B, b] of what masks are made from."""

    columns: Int[Array, "n b"]
    positions: Int[Array, "n B b"]
    segments: Int[Array, "n B b"]


def attend_by_blocks(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    reach: Reach,
    form: Form,
) -> Float[Array, "B T H K"]:
    """Attention of rows to themselves; a token of padding attends to itself only.

    Args:
        q: queries; H is a multiple of G, heads that share keys lie side by side.
        k: keys.
        v: values.
        reach: who may attend to whom.
        form: scale, soft cap and the size of a block; T need not be a multiple of it.
    """
    tokens, groups = q.shape[1], k.shape[2]
    more = -tokens % form.block
    reach = reach._replace(
        positions=jnp.pad(reach.positions, ((0, 0), (0, more))),
        segments=jnp.pad(reach.segments, ((0, 0), (0, more))),
    )
    q, k, v = (_blocks(jnp.pad(x, _end(more)), groups, form.block) for x in (q, k, v))
    out = cast("Array", _attend(q, k, v, reach, form))
    return _rows(out, form.block)[:, :tokens]


def _end(more: int) -> tuple[tuple[int, int], ...]:
    return ((0, 0), (0, more), (0, 0), (0, 0))


def _blocks(x: Array, groups: int, block: int) -> Float[Array, "n B G R K"]:
    """[B, T, H, K] by blocks, heads before tokens; R = block · H / G, a token's heads together."""
    batch, tokens, heads, width = x.shape
    x = x.reshape(batch, tokens // block, block, groups, heads // groups, width)
    x = x.transpose(1, 0, 3, 2, 4, 5)
    return x.reshape(tokens // block, batch, groups, -1, width)


def _rows(x: Float[Array, "n B G R K"], block: int) -> Float[Array, "B T H K"]:
    """The reverse of :func:`_blocks`."""
    count, batch, groups, rows, width = x.shape
    x = x.reshape(count, batch, groups, block, rows // block, width)
    return x.transpose(1, 0, 3, 2, 4, 5).reshape(batch, count * block, -1, width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: Array, k: Array, v: Array, reach: Reach, form: Form) -> Array:
    return _forward(q, k, v, reach, form)[0]


def _forward(q: Array, k: Array, v: Array, reach: Reach, form: Form) -> tuple[Array, Any]:
    """Outputs, and what the backward needs."""
    rows, (order, counts) = _split(reach, form.block)

    def of_queries(_, read):
        query, i, near, count = read

        def add(c, carry):
            top, total, out = carry
            scores = _scores(query, k[near[c]], _allowed(rows, reach.window, i, near[c]), form)
            higher = jnp.maximum(top, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - higher[..., None])
            shrink = jnp.exp(top - higher)
            total = total * shrink + jnp.sum(weights, axis=-1)
            weights = jax.lax.optimization_barrier(weights.astype(q.dtype))
            return higher, total, out * shrink[..., None] + _product(weights, v[near[c]])

        shape = query.shape[:-1]
        empty = (
            jnp.full(shape, _LOW, jnp.float32),
            jnp.zeros(shape, jnp.float32),
            jnp.zeros((*shape, v.shape[-1]), jnp.float32),
        )
        top, total, out = jax.lax.fori_loop(0, count, add, empty)
        return None, ((out / total[..., None]).astype(q.dtype), top + jnp.log(total))

    each = jnp.arange(q.shape[0])
    _, (out, logs) = jax.lax.scan(of_queries, None, (q, each, order, counts))
    return out, (q, k, v, reach, out, logs)


def _backward(form: Form, kept: Any, cotangent: Array) -> tuple[Any, ...]:
    """Gradients of queries, keys and values."""
    q, k, v, reach, out, logs = kept
    rows, (order, counts) = _split(reach, form.block)
    means = jnp.sum(cotangent.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def of_queries(sums, read):
        query, pull, mean, log, i, near, count = read

        def add(c, carry):
            dq, dk, dv = carry
            j = near[c]
            scores = _scores(query, k[j], _allowed(rows, reach.window, i, j), form)
            weights = jnp.exp(scores - log[..., None])
            slopes = weights * (_product(pull, v[j].swapaxes(-1, -2)) - mean[..., None])
            if form.soft_cap is not None:
                bent = jnp.maximum(scores, -form.soft_cap) / form.soft_cap  # what is masked
                slopes = slopes * (1 - bent * bent)
            slopes = (slopes * form.scale).astype(q.dtype)
            # Else XLA:CPU computes them inside of the products, once for each element.
            weights, slopes = jax.lax.optimization_barrier((weights.astype(q.dtype), slopes))
            dk = dk.at[j].add(_product(slopes.swapaxes(-1, -2), query))
            dv = dv.at[j].add(_product(weights.swapaxes(-1, -2), pull))
            return dq + _product(slopes, k[j]), dk, dv

        start = (jnp.zeros(query.shape, jnp.float32), *sums)
        dq, *sums = jax.lax.fori_loop(0, count, add, start)
        return tuple(sums), dq.astype(q.dtype)

    zeros = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    each = jnp.arange(q.shape[0])
    read = (q, cotangent, means, logs, each, order, counts)
    (dk, dv), dq = jax.lax.scan(of_queries, zeros, read)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_forward, _backward)


def _product(a: Array, b: Array) -> Array:
    """Batched matrix product, summed in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.matmul(a, b, precision=precision, preferred_element_type=jnp.float32)


def _scores(query: Array, key: Array, allowed: Array, form: Form) -> Float[Array, "B G R b"]:
    """Scaled, capped and masked scores of a block of queries and one of keys."""
    scores = _product(query, key.swapaxes(-1, -2)) * form.scale
    if form.soft_cap is not None:
        scores = form.soft_cap * jnp.tanh(scores / form.soft_cap)
    share = query.shape[-2] // form.block
    allowed = jnp.repeat(allowed, share, axis=-2) if share > 1 else allowed
    return jnp.where(allowed, scores, _LOW)


def _allowed(rows: _Rows, window: Array, i: Array, j: Array) -> Bool[Array, "B 1 b b"]:
    """Who may attend to whom, between block ``i`` of the queries and block ``j`` of the keys."""
    distance = rows.positions[i][:, :, None] - rows.positions[j][:, None, :]
    same = rows.segments[i][:, :, None] == rows.segments[j][:, None, :]
    itself = (rows.columns[i][:, None] == rows.columns[j][None, :])[None]
    real = (rows.segments[i] != 0)[:, :, None]
    return ((same & real & (distance >= 0) & (distance < window)) | itself)[:, None]


def _split(reach: Reach, block: int) -> tuple[_Rows, tuple[Array, Array]]:
    """Positions and segments by blocks; the key blocks of each query block, and how many."""
    positions, segments = (
        x.reshape(x.shape[0], -1, block).swapaxes(0, 1) for x in (reach.positions, reach.segments)
    )
    count = positions.shape[0]
    rows = _Rows(jnp.arange(count * block).reshape(count, block), positions, segments)
    near = _near(positions, segments, reach.window)
    return rows, (jnp.argsort(~near, axis=-1), jnp.sum(near, axis=-1))


def _near(positions: Array, segments: Array, window: Array) -> Bool[Array, "n n"]:
    """Which blocks of keys may hold one that a query of a block attends to, in any row."""
    real = segments != 0

    def ends(x: Array) -> tuple[Array, Array]:
        low, high = jnp.where(real, x, _LAST), jnp.where(real, x, -1)
        return jnp.min(low, axis=-1), jnp.max(high, axis=-1)

    (first, last), (low, high) = ends(segments), ends(positions)
    meet = (first[:, None] <= last[None]) & (first[None] <= last[:, None])
    meet &= (low[None] <= high[:, None]) & (low[:, None] - high[None] < window)
    meet &= real.any(-1)[:, None] & real.any(-1)[None]
    each = jnp.arange(positions.shape[0])
    return (meet.any(-1) & (each[None] <= each[:, None])) | (each[None] == each[:, None])
