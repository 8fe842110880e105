"""Rotary position embedding, with the scalings that checkpoints name."""

import math
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from balora_jax.array_types import Array, Float, Int

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding with the scaling that a checkpoint's config names.

    Attributes:
        theta: base of the frequencies.
        kind: ``default``, ``linear``, ``dynamic``, ``llama3``, ``yarn`` or ``longrope``.
        factor: how many times the context is stretched.
        original_length: context of pretraining (all but ``linear``).
        low_freq_factor, high_freq_factor: band edges of ``llama3``.
        beta_fast, beta_slow: band edges of ``yarn`` in rotations.
        attention_factor: multiplies cos and sin (``yarn``, ``longrope``).
        truncate: whether ``yarn`` rounds its band to whole dimensions.
        short_factor, long_factor: divisors of the frequencies [K/2] within and beyond
            ``original_length`` (``longrope``).
        rotary_dim: leading dimensions of a head that rotate; None for all.
    """

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_length: int = 2048
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    rotary_dim: int | None = None


def rope_frequencies(
    rope: RopeConfig, head_dim: int, length: Int[Array, ""] | int
) -> Float[Array, "K2"]:
    """Angular frequencies [K/2] in radians per position, float32.

    Args:
        rope: base and scaling.
        head_dim: width of a head.
        length: positions in use; ``dynamic`` and ``longrope`` depend on it.

    Source: Su et al. 2021; the scalings as ``transformers`` defines them.
    """
    head_dim = rope.rotary_dim or head_dim
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequencies = 1.0 / (rope.theta**exponent)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "dynamic":
        length = jnp.maximum(length, rope.original_length).astype(jnp.float32)
        stretch = rope.factor * length / rope.original_length - (rope.factor - 1.0)
        return 1.0 / ((rope.theta * stretch ** (head_dim / (head_dim - 2))) ** exponent)
    if rope.kind == "longrope":
        short, long = jnp.asarray(rope.short_factor), jnp.asarray(rope.long_factor)
        return frequencies / jnp.where(length > rope.original_length, long, short)
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
    # A band that lies outside is turned round, and then keeps every frequency.
    ramp = (jnp.arange(head_dim // 2, dtype=jnp.float32) - low) / (high - low or 1e-3)
    stretched = jnp.clip(ramp, 0.0, 1.0)
    return frequencies / rope.factor * stretched + frequencies * (1.0 - stretched)


def rotary_tables(
    rope: RopeConfig, head_dim: int, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T 1 K2"], Float[Array, "B T 1 K2"]]:
    """Cosine and sine of every position's angles, float32, broadcastable over heads."""
    frequencies = rope_frequencies(rope, head_dim, jnp.max(positions) + 1)
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None, :]
    cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
    return cos * rope.attention_factor, sin * rope.attention_factor


def rotate(
    x: Float[Array, "B T H K"], cos: Float[Array, "B T 1 K2"], sin: Float[Array, "B T 1 K2"]
) -> Float[Array, "B T H K"]:
    """Rotate pairs (i, i + R/2) of every head's first R = 2·K2 dimensions; the rest stay.

    This is the half-rotation layout of Hugging Face checkpoints.
    """
    turning, still = jnp.split(x, [2 * cos.shape[-1]], axis=-1)
    first, second = jnp.split(turning.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), still], axis=-1)
