"""Leading singular triplets of a matrix that is only known by its products.

Block Golub-Kahan-Lanczos with full reorthogonalisation and restarts. The basis grows by blocks, so
flat spectra converge; both half steps are orthonormalised, so one dominant direction does not drown
the others in float32 (iterating with ``A^T A`` would square the range of the spectrum). Rows of
either side may be split over named mesh axes inside ``jax.shard_map``.

Nothing here is meant to be differentiated: the derivative of a sum of singular values is known in
closed form (:mod:`balora_jax.numerics.linalg`, :mod:`balora_jax.numerics.ratio`).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from balora_jax.array_types import Array, Float, Scalar
from balora_jax.numerics.arithmetic import product, sum_over

EXTRA_COLUMNS = 6
"""Columns of a block beyond the wanted k: 16 for the published k = 10."""

BLOCKS = 8
"""Blocks of a basis before it is cut back to its best columns: 128 columns for k = 10."""

CYCLES = 8
"""Restarts at most. A spectrum that decays needs one or two."""

TOLERANCE = 3e-4
"""Wanted residual in units of the gap behind the k-th value: about the error of the gradient."""


class Operator(NamedTuple):
    """A matrix A of shape ``[image, basis]`` behind its two products.

    Attributes:
        apply: ``[basis, w]`` -> ``A x``, ``[image, w]``.
        transpose: ``[image, w]`` -> ``A^T y``, ``[basis, w]``.
        image_axes: Mesh axes that the rows of an image are split over; both products take and give
            this device's rows, sums over devices included.
        basis_axes: The same for the basis.
    """

    apply: Callable[[Array], Array]
    transpose: Callable[[Array], Array]
    image_axes: tuple[str, ...] = ()
    basis_axes: tuple[str, ...] = ()


class Triplets(NamedTuple):
    """Leading singular triplets, values descending, in float32 (or wider).

    Attributes:
        image: Left singular vectors, this device's rows, ``[image, w]``.
        s: Singular values, ``[w]``.
        basis: Right singular vectors, ``[basis, w]``.
        residual: ``||A^T U_k - V_k S_k||_F``, in units of A.
        cycles: Restarts done.
    """

    image: Float[Array, "I w"]
    s: Float[Array, "w"]
    basis: Float[Array, "J w"]
    residual: Scalar
    cycles: Array


def operator_of(matrix: Float[Array, "I J"]) -> Operator:
    """The products with a matrix in memory, whole on every device."""
    return Operator(lambda x: product(matrix, x), lambda y: product(matrix.T, y))


def leading_triplets(
    operator: Operator,
    start: Float[Array, "J w"],
    k: int,
    *,
    blocks: int = BLOCKS,
    cycles: int = CYCLES,
) -> Triplets:
    """Return w leading triplets, of which the first k have converged or ``cycles`` were spent.

    Args:
        operator: The matrix.
        start: Any block of full rank with ``w > k`` columns.
        k: Wanted triplets.
        blocks: Products with A, and with its transpose, in one cycle. ``w · blocks`` must be at
            most the number of rows of the basis over all devices.
        cycles: Cycles at most.

    Returns:
        The triplets. The iteration ends when the residual is below ``TOLERANCE·(s_k - s_{k+1})``,
        or at the rounding of ``s_1``, where float32 holds no more. If ``s_k = s_{k+1}`` the
        subspace of the first k is not unique; any is right.

    >>> import jax, jax.numpy as jnp
    >>> matrix = jnp.diag(jnp.arange(40.0))
    >>> start = jax.random.normal(jax.random.key(0), (40, 5))
    >>> leading_triplets(operator_of(matrix), start, 2, blocks=4).s[:2].round(3).tolist()
    [39.0, 38.0]
    """
    basis, _ = tsqr(start, operator.basis_axes)
    empty = jnp.zeros((start.shape[1],), start.dtype)
    image = jnp.zeros(jax.eval_shape(operator.apply, basis).shape, start.dtype)
    first = Triplets(image, empty, basis, jnp.asarray(jnp.inf, start.dtype), jnp.int32(0))
    floor = 4 * float(jnp.finfo(start.dtype).eps)

    def unfinished(found: Triplets) -> Array:
        gap = found.s[k - 1] - found.s[k]
        open_ = (found.residual > TOLERANCE * gap) & (found.residual > floor * found.s[0])
        return (found.cycles < cycles) & open_

    def cycle(found: Triplets) -> Triplets:
        return _cycle(operator, found.basis, k, blocks)._replace(cycles=found.cycles + 1)

    return jax.lax.while_loop(unfinished, cycle, first)


def _cycle(operator: Operator, start: Array, k: int, blocks: int) -> Triplets:
    """Grow the Krylov basis from ``start``, then take the best triplets in it (Rayleigh-Ritz)."""
    rows, width = start.shape

    def extend(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        basis, block = carry
        basis = jax.lax.dynamic_update_slice(basis, block, (0, index * width))
        image, _ = tsqr(operator.apply(block), operator.image_axes)
        new = operator.transpose(image)
        for _ in range(2):  # once loses orthogonality to rounding, twice is enough
            inner = sum_over(product(basis.T, new), operator.basis_axes)
            new = new - product(basis, inner)
        return basis, tsqr(new, operator.basis_axes)[0]

    basis = jnp.zeros((rows, width * blocks), start.dtype)
    basis, _ = jax.lax.fori_loop(0, blocks, extend, (basis, start))
    # Where the matrix is exhausted a new block is rounding noise inside the old ones: one more
    # factorisation makes the basis orthonormal whatever it holds.
    basis, _ = tsqr(basis, operator.basis_axes)
    image, small = tsqr(operator.apply(basis), operator.image_axes)
    left, s, right = jnp.linalg.svd(small, full_matrices=False)
    u, s, v = product(image, left[:, :width]), s[:width], product(basis, right[:width].T)
    gap = operator.transpose(u[:, :k]) - v[:, :k] * s[None, :k]
    squares = sum_over(jnp.sum(gap * gap), operator.basis_axes)
    return Triplets(u, s, v, jnp.sqrt(squares), jnp.int32(0))


def tsqr(
    rows: Float[Array, "n m"], axes: tuple[str, ...]
) -> tuple[Float[Array, "n r"], Float[Array, "r m"]]:
    """QR of a matrix whose rows are split over mesh axes: this device's rows of Q, and R.

    Each device factorises its rows; the stacked small factors are gathered and factorised again.
    As stable as Householder QR of the entire matrix. Without axes it is ``jnp.linalg.qr``.

    **Source:** Demmel, Grigori, Hoemmen and Langou (2012), with a tree of one level.

    >>> import jax.numpy as jnp
    >>> q, r = tsqr(jnp.array([[3.0], [4.0]]), ())
    >>> abs(r).round(4).tolist()
    [[5.0]]
    """
    q, r = jnp.linalg.qr(rows)
    if not axes:
        return q, r
    stacked = jax.lax.all_gather(r, axes, tiled=True)
    outer, r_all = jnp.linalg.qr(stacked)
    own = jax.lax.dynamic_slice_in_dim(outer, jax.lax.axis_index(axes) * r.shape[0], r.shape[0])
    return product(q, own), r_all
