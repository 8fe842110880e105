"""The spectral term of ``Z = H Wᵀ`` and its gradient, without the N x V matrix.

Where logits are linear in the hidden states, ``σ(H Wᵀ) = σ(H Rᵀ)`` with the D x D factor R of the
head, and everything is as wide as the model. Where they are not (a soft cap), the iteration takes
products with the implicit Z, formed again chunk by chunk. Either way the gradient has the closed
form ``U diag(c) Vᵀ + b·Z``: no decomposition is differentiated.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from balora_jax.array_types import Array, Float, Scalar
from balora_jax.numerics import krylov, linalg
from balora_jax.numerics.arithmetic import product, sum_over, wide

SpectralNorm = Literal["frobenius", "nuclear"]

IMPLICIT_BLOCKS = 3
"""Blocks of a basis where each product costs a pass over the logits; restarts make up for it."""


class SpectralGradient(NamedTuple):
    """The spectral term of this device's rows and the pieces of its gradient.

    ``d value / d Z = left · rightᵀ + shrink · Z`` in the space that ``right`` lives in: the width
    of the model (then it is already ``d value / d H``) or the vocabulary.

    Attributes:
        value: Minus the ratio, float32.
        left: ``[N, w]``, zero in rows that do not count.
        right: ``[D, w]``, or ``[V, w]`` from the implicit route.
        shrink: Coefficient of Z, from the derivative of the Frobenius norm; 0 with ``nuclear``.
        residual: ``||Zᵀ U - V S||_F / ||S||`` over the k leading triplets; 0 where exact.
    """

    value: Scalar
    left: Float[Array, "N w"]
    right: Float[Array, "D w"]
    shrink: Scalar
    residual: Scalar


def from_width(
    hidden: Float[Array, "N D"],
    factor: Float[Array, "D D"],
    k: int,
    norm: SpectralNorm,
    axes: tuple[str, ...] = (),
) -> SpectralGradient:
    """Return the term by ``K = H Rᵀ``; rows that do not count must be zero.

    Exact decomposition where one side of K is short or ``norm`` needs all singular values, block
    Lanczos otherwise.

    Args:
        hidden: Final hidden states of this device's rows, ``[N, D]``.
        factor: R of the head (:func:`linalg.head_factor`), float32.
        k: Leading singular values.
        norm: Denominator of the ratio.
        axes: Mesh axes that rows are split over, inside ``jax.shard_map``.

    **Source:** paper (ICLR 2026 and v1-v5); ``∂ Σ_{i≤k} σ_i / ∂Z = U_k V_kᵀ``.

    >>> import jax.numpy as jnp
    >>> found = from_width(jnp.diag(jnp.array([3.0, 4.0])), jnp.eye(2), 1, "frobenius")
    >>> round(float(found.value), 4)
    -0.8
    """
    factor = factor.astype(wide(hidden))
    width = k + krylov.EXTRA_COLUMNS
    rows = hidden.shape[0] * (jax.lax.axis_size(axes) if axes else 1)
    shape = (rows, hidden.shape[1])
    if norm == "nuclear" or min(shape) <= width * krylov.BLOCKS:
        matrix = _by(hidden, factor.T)
        image, small = krylov.tsqr(matrix, axes)
        left, s, right = jnp.linalg.svd(small, full_matrices=False)
        u, v, residual = product(image, left), right.T, jnp.zeros((), s.dtype)
        squares = sum_over(jnp.sum(matrix * matrix), axes)
    else:
        # K itself is never formed: each product goes through H and R in turn.
        operator = krylov.Operator(
            lambda x: _by(hidden, product(factor.T, x)),
            lambda y: product(factor, sum_over(_by(hidden.T, y), axes)),
            axes,
        )
        start = jax.random.normal(jax.random.key(0), (shape[1], width), factor.dtype)
        found = krylov.leading_triplets(operator, start, k)
        u, s, v, residual = found.image, found.s, found.basis, found.residual
        squares = sum_over(_squares(hidden, factor), axes)
    return _gradient(u, s, product(factor.T, v), squares, residual, k, norm, shape)


def from_products(
    apply: Callable[[Array], Array],
    transpose: Callable[[Array], Array],
    squares: Scalar,
    shape: tuple[int, int],
    k: int,
    *,
    row_axes: tuple[str, ...] = (),
    column_axes: tuple[str, ...] = (),
) -> SpectralGradient:
    """Return the term, Frobenius norm, of a Z that is known by its products only.

    Args:
        apply: ``[V, w]`` -> ``Z x``, ``[N, w]``, sums over devices included.
        transpose: ``[N, w]`` -> ``Zᵀ y``, ``[V, w]``.
        squares: ``||Z||_F²`` over all devices.
        shape: Rows and columns of Z on this device.
        k: Leading singular values; at most the shorter side over all devices.
        row_axes: Mesh axes that the rows are split over.
        column_axes: The same for the columns.
    """
    rows = shape[0] * (jax.lax.axis_size(row_axes) if row_axes else 1)
    columns = shape[1] * (jax.lax.axis_size(column_axes) if column_axes else 1)
    width = k + krylov.EXTRA_COLUMNS
    if min(rows, columns) <= width * IMPLICIT_BLOCKS:
        u, s, v = _all_triplets(apply, transpose, shape, (rows, columns), row_axes, column_axes)
        residual = jnp.zeros((), s.dtype)
    else:
        # The basis is kept on the side of the rows: N is far below V.
        operator = krylov.Operator(transpose, apply, column_axes, row_axes)
        key = jax.random.key(0)
        if row_axes:
            key = jax.random.fold_in(key, jax.lax.axis_index(row_axes))
        start = jax.random.normal(key, (shape[0], width), squares.dtype)
        found = krylov.leading_triplets(operator, start, k, blocks=IMPLICIT_BLOCKS)
        u, s, v, residual = found.basis, found.s, found.image, found.residual
    return _gradient(u, s, v, squares, residual, k, "frobenius", (rows, columns))


def _all_triplets(
    apply: Callable[[Array], Array],
    transpose: Callable[[Array], Array],
    own: tuple[int, int],
    shape: tuple[int, int],
    row_axes: tuple[str, ...],
    column_axes: tuple[str, ...],
) -> tuple[Array, Array, Array]:
    """Every triplet of a Z with few rows or few columns: a product with an identity is Z itself."""
    if shape[0] > shape[1]:
        v, s, u = _all_triplets(
            transpose, apply, (own[1], own[0]), (shape[1], shape[0]), column_axes, row_axes
        )
        return u, s, v
    first = jax.lax.axis_index(row_axes) * own[0] if row_axes else 0
    identity = jnp.equal(first + jnp.arange(own[0])[:, None], jnp.arange(shape[0])[None, :])
    image, small = krylov.tsqr(transpose(identity.astype(jnp.float32)), column_axes)
    left, s, right = jnp.linalg.svd(small, full_matrices=False)
    own_rows = jax.lax.dynamic_slice_in_dim(right.T, first, own[0])
    return own_rows, s, product(image, left)


def _gradient(
    u: Array,
    s: Array,
    right: Array,
    squares: Scalar,
    residual: Scalar,
    k: int,
    norm: SpectralNorm,
    shape: tuple[int, int],
) -> SpectralGradient:
    top = jnp.sum(s[:k])
    size = jnp.sum(s) if norm == "nuclear" else jnp.sqrt(squares)
    positive = size > 0
    size = jnp.where(positive, size, 1)
    leading = jnp.arange(s.shape[0]) < k
    # Singular vectors of a zero value are arbitrary: no gradient along them.
    kept = s > linalg.zero_level(s[0], shape)
    coefficients = jnp.where(leading, -1 / size, 0)
    shrink = jnp.zeros((), s.dtype)
    if norm == "nuclear":
        coefficients = coefficients + top / size**2
    else:
        shrink = top / size**3
        u, right, coefficients, kept = u[:, :k], right[:, :k], coefficients[:k], kept[:k]
    left = u * jnp.where(positive & kept, coefficients, 0)[None, :]
    scale = jnp.sqrt(jnp.sum(jnp.where(leading, s * s, 0)))
    return SpectralGradient(
        value=jnp.where(positive, -top / size, 0),
        left=left,
        right=right,
        shrink=jnp.where(positive, shrink, 0),
        residual=jnp.where(scale > 0, residual / jnp.where(scale > 0, scale, 1), 0),
    )


def _by(hidden: Array, right: Array) -> Array:
    """``hidden @ right`` in float32. A bfloat16 ``hidden`` is exact, so only ``right`` is split,
    into three bfloat16 parts: one pass of a matrix unit, and no float32 copy of ``hidden``.
    """
    if hidden.dtype != jnp.bfloat16:
        return product(hidden.astype(right.dtype), right)
    parts = []
    for _ in range(3):
        parts.append(right.astype(jnp.bfloat16))
        right = right - parts[-1].astype(right.dtype)
    products = jnp.matmul(
        hidden, jnp.concatenate(parts, axis=1), preferred_element_type=right.dtype
    )
    return sum(jnp.split(products, 3, axis=1)[::-1], jnp.zeros((), right.dtype))


def _squares(hidden: Array, factor: Array) -> Array:
    """``||H Rᵀ||_F²``, a block of columns at a time."""
    width = hidden.shape[1]
    block = next(size for size in range(min(width, 512), 0, -1) if width % size == 0)

    def add(total: Array, rows: Array) -> tuple[Array, None]:
        products = _by(hidden, rows.T)
        return total + jnp.sum(products * products), None

    blocks = factor.reshape(width // block, block, width)
    return jax.lax.scan(add, jnp.zeros((), factor.dtype), blocks)[0]
