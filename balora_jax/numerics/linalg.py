"""Singular values, their sums and their gradients, without a division by gaps.

Back-propagating through a singular value decomposition divides by differences of singular values
and gives NaN where two of them meet (equal rows, masked rows). Sums of singular values do not need
those differences: the derivative of one singular value is ``u v^T``, so every function here that is
differentiated carries that closed form. All arithmetic is float32 (float64 where x64 is enabled and
the input is float64), with products at the highest precision.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from balora_jax.array_types import Array, Float, PRNGKeyArray, Scalar
from balora_jax.errors import InputError
from balora_jax.numerics import krylov
from balora_jax.numerics.arithmetic import as_float, product

SvdMethod = Literal["auto", "exact", "iterative"]

EXACT_LIMIT = 512
"""Longest thin side (rows or columns, the smaller) that ``method="auto"`` decomposes exactly."""

_HIGHEST = jax.lax.Precision.HIGHEST


class LeadingTriplets(NamedTuple):
    """Leading singular triplets of a matrix of shape N x M, singular values descending.

    Attributes:
        u: Left singular vectors, ``[N, k]``.
        s: Singular values, ``[k]``.
        v: Right singular vectors (not transposed), ``[M, k]``.
    """

    u: Float[Array, "N k"]
    s: Float[Array, "k"]
    v: Float[Array, "M k"]


def singular_values(
    matrix: Float[Array, "N M"], k: int, *, method: SvdMethod = "auto"
) -> Float[Array, "k"]:
    """Return the k largest singular values, descending, with a gradient that is never NaN.

    The gradient of value i is ``u_i v_i^T``. A value that is zero up to rounding takes the
    subgradient 0.

    Args:
        matrix: Any matrix; float32 or narrower is computed in float32.
        k: How many values, at least 1; a k above ``min(N, M)`` returns all ``min(N, M)`` of them.
        method: ``exact`` is a full decomposition, ``iterative`` a block Lanczos iteration that
            touches the matrix only by products (:func:`top_k_svd`), ``auto`` takes the exact one up
            to a thin side of 512.

    Returns:
        Float32 singular values, ``[min(k, N, M)]``.

    Raises:
        InputError: If the matrix is not two-dimensional, k < 1, or the method is unknown.

    >>> import jax.numpy as jnp
    >>> singular_values(jnp.diag(jnp.array([1.0, 3.0, 2.0])), 2).tolist()
    [3.0, 2.0]
    """
    if matrix.ndim != 2:
        raise InputError(
            f"singular values: expected a matrix, got shape {matrix.shape}. "
            "Flatten it to rows first."
        )
    if k < 1:
        raise InputError(f"singular values: expected k of at least 1, got {k}. Raise k.")
    if method not in ("auto", "exact", "iterative"):
        raise InputError(
            f"singular values: expected method auto, exact or iterative, got {method!r}. "
            "Choose one of the three."
        )
    thin = min(matrix.shape)
    if thin == 0:
        return jnp.zeros((0,), jnp.promote_types(matrix.dtype, jnp.float32))
    exact = method == "exact" or (method == "auto" and thin <= EXACT_LIMIT)
    return _singular_values(as_float(matrix), min(k, thin), exact)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _singular_values(matrix: Array, k: int, exact: bool) -> Array:
    return _triplets(matrix, k, exact).s


def _singular_values_fwd(matrix: Array, k: int, exact: bool) -> tuple[Array, LeadingTriplets]:
    triplets = _triplets(matrix, k, exact)
    return triplets.s, triplets


def _singular_values_bwd(k: int, exact: bool, saved: LeadingTriplets, g: Array) -> tuple[Array]:
    del k, exact
    u, s, v = saved
    # Singular vectors of a zero value are arbitrary: including them would push the matrix in a
    # direction that depends on the library and not on the data.
    kept = jnp.where(s > zero_level(s[0], (u.shape[0], v.shape[0])), g, 0)
    return (jnp.einsum("nk,k,mk->nm", u, kept, v, precision=_HIGHEST),)


_singular_values.defvjp(_singular_values_fwd, _singular_values_bwd)


def zero_level(largest: Array, shape: tuple[int, int]) -> Array:
    """Return the size below which a computed singular value is rounding noise.

    ``max(16, sqrt(max(N, M)))`` units in the last place of the largest value: measured noise of the
    float32 decomposition stays below 10 such units up to 32,000 columns, and the usual
    ``max(N, M)`` units would swallow true values of a matrix with one dominant direction.
    """
    units = max(16.0, math.sqrt(max(shape)))
    return largest * (units * float(jnp.finfo(largest.dtype).eps))


def _triplets(matrix: Array, k: int, exact: bool) -> LeadingTriplets:
    if exact:
        u, s, vt = truncated_svd(matrix, k)
        return LeadingTriplets(u, s, vt.T)
    return top_k_svd(matrix, k)


def top_k_singular_sum(matrix: Float[Array, "N M"], k: int) -> Scalar:
    """Return the sum of the k largest singular values (the Ky Fan k-norm).

    The gradient is ``U_k V_k^T``; it needs no gap between the values inside the top k and is 0 for
    the zero matrix.

    Args:
        matrix: Any matrix; float32 or narrower is computed in float32.
        k: How many values, at least 1; above ``min(N, M)`` all are summed.

    Returns:
        Float32 scalar.

    Raises:
        InputError: As :func:`singular_values`.

    **Source:** numerator of the paper's SVD regularizer; the official code differentiates through
    a randomized decomposition with k + 5 columns instead.

    >>> import jax, jax.numpy as jnp
    >>> matrix = jnp.diag(jnp.array([1.0, 3.0, 3.0]))
    >>> float(top_k_singular_sum(matrix, 2))
    6.0
    >>> jax.grad(top_k_singular_sum)(matrix, 2).round(6).diagonal().tolist()
    [0.0, 1.0, 1.0]
    """
    return jnp.sum(singular_values(matrix, k))


def frobenius_norm(matrix: Float[Array, "N M"]) -> Scalar:
    """Return the square root of the sum of squares; its gradient at the zero matrix is 0, not NaN.

    Returns:
        Float32 scalar.

    >>> import jax.numpy as jnp
    >>> float(frobenius_norm(jnp.array([[3.0, 4.0]])))
    5.0
    """
    matrix = as_float(matrix)
    squares = jnp.sum(matrix * matrix)
    # The double where keeps sqrt away from 0, where its derivative is infinite.
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)


def top_k_svd(
    matrix: Float[Array, "N M"], k: int, *, cycles: int = krylov.CYCLES
) -> LeadingTriplets:
    """Return the k leading singular triplets, iteratively and from a fixed start.

    See :mod:`balora_jax.numerics.krylov`. A matrix whose thin side fits one basis (128 for k = 10)
    is decomposed exactly instead.
    Nothing here is meant to be differentiated; use :func:`singular_values`.

    Args:
        matrix: Any matrix; float32 or narrower is computed in float32.
        k: How many triplets, ``1 <= k <= min(N, M)``.
        cycles: Restarts of the iteration at most.

    Returns:
        Triplets ``u [N, k]``, ``s [k]``, ``v [M, k]`` in float32.

    Raises:
        InputError: If k is outside ``1..min(N, M)`` or cycles < 1.

    >>> import jax.numpy as jnp
    >>> top_k_svd(jnp.diag(jnp.arange(200.0)), 2).s.round(2).tolist()
    [199.0, 198.0]
    """
    thin = min(matrix.shape)
    if not 1 <= k <= thin:
        raise InputError(
            f"top_k_svd: expected k between 1 and {thin} for shape {matrix.shape}, "
            f"got {k}. Change k."
        )
    if cycles < 1:
        raise InputError(f"top_k_svd: expected cycles of at least 1, got {cycles}. Raise them.")
    if matrix.shape[0] < matrix.shape[1]:
        v, s, u = top_k_svd(matrix.T, k, cycles=cycles)
        return LeadingTriplets(u, s, v)
    tall, width = as_float(matrix), k + krylov.EXTRA_COLUMNS
    if width * krylov.BLOCKS >= thin:
        u, s, vt = truncated_svd(tall, k)
        return LeadingTriplets(u, s, vt.T)
    start = jax.random.normal(jax.random.key(0), (thin, width), tall.dtype)
    found = krylov.leading_triplets(krylov.operator_of(tall), start, k, cycles=cycles)
    return LeadingTriplets(found.image[:, :k], found.s[:k], found.basis[:, :k])


def truncated_svd(
    matrix: Float[Array, "N M"], rank: int
) -> tuple[Float[Array, "N r"], Float[Array, "r"], Float[Array, "r M"]]:
    """Return the leading ``rank`` singular triplets of an exact decomposition in float32.

    Args:
        matrix: Any matrix; float32 or narrower is computed in float32.
        rank: ``1 <= rank <= min(N, M)``.

    Returns:
        ``(u, s, vt)`` with shapes ``[N, rank]``, ``[rank]``, ``[rank, M]``, s descending.

    Raises:
        InputError: If rank is outside ``1..min(N, M)``.

    **Source:** the start ``pissa`` (PiSSA; peft takes the same exact float32 decomposition).

    >>> import jax.numpy as jnp
    >>> u, s, vt = truncated_svd(jnp.array([[0.0, 2.0], [1.0, 0.0], [0.0, 0.0]]), 1)
    >>> s.tolist(), abs(u[:, 0]).tolist(), abs(vt[0]).tolist()
    ([2.0], [1.0, 0.0, 0.0], [0.0, 1.0])
    """
    _check_rank("truncated_svd", matrix, rank)
    if matrix.shape[0] < matrix.shape[1]:
        # Decomposing the tall side lets every backend reduce to the thin square by QR first.
        u, s, vt = truncated_svd(matrix.T, rank)
        return vt.T, s, u.T
    tall = as_float(matrix)
    if tall.shape[0] > tall.shape[1]:
        basis, tall = jnp.linalg.qr(tall)
        u, s, vt = jnp.linalg.svd(tall, full_matrices=False)
        return product(basis, u[:, :rank]), s[:rank], vt[:rank]
    u, s, vt = jnp.linalg.svd(tall, full_matrices=False)
    return u[:, :rank], s[:rank], vt[:rank]


def randomized_svd(
    matrix: Float[Array, "N M"],
    rank: int,
    n_iter: int,
    key: PRNGKeyArray,
) -> tuple[Float[Array, "N r"], Float[Array, "r"], Float[Array, "r M"]]:
    """Return approximate leading singular triplets from a random sketch and power iterations.

    Args:
        matrix: Any matrix; float32 or narrower is computed in float32.
        rank: ``1 <= rank <= min(N, M)``.
        n_iter: Power iterations after the first sketch, each two products with a QR after both;
            0 is allowed.
        key: Random key of the sketch. Another key gives slightly other triplets.

    Returns:
        ``(u, s, vt)`` with shapes ``[N, rank]``, ``[rank]``, ``[rank, M]``, s descending, float32.

    Raises:
        InputError: If rank is outside ``1..min(N, M)``, or n_iter is negative.

    **Source:** Halko, Martinsson and Tropp (2009), algorithms 4.4 and 5.1; the start
    ``pissa_niter_N``. As in peft the sketch has exactly ``rank`` columns, no oversampling.

    >>> import jax, jax.numpy as jnp
    >>> u, s, vt = randomized_svd(jnp.diag(jnp.array([4.0, 2.0, 0.0])), 2, 4, jax.random.key(1))
    >>> s.round(4).tolist()
    [4.0, 2.0]
    """
    _check_rank("randomized_svd", matrix, rank)
    if n_iter < 0:
        raise InputError(f"randomized_svd: expected n_iter of at least 0, got {n_iter}. Raise it.")
    if matrix.shape[0] < matrix.shape[1]:
        u, s, vt = randomized_svd(matrix.T, rank, n_iter, key)
        return vt.T, s, u.T
    tall = as_float(matrix)
    sketch = product(tall, jax.random.normal(key, (tall.shape[1], rank), tall.dtype))

    def one_pass(_: Array, basis: Array) -> Array:
        right, _r = jnp.linalg.qr(product(tall.T, basis))
        left, _r = jnp.linalg.qr(product(tall, right))
        return left

    basis, _r = jnp.linalg.qr(sketch)
    basis = jax.lax.fori_loop(0, n_iter, one_pass, basis)
    # The restriction Q^T A is short and wide: decompose it from its tall side.
    u, s, vt = truncated_svd(product(basis.T, tall), rank)
    return product(basis, u), s, vt


def head_factor(embedding: Float[Array, "V D"] | np.ndarray, *, center: bool = False) -> np.ndarray:
    """Return the D x D factor R of the head with ``singular values(H W^T) = those of H R^T``.

    With ``W = Q R`` and orthonormal columns of Q, ``H W^T = (H R^T) Q^T`` has the singular values
    of ``H R^T``, which is N x D instead of N x V. Also ``||H W^T||_F = ||H R^T||_F``. Runs once, on
    the host, in float64: a Cholesky factor of ``W^T W`` in float32 would lose the small end.

    The rows are read in blocks, so the float64 copy never holds the entire head.

    Args:
        embedding: Frozen head ``[V, D]`` of any float dtype, rows are vocabulary entries.
        center: Factor ``W - mean over V`` instead. ``H`` times that is the logits minus their row
            mean, so this factor serves the option ``center_rows``.

    Returns:
        Upper triangular float32 array ``[D, D]`` with a non-negative diagonal.

    Raises:
        InputError: If the embedding is not two-dimensional or holds a value that is not finite.

    >>> import numpy as np
    >>> head_factor(np.array([[3.0], [4.0]])).tolist()
    [[5.0]]
    """
    if embedding.ndim != 2:
        raise InputError(
            f"head_factor: expected a head of shape [V, D], got {embedding.shape}. Pass lm_head's "
            "weight."
        )
    head = np.asarray(embedding)
    return head_factor_of_rows(lambda i, n: head[i : i + n], head.shape, center=center)


def head_factor_of_rows(
    rows: Callable[[int, int], np.ndarray], shape: tuple[int, ...], *, center: bool = False
) -> np.ndarray:
    """:func:`head_factor` of a head [V, D] that is handed over a block of rows at a time.

    The host holds two float64 arrays of ``max(8192, D) + D`` rows, whatever V is: 0.8 GB for
    D = 4096.

    Args:
        rows: from the first row and their number to those rows, called in order (twice with
            ``center``).
        shape: of the head.
        center: as there.

    Raises:
        InputError: If the head holds a value that is not finite.
    """
    vocabulary, width = shape
    step = max(8192, width)
    sizes = {i: min(step, vocabulary - i) for i in range(0, vocabulary, step)}
    mean = np.zeros(width)
    if center:
        sums = (rows(i, n).astype(np.float64).sum(0) for i, n in sizes.items())
        mean = sum(sums, mean) / max(vocabulary, 1)
    # The factor so far on top of the next rows, in one array that is used again and again.
    stacked = np.zeros((width + min(step, vocabulary), width))
    for i, n in sizes.items():
        np.subtract(rows(i, n), mean, out=stacked[width : width + n], dtype=np.float64)
        stacked[:width] = np.linalg.qr(stacked[: width + n], mode="r")
    factor = stacked[:width]
    if not np.isfinite(factor).all():
        raise InputError(
            "head_factor: expected a head of finite numbers, got NaN or infinity. "
            "Check the weights."
        )
    signs = np.where(np.diagonal(factor) < 0, -1.0, 1.0)
    return (signs[:, None] * factor).astype(np.float32)


def _check_rank(where: str, matrix: Array, rank: int) -> None:
    if matrix.ndim != 2 or not 1 <= rank <= min(matrix.shape):
        raise InputError(
            f"{where}: expected a matrix and a rank between 1 and its shorter side, got shape "
            f"{matrix.shape} and rank {rank}. Lower the rank."
        )
