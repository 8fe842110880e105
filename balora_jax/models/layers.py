"""Building blocks of the decoders: normalisation, rotary positions, attention, MLP."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from balora_jax.array_types import Array, Bool, Float, Int
from balora_jax.models.adapters import AdapterShape, Linear

MakeLinear = Callable[..., Linear]
AttentionKernel = Literal["auto", "xla", "cudnn"]


class RMSNorm(nnx.Module):
    """A stack of root-mean-square norms, computed in float32."""

    def __init__(self, width: int, *, layers: int | None, eps: float, dtype: jnp.dtype):
        shape = (width,) if layers is None else (layers, width)
        self.scale = nnx.Param(jnp.ones(shape, dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalise the last axis."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return self.scale[...] * y.astype(x.dtype)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding with the scaling that a checkpoint's config names.

    Attributes:
        theta: base of the frequencies.
        kind: ``default``, ``linear``, ``dynamic``, ``llama3`` or ``yarn``.
        factor: how many times the context is stretched.
        original_length: context of pretraining (``dynamic``, ``llama3``, ``yarn``).
        low_freq_factor, high_freq_factor: band edges of ``llama3``.
        beta_fast, beta_slow: band edges of ``yarn`` in rotations.
        attention_factor: multiplies cos and sin (``yarn``).
        truncate: whether ``yarn`` rounds its band to whole dimensions.
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "dynamic", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_length: int = 2048
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


def rope_frequencies(
    rope: RopeConfig, head_dim: int, length: Int[Array, ""] | int
) -> Float[Array, "K2"]:
    """Angular frequencies [K/2] in radians per position, float32.

    Args:
        rope: base and scaling.
        head_dim: width of a head.
        length: positions in use; only ``dynamic`` depends on it.

    Source: Su et al. 2021; the scalings as ``transformers`` defines them.
    """
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequencies = 1.0 / (rope.theta**exponent)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "dynamic":
        length = jnp.maximum(length, rope.original_length).astype(jnp.float32)
        stretch = rope.factor * length / rope.original_length - (rope.factor - 1.0)
        return 1.0 / ((rope.theta * stretch ** (head_dim / (head_dim - 2))) ** exponent)
    if rope.kind == "llama3":
        return _llama3_frequencies(rope, frequencies)
    if rope.kind == "yarn":
        return _yarn_frequencies(rope, frequencies, head_dim)
    return frequencies


def _llama3_frequencies(rope: RopeConfig, frequencies: Array) -> Array:
    """Long wavelengths are stretched, short ones kept, those between blended."""
    wavelength = 2.0 * math.pi / frequencies
    low = rope.original_length / rope.low_freq_factor
    high = rope.original_length / rope.high_freq_factor
    blend = (rope.original_length / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    smooth = (1.0 - blend) * frequencies / rope.factor + blend * frequencies
    scaled = jnp.where(wavelength > low, frequencies / rope.factor, smooth)
    return jnp.where(wavelength < high, frequencies, scaled)


def _yarn_frequencies(rope: RopeConfig, frequencies: Array, head_dim: int) -> Array:
    """A linear ramp over dimensions from kept to stretched frequencies."""

    def dimension(rotations: float) -> float:
        return (
            head_dim
            * math.log(rope.original_length / (rotations * 2.0 * math.pi))
            / (2.0 * math.log(rope.theta))
        )

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (jnp.arange(head_dim // 2, dtype=jnp.float32) - low) / max(high - low, 1e-3)
    stretched = jnp.clip(ramp, 0.0, 1.0)
    return frequencies / rope.factor * stretched + frequencies * (1.0 - stretched)


def rotary_tables(
    rope: RopeConfig, head_dim: int, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T 1 K2"], Float[Array, "B T 1 K2"]]:
    """Cosine and sine of every position's angles, float32, broadcastable over heads."""
    frequencies = rope_frequencies(rope, head_dim, jnp.max(positions) + 1)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
    return cos * rope.attention_factor, sin * rope.attention_factor


def rotate(
    x: Float[Array, "B T H K"], cos: Float[Array, "B T 1 K2"], sin: Float[Array, "B T 1 K2"]
) -> Float[Array, "B T H K"]:
    """Rotate pairs (i, i + K/2) of every head (the half-rotation layout of HF checkpoints)."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


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
    mask: Bool[Array, "B 1 T S"],
    kernel: AttentionKernel,
) -> Float[Array, "B T H K"]:
    """Scaled dot-product attention with grouped queries; softmax in float32."""
    if kernel == "cudnn" or (kernel == "auto" and _cudnn_serves(q)):
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
    return _attend_by_products(q, k, v, mask)


def _attend_by_products(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """Attention as two batched products, heads before tokens.

    In this order no operand of a product is copied into another one, forward or backward, which
    halves the time on a CPU against ``jax.nn.dot_product_attention``. The queries of a group lie
    one behind the other, so that keys are not repeated.
    """
    batch, tokens, heads, width = q.shape
    groups, keys = k.shape[2], k.shape[1]
    share = heads // groups
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    q = q.reshape(batch, tokens, groups, share, width).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, groups, share * tokens, width)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum(
        "bgtk,bgsk->bgts", q, k, precision=precision, preferred_element_type=jnp.float32
    ).reshape(batch, groups, share, tokens, keys)
    scores = jnp.where(mask[:, :, None], scores * width**-0.5, jnp.finfo(jnp.float32).min / 2)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    weights = weights.reshape(batch, groups, share * tokens, keys)
    out = jnp.einsum("bgts,bgsk->bgtk", weights, v, precision=precision)
    out = out.reshape(batch, groups, share, tokens, width).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, tokens, heads, width)


def _cudnn_serves(q: Array) -> bool:
    """Whether cuDNN's fused attention takes it: 16 bit, head width a multiple of 8 up to 128."""
    sixteen_bit = q.dtype in (jnp.bfloat16, jnp.float16)
    return (
        jax.default_backend() == "gpu"
        and sixteen_bit
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 128
        and q.shape[1] > 1
    )


class Attention(nnx.Module):
    """A stack of grouped-query self-attention layers with rotary positions."""

    def __init__(
        self,
        width: int,
        heads: int,
        groups: int,
        head_dim: int,
        *,
        use_bias: bool,
        kernel: AttentionKernel,
        linear: MakeLinear,
    ):
        self.q_proj = linear("q_proj", width, heads * head_dim, use_bias)
        self.k_proj = linear("k_proj", width, groups * head_dim, use_bias)
        self.v_proj = linear("v_proj", width, groups * head_dim, use_bias)
        self.o_proj = linear("o_proj", heads * head_dim, width, use_bias)
        self.head_dim = head_dim
        self.kernel: AttentionKernel = kernel

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cos: Array,
        sin: Array,
        mask: Bool[Array, "B 1 T S"],
        keys: dict[str, Array | None],
        cached: tuple[Array, Array] | None = None,
        column: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        """Attend; with ``cached`` keys and values, write this call's at ``column`` first."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_proj(x, keys["q_proj"]).reshape(heads), cos, sin)
        k = rotate(self.k_proj(x, keys["k_proj"]).reshape(heads), cos, sin)
        v = self.v_proj(x, keys["v_proj"]).reshape(heads)
        if cached is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cached[0], k, column, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cached[1], v, column, axis=1)
        out = attend(q, k, v, mask, self.kernel).reshape(*x.shape[:2], -1)
        return self.o_proj(out, keys["o_proj"]), (k, v)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


class GatedMLP(nnx.Module):
    """A stack of gated MLPs: ``down(act(gate(x)) · up(x))``."""

    def __init__(
        self, width: int, inner: int, *, activation: str, use_bias: bool, linear: MakeLinear
    ):
        self.gate_proj = linear("gate_proj", width, inner, use_bias)
        self.up_proj = linear("up_proj", width, inner, use_bias)
        self.down_proj = linear("down_proj", inner, width, use_bias)
        self.activation = activation

    def __call__(
        self, x: Float[Array, "B T D"], keys: dict[str, Array | None]
    ) -> Float[Array, "B T D"]:
        """Apply the MLP."""
        gate = ACTIVATIONS[self.activation](self.gate_proj(x, keys["gate_proj"]))
        return self.down_proj(gate * self.up_proj(x, keys["up_proj"]), keys["down_proj"])


def stacked_linear(
    prefix: str, layers: int, adapters: dict[str, AdapterShape], dtype: jnp.dtype
) -> MakeLinear:
    """A constructor of the linear layers below ``prefix`` that looks up each one's adapter."""

    def make(name: str, d_in: int, d_out: int, use_bias: bool) -> Linear:
        adapter = adapters.get(f"{prefix}.{name}")
        return Linear(d_in, d_out, layers=layers, use_bias=use_bias, adapter=adapter, dtype=dtype)

    return make
