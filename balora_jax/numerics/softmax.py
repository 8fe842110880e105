"""The softmax of rows of logits: whole rows to be differentiated, and rows split over devices.

:func:`entropy_rows` is for automatic derivatives. :func:`softmax_of` keeps what a derivative by
hand needs; the vocabulary may be split over a mesh axis: then a maximum and a few sums of each row
cross it, no logits do.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from balora_jax.array_types import Array, Bool, Float, Int, Scalar
from balora_jax.numerics.arithmetic import as_float


class Softmax(NamedTuple):
    """``softmax(z / T)`` by its row constants: ``log p = (z - largest) / T - log_total``.

    Each use forms the probabilities again from the logits: an exponential costs less than an array
    of ``[N, V]`` that is written and read back.
    """

    logits: Array
    largest: Array
    log_total: Array
    temperature: float

    @property
    def log_p(self) -> Array:
        """Logarithms of the probabilities, ``[N, V]``."""
        # The row's maximum first keeps differences exact where a row has a large offset.
        return (self.logits - self.largest) / self.temperature - self.log_total

    @property
    def probability(self) -> Array:
        """The probabilities, ``[N, V]``."""
        return jnp.exp(self.log_p)


def softmax_of(logits: Float[Array, "N V"], temperature: float, axis: str | None) -> Softmax:
    """The softmax of each row.

    Args:
        logits: Float32; this device's columns if ``axis`` is given.
        temperature: T > 0.
        axis: Mesh axis inside ``jax.shard_map`` that the vocabulary is split over.
    """
    largest = _row_max(logits)
    if axis is not None:
        largest = jax.lax.pmax(largest, axis)
    total = row_sum(jnp.exp((logits - largest) / temperature), axis)
    return Softmax(logits, largest, jnp.log(total)[:, None], temperature)


def row_sum(entries: Float[Array, "N V"], axis: str | None) -> Float[Array, "N"]:
    """The sum of each row over all devices."""
    total = jnp.sum(entries, axis=1)
    return total if axis is None else jax.lax.psum(total, axis)


def entropy(softmax: Softmax, axis: str | None) -> Float[Array, "N"]:
    """The entropy of each row in nats."""
    return -row_sum(softmax.probability * softmax.log_p, axis)


def entropy_sum(
    logits: Float[Array, "N V"],
    mask: Bool[Array, "N"],
    temperature: float,
    axis: str | None = None,
) -> Scalar:
    """Return the entropy of each row's softmax at a temperature, summed over the mask, in nats.

    >>> import jax.numpy as jnp
    >>> round(float(entropy_sum(jnp.zeros((1, 8)), jnp.array([True]), 2.0)), 4)
    2.0794
    """
    softmax = softmax_of(logits, temperature, axis)
    return jnp.sum(jnp.where(mask, entropy(softmax, axis), 0))


def cross_entropy_and_gradient(
    softmax: Softmax,
    labels: Int[Array, "N"],
    mask: Bool[Array, "N"],
    scale: Scalar,
    axis: str | None,
) -> tuple[Scalar, Float[Array, "N V"]]:
    """Return the summed negative log-likelihood, and ``scale`` times its gradient.

    Labels are picked by comparison, never by a scatter.

    >>> import jax.numpy as jnp
    >>> softmax = softmax_of(jnp.zeros((1, 4)), 1.0, None)
    >>> label, yes = jnp.array([1]), jnp.array([True])
    >>> cross_entropy_and_gradient(softmax, label, yes, jnp.float32(4), None)[1].tolist()
    [[1.0, -3.0, 1.0, 1.0]]
    """
    columns = jax.lax.broadcasted_iota(jnp.int32, softmax.logits.shape, 1)
    if axis is not None:
        columns = columns + jax.lax.axis_index(axis).astype(jnp.int32) * columns.shape[1]
    is_label = columns == labels[:, None]
    chosen = row_sum(jnp.where(is_label, softmax.logits - softmax.largest, 0), axis)
    losses = jnp.where(mask, softmax.log_total[:, 0] - chosen, 0)
    factor = jnp.where(mask, scale, 0)[:, None]
    return jnp.sum(losses), factor * (softmax.probability - is_label)


def entropy_rows(
    logits: Float[Array, "N V"], top_k: int, temperature: float = 1.0
) -> Float[Array, "N"]:
    """Return the entropy of each row's softmax over its top_k logits (0: all), in nats.

    >>> import jax.numpy as jnp
    >>> round(float(entropy_rows(jnp.zeros((1, 8)), 4)[0]), 4)
    1.3863
    """
    logits = as_float(logits)
    if 0 < top_k < logits.shape[-1]:
        # On CPU the compiler sorts whole rows where a slice of top_k's result is used; the barrier
        # keeps the slice away from it.
        logits = jax.lax.optimization_barrier(jax.lax.top_k(logits, top_k)[0])
    shifted = below_their_maximum(logits) / temperature
    weight = jnp.exp(shifted)
    total = jnp.sum(weight, axis=-1)
    return jnp.log(total) - jnp.sum(weight * shifted, axis=-1) / total


def below_their_maximum(logits: Float[Array, "N V"]) -> Float[Array, "N V"]:
    """The logits less the maximum of their row, a constant: no softmax sees it."""
    return logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))


def _row_max(logits: Array) -> Array:
    # Not jnp.max: the CPU compiler would fuse that into the product which made the logits, and the
    # product would take more than twice as long.
    return -jnp.min(-logits, axis=1, keepdims=True)
