"""Losses of one prediction, each a (sum, count) pair, divided once by its caller.

Sums and counts add over micro-batches and devices, means do not: the single division by the global
count happens in :mod:`balora_jax.numerics.objective`.
"""

import jax
import jax.numpy as jnp

from balora_jax.array_types import Array, Bool, Float, Int, Scalar
from balora_jax.errors import InputError
from balora_jax.numerics.arithmetic import as_float


def cross_entropy(
    logits: Float[Array, "N V"], labels: Int[Array, "N"], mask: Bool[Array, "N"]
) -> tuple[Scalar, Scalar]:
    """Return the summed negative log-likelihood of the labels and the number of rows.

    Serves tokens (V vocabulary entries) and classes (C columns) alike.

    Args:
        logits: Scores ``[N, V]``; computed in float32.
        labels: Index of the right column, ``[N]``; read only where the mask is True, so any
            ignore index is fine elsewhere. An index outside ``0..V-1`` in a masked-in row is a
            caller's error that is not detected here.
        mask: True where the row counts, ``[N]``.

    Returns:
        ``(sum, count)``: float32 scalars, the sum in nats.

    Raises:
        InputError: If the shapes do not match.

    >>> import jax.numpy as jnp
    >>> total, count = cross_entropy(
    ...     jnp.zeros((2, 4)), jnp.array([1, -100]), jnp.array([True, False])
    ... )
    >>> round(float(total), 4), float(count)
    (1.3863, 1.0)
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or mask.shape != labels.shape:
        raise InputError(
            "cross_entropy: expected logits [N, V], labels [N] and mask [N], got "
            f"{logits.shape}, {labels.shape} and {mask.shape}. Flatten batch and time first."
        )
    rows = label_loss_rows(logits, labels, mask)
    return jnp.sum(rows), jnp.sum(mask, dtype=rows.dtype)


def label_loss_rows(
    logits: Float[Array, "N V"], labels: Int[Array, "N"], mask: Bool[Array, "N"]
) -> Float[Array, "N"]:
    """Return each row's negative log-likelihood in nats, 0 where the mask is False.

    >>> import jax.numpy as jnp
    >>> rows = label_loss_rows(jnp.zeros((1, 2)), jnp.array([0]), jnp.array([True]))
    >>> round(float(rows[0]), 4)
    0.6931
    """
    logits = jnp.where(mask[:, None], as_float(logits), 0)
    shifted = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    # Comparing with an iota instead of gathering keeps the gradient free of a scatter.
    columns = jax.lax.broadcasted_iota(labels.dtype, logits.shape, 1)
    chosen = jnp.sum(jnp.where(columns == labels[:, None], shifted, 0), axis=-1)
    return jnp.where(mask, jnp.log(jnp.sum(jnp.exp(shifted), axis=-1)) - chosen, 0)


def mean_squared_error(
    predictions: Float[Array, "N"], targets: Float[Array, "N"], mask: Bool[Array, "N"]
) -> tuple[Scalar, Scalar]:
    """Return the summed squared error and the number of rows (a regression head, e.g. STS-B).

    Args:
        predictions: Output of the head, ``[N]``.
        targets: Scores in the unit of the task, ``[N]``.
        mask: True where the row counts, ``[N]``; masked rows may hold NaN.

    Returns:
        ``(sum, count)``: float32 scalars, the sum in squared units of the targets.

    Raises:
        InputError: If the shapes do not match.

    >>> import jax.numpy as jnp
    >>> total, count = mean_squared_error(
    ...     jnp.array([1.0, 5.0]), jnp.array([3.0, 0.0]), jnp.array([True, False])
    ... )
    >>> float(total), float(count)
    (4.0, 1.0)
    """
    if predictions.ndim != 1 or not predictions.shape == targets.shape == mask.shape:
        raise InputError(
            "mean_squared_error: expected predictions, targets and mask of one shape [N], got "
            f"{predictions.shape}, {targets.shape} and {mask.shape}. Drop the last axis of a "
            "one-column head."
        )
    error = jnp.where(mask, as_float(predictions), 0) - jnp.where(mask, as_float(targets), 0)
    return jnp.sum(error * error), jnp.sum(mask, dtype=error.dtype)
