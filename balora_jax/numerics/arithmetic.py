"""Float32 arithmetic: widening, products at the highest precision, sums over devices."""

import jax
import jax.numpy as jnp

from balora_jax.array_types import Array, Float, Scalar

_HIGHEST = jax.lax.Precision.HIGHEST


def wide(array: Array) -> jnp.dtype:
    """The dtype to compute in: float32, or float64 where JAX's x64 mode gave it."""
    return jnp.promote_types(array.dtype, jnp.float32)


def as_float(array: Array) -> Array:
    """Widen to float32; float64 stays float64 (only possible with JAX's x64 mode)."""
    return array.astype(wide(array))


def product(left: Array, right: Array) -> Array:
    """``left @ right`` at the highest precision."""
    return jnp.matmul(left, right, precision=_HIGHEST)


def einsum(indices: str, left: Array, right: Array) -> Array:
    """A product in the dtype of ``left``, accumulated in float32; exact products of float32."""
    return jnp.einsum(
        indices,
        left,
        right.astype(left.dtype),
        preferred_element_type=wide(left),
        precision=_HIGHEST if left.dtype == wide(left) else None,
    )


def sum_over(array: Array, axes: tuple[str, ...]) -> Array:
    """The sum over mesh axes inside ``jax.shard_map``; the array itself without axes."""
    return jax.lax.psum(array, axes) if axes else array


def ratio(total: Scalar, count: Scalar) -> Scalar:
    """``total / count``, 0 where nothing was counted.

    >>> import jax.numpy as jnp
    >>> float(ratio(jnp.float32(3), jnp.float32(2))), float(ratio(jnp.float32(3), jnp.float32(0)))
    (1.5, 0.0)
    """
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1), 0)


def masked(rows: Float[Array, "N V"], mask: Array) -> Float[Array, "N V"]:
    """The rows in float32, zero where the mask is False, whatever stands there (NaN too)."""
    # where, not a product: a masked row may hold NaN or infinity.
    return jnp.where(mask[:, None], as_float(rows), 0)


def masked_mean(values: Float[Array, "N"], mask: Array) -> Scalar:
    """The mean of the values where the mask is True; 0 where it is True nowhere."""
    count = jnp.sum(mask, dtype=values.dtype)
    return jnp.sum(jnp.where(mask, values, 0)) / jnp.maximum(count, 1)
