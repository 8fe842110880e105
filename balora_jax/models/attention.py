"""Attention of decoders: who may attend to whom, and the forms that compute it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from balora_jax.array_types import Array, Bool, Float, Int
from balora_jax.models.blockwise import ANYWHERE, Form, Reach, attend_by_blocks
from balora_jax.models.options import AttentionKernel
from balora_jax.parallel.token_split import gather_tokens, parts

WHOLE = 256
"""Rows of at most so many tokens are attended to in one piece, which is as fast there."""
BLOCK = 256
"""Tokens of a block of longer rows; measured on a CPU."""


class Tables(NamedTuple):
    """Inputs of attention besides its rows: rotary tables (None where there are none), mask.

    In place of the mask [B, 1, T, T] of a long row stands what it is made from.
    """

    cos: Float[Array, "B T 1 K2"] | None
    sin: Float[Array, "B T 1 K2"] | None
    mask: Bool[Array, "B 1 T S"] | Reach


def by_blocks(tokens: int, kernel: AttentionKernel) -> bool:
    """Whether rows of so many tokens attend to themselves by blocks.

    Not where a mesh splits the tokens of a row: each device has a part of the queries then.
    """
    return kernel == "blocks" and tokens > WHOLE and parts() == 1


def reach(positions: Int[Array, "B T"], segments: Int[Array, "B T"], window: int | None) -> Reach:
    """What :func:`attention_mask` would be made from, for rows that attend to themselves."""
    return Reach(positions, segments, jnp.asarray(window or ANYWHERE, jnp.int32))


def attention_mask(
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    key_segments: Int[Array, "B S"],
    window: int | None,
) -> Bool[Array, "B 1 T S"]:
    """Who may attend to whom: the same segment, not the future, not beyond the window.

    Padding is segment 0: it attends to padding only, so no row of the softmax is empty.
    """
    distance = positions[:, :, None] - key_positions[:, None, :]
    allowed = (segments[:, :, None] == key_segments[:, None, :]) & (distance >= 0)
    if window is not None:
        allowed &= distance < window
    return allowed[:, None]


def attend(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    mask: Bool[Array, "B 1 T S"] | Reach,
    kernel: AttentionKernel,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "B T H K"]:
    """Scaled dot-product attention with grouped queries; softmax in float32.

    ``scale`` multiplies the scores (1/√K where not given); ``soft_cap`` bounds them by
    ``cap · tanh(score / cap)``, which no fused kernel here does.
    """
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    if isinstance(mask, Reach):
        return attend_by_blocks(q, k, v, mask, Form(scale, soft_cap, BLOCK))
    k, v = gather_tokens(k), gather_tokens(v)
    fused = kernel == "cudnn" or (kernel == "auto" and _cudnn_serves(q))
    if fused and soft_cap is None:
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation="cudnn")
    return _attend_by_products(q, k, v, mask, scale, soft_cap)


def _attend_by_products(
    q: Array, k: Array, v: Array, mask: Array, scale: float, soft_cap: float | None
) -> Array:
    """Attention as two batched products, heads before tokens.

    In this order no operand of a product is copied into another one, forward or backward, which
    halves the time on a CPU against ``jax.nn.dot_product_attention``. The queries that share keys
    lie side by side for each token, so that keys are not repeated and a device keeps its tokens.
    """
    batch, tokens, heads, width = q.shape
    groups, keys = k.shape[2], k.shape[1]
    share = heads // groups
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    q = q.reshape(batch, tokens, groups, share, width).transpose(0, 2, 1, 3, 4)
    q = q.reshape(batch, groups, tokens * share, width)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum(
        "bgtk,bgsk->bgts", q, k, precision=precision, preferred_element_type=jnp.float32
    ).reshape(batch, groups, tokens, share, keys)
    scores = scores * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(mask[:, :, :, None], scores, jnp.finfo(jnp.float32).min / 2)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    weights = weights.reshape(batch, groups, tokens * share, keys)
    out = jnp.einsum("bgts,bgsk->bgtk", weights, v, precision=precision)
    out = out.reshape(batch, groups, tokens, share, width).transpose(0, 2, 1, 3, 4)
    return out.reshape(batch, tokens, heads, width)


def _cudnn_serves(q: Array) -> bool:
    """Whether cuDNN's attention takes it on a GPU: whole rows, 16 bit, heads of 8 n up to 128.

    That the devices are GPUs, ``kernel_on`` has seen; this process may plan for others.
    """
    sixteen_bit = q.dtype in (jnp.bfloat16, jnp.float16)
    return (
        sixteen_bit
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 128
        and q.shape[1] > 1
        and parts() == 1
    )
