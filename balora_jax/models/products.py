"""Products of activations with weights, in the activations' dtype."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from balora_jax.array_types import Array, Float
from balora_jax.parallel.token_split import as_rows, as_tokens


def matmul(x: Float[Array, "... D"], kernel: Float[Array, "D F"]) -> Float[Array, "... F"]:
    """``x @ kernel`` in the dtype of ``x``; float32 is computed as float32 on every device."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    y = jnp.matmul(as_rows(x), kernel, precision=precision, preferred_element_type=x.dtype)
    return as_tokens(y, x.shape[:-1])


def low_rank(
    x: Float[Array, "... D"],
    down: Float[Array, "*E D R"],
    up: Float[Array, "*E R F"],
    product: Callable[[Array, Array], Array] = matmul,
) -> Float[Array, "... F"]:
    """``(x down) up`` in the dtype of ``x``; ``product`` multiplies rows by a kernel."""
    return product(product(x, down.astype(x.dtype)), up.astype(x.dtype))


def as_last(values: Array, x: Array) -> Array:
    """``values`` with leading axes of length 1, so that they meet the last axes of ``x``.

    >>> as_last(jnp.zeros(3), jnp.zeros((4, 2, 3))).shape
    (1, 1, 3)
    """
    return jnp.expand_dims(values, tuple(range(x.ndim - values.ndim)))


def rescaled(y: Float[Array, "... F"], gain: Float[Array, "... F"]) -> Float[Array, "... F"]:
    """``y * gain`` rounded once: a bfloat16 gain could only be 1 or differ from it by 2⁻⁷."""
    return (y.astype(jnp.float32) * as_last(gain, y)).astype(y.dtype)
