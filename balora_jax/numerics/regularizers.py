"""What do consistency, diversity and the spectral term measure on a matrix of logits?

The six public functions are the paper's terms, one float32 scalar each, lower is better. They are
pure and jitted; keyword arguments are static. A batch without a single counted row has the value 0
and the gradient 0. Logits up to 1e4 in size are safe in float32.

The training step computes the same NLG terms from hidden states
(:mod:`balora_jax.numerics.head`); these functions are their readable reference and the NLU terms.
"""

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from balora_jax.array_types import Array, Bool, Float, Scalar
from balora_jax.errors import InputError
from balora_jax.numerics import linalg
from balora_jax.numerics.linalg import as_float

SpectralNorm = Literal["frobenius", "nuclear"]
ConsistencyForm = Literal["kl", "normalized_mse", "mse"]


@functools.partial(jax.jit, static_argnames=("temperature",))
def consistency_nlg(
    student: Float[Array, "N V"],
    teacher: Float[Array, "N V"],
    mask: Bool[Array, "N"],
    *,
    temperature: float,
) -> Scalar:
    """Return ``T² · mean over counted tokens of KL(softmax(z_T/T) ‖ softmax(z_S/T))``.

    The teacher is a constant: no gradient flows into it. Rows in which student and teacher agree
    bit for bit contribute exactly 0.

    Args:
        student: Logits of the model in training, ``[N, V]``.
        teacher: Logits of the frozen pretrained model, ``[N, V]``.
        mask: True where the token counts, ``[N]``.
        temperature: T > 0.

    Returns:
        Float32 scalar in nats, at least 0 up to rounding.

    Raises:
        InputError: If shapes do not match or the temperature is not positive.

    **Source:** current form (ICLR 2026); with T = 1 the form of arXiv v1-v5. Departure: the
    tokens that count are the caller's choice; the official code masks unshifted positions.

    >>> import jax.numpy as jnp
    >>> teacher, student = jnp.array([[0.0, 0.0]]), jnp.array([[0.0, 2.0]])
    >>> round(float(consistency_nlg(student, teacher, jnp.array([True]), temperature=2.0)), 4)
    0.4805
    """
    _check_rows("consistency_nlg", student, mask)
    _check_same("consistency_nlg", student, teacher)
    check_temperature("consistency_nlg", temperature)
    rows = kl_rows(_keep(student, mask), _keep(teacher, mask), temperature)
    return temperature**2 * _masked_mean(rows, mask)


@functools.partial(jax.jit, static_argnames=("top_k",))
def diversity_nlg(student: Float[Array, "N V"], mask: Bool[Array, "N"], *, top_k: int) -> Scalar:
    """Return minus the mean entropy of the renormalised top-K softmax over counted tokens.

    Args:
        student: Logits, ``[N, V]``.
        mask: True where the token counts, ``[N]``.
        top_k: K, the number of largest logits kept in each row; 0 keeps the entire vocabulary.
            Among equal logits at the edge the lower index is kept (``jax.lax.top_k``).

    Returns:
        Float32 scalar in nats, between ``-log K`` and 0.

    Raises:
        InputError: If shapes do not match or top_k is outside ``0..V``.

    **Source:** current form (ICLR 2026); arXiv v1-v5 is ``top_k=0``. The sign is the one that
    raises entropy when minimised; two of the official releases have the opposite one.

    >>> import jax.numpy as jnp
    >>> logits = jnp.array([[5.0, 5.0, 1.0, 0.0]])
    >>> round(float(diversity_nlg(logits, jnp.array([True]), top_k=2)), 4)
    -0.6931
    """
    _check_rows("diversity_nlg", student, mask)
    check_top_k("diversity_nlg", top_k, student.shape[1])
    return -_masked_mean(entropy_rows(_keep(student, mask), top_k), mask)


@functools.partial(jax.jit, static_argnames=("k", "norm"))
def spectral_nlg(
    student: Float[Array, "N V"], mask: Bool[Array, "N"], *, k: int, norm: SpectralNorm
) -> Scalar:
    """Return minus the share of the k largest singular values of the logits of the counted tokens.

    Args:
        student: Logits, ``[N, V]``; rows that do not count are left out (as zero rows).
        mask: True where the token counts, ``[N]``.
        k: Leading singular values summed, at least 1; above ``min(N, V)`` all of them.
        norm: What the sum is divided by: ``frobenius``, the square root of the sum of squares
            (ratio up to √k), or ``nuclear``, the sum of all singular values (ratio up to 1).

    Returns:
        Float32 scalar, between ``-√k`` or -1 and 0.

    Raises:
        InputError: If shapes do not match, k < 1, or the norm is unknown.

    **Source:** current form (ICLR 2026) with ``frobenius``; arXiv v1-v5 and the paper's text with
    ``nuclear``. Departure: the official code estimates the values with k + 5 random columns and two
    power iterations; here they are exact up to a thin side of 512 and converged above it.

    >>> import jax.numpy as jnp
    >>> logits = jnp.diag(jnp.array([3.0, 4.0, 9.0]))
    >>> counted = jnp.array([True, True, False])
    >>> round(float(spectral_nlg(logits, counted, k=1, norm="frobenius")), 4)
    -0.8
    """
    _check_rows("spectral_nlg", student, mask)
    check_spectral("spectral_nlg", k, norm)
    return -spectral_ratio(_keep(student, mask), k, norm)


@functools.partial(jax.jit, static_argnames=("temperature", "form"))
def consistency_nlu(
    student: Float[Array, "B C"],
    teacher: Float[Array, "B C"],
    *,
    temperature: float,
    form: ConsistencyForm = "kl",
) -> Scalar:
    """Return how far the class logits moved from the frozen model's, averaged over the batch.

    Args:
        student: Logits, ``[B, C]``.
        teacher: Logits of the frozen model, ``[B, C]``; a constant, no gradient flows into it.
        temperature: T > 0; only the form ``kl`` reads it.
        form: ``kl`` is ``T² · mean over rows of KL(softmax(z_T/T) ‖ softmax(z_S/T))``.
            ``normalized_mse`` scales each logit row to length 1 (a zero row stays zero) and returns
            the mean of the squared differences over all ``B · C`` entries, which is how "mean
            squared error" is read here; it lies in ``[0, 4 / C]``. ``mse`` is the mean of the
            squared differences themselves, for the one output of a regression.

    Returns:
        Float32 scalar; exactly 0 when the two are equal bit for bit.

    Raises:
        InputError: If shapes do not match, the temperature is not positive, or the form is unknown.

    **Source:** ``kl`` is the paper's form since v6, ``normalized_mse`` that of v1-v5; ``mse`` is
    this project's, as both say nothing about a single output.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[3.0, 0.0]]), jnp.array([[0.0, 5.0]])
    >>> float(consistency_nlu(student, teacher, temperature=1.0, form="normalized_mse"))
    1.0
    """
    _check_matrix("consistency_nlu", student)
    _check_same("consistency_nlu", student, teacher)
    check_temperature("consistency_nlu", temperature)
    if form not in get_args(ConsistencyForm):
        raise InputError(
            f"consistency_nlu: expected form kl, normalized_mse or mse, got {form!r}. "
            "Choose one of them."
        )
    if student.shape[0] == 0:
        return jnp.zeros((), as_float(student).dtype)
    if form == "kl":
        return temperature**2 * jnp.mean(kl_rows(student, teacher, temperature))
    student, teacher = as_float(student), jax.lax.stop_gradient(as_float(teacher))
    if form == "mse":
        return jnp.mean((student - teacher) ** 2)
    difference = _unit_rows(student) - _unit_rows(teacher)
    # Two compiled normalisations of the same row need not agree in the last bit.
    equal = jnp.all(student == teacher, axis=-1, keepdims=True)
    return jnp.mean(jnp.where(equal, 0, difference * difference))


@jax.jit
def diversity_nlu(student: Float[Array, "B C"]) -> Scalar:
    """Return ``(1/C) Σ_{i≠j} Cov_ij²``, the off-diagonal covariance of the class logits.

    The covariance is a statistic of this batch: ``Z_cᵀ Z_c / (B - 1)`` with Z minus its column
    means. One row has no covariance; its value is defined as 0 here.

    Args:
        student: Logits, ``[B, C]``.

    Returns:
        Float32 scalar, at least 0, in logits to the fourth power; 0 for one class.

    Raises:
        InputError: If the logits are not a matrix.

    **Source:** the paper's NLU diversity term, all versions.

    >>> import jax.numpy as jnp
    >>> float(diversity_nlu(jnp.array([[0.0, 0.0], [2.0, 2.0]])))
    4.0
    """
    _check_matrix("diversity_nlu", student)
    logits = as_float(student)
    rows, classes = logits.shape
    if rows < 2 or classes < 2:
        return jnp.zeros((), logits.dtype)
    centred = logits - jnp.mean(logits, axis=0, keepdims=True)
    covariance = jnp.einsum("bi,bj->ij", centred, centred, precision=jax.lax.Precision.HIGHEST)
    off_diagonal = jnp.where(jnp.eye(classes, dtype=bool), 0, covariance / (rows - 1))
    return jnp.sum(off_diagonal * off_diagonal) / classes


@functools.partial(jax.jit, static_argnames=("k", "norm"))
def spectral_nlu(student: Float[Array, "B C"], *, k: int, norm: SpectralNorm = "nuclear") -> Scalar:
    """Return minus the share of the k largest singular values of the class logits.

    With ``norm="nuclear"`` and ``k >= min(B, C)`` the value is the constant -1 and the gradient 0:
    the published k = 5 does nothing on GLUE, where C is at most 3.

    Args:
        student: Logits, ``[B, C]``.
        k: Leading singular values summed, at least 1; above ``min(B, C)`` all of them.
        norm: ``nuclear`` (published) or ``frobenius``, see :func:`spectral_nlg`.

    Returns:
        Float32 scalar.

    Raises:
        InputError: If the logits are not a matrix, k < 1, or the norm is unknown.

    **Source:** the paper's NLU SVD term, all versions.

    >>> import jax.numpy as jnp
    >>> float(spectral_nlu(jnp.diag(jnp.array([3.0, 1.0])), k=1))
    -0.75
    """
    _check_matrix("spectral_nlu", student)
    check_spectral("spectral_nlu", k, norm)
    return -spectral_ratio(student, k, norm)


def center_rows(logits: Float[Array, "N V"]) -> Float[Array, "N V"]:
    """Return the logits minus the mean of each row, in float32.

    Softmax terms ignore a constant added to a row, the spectral and the covariance term do not.
    An option of this project, off by default; the paper does not centre.

    >>> import jax.numpy as jnp
    >>> center_rows(jnp.array([[1.0, 3.0]])).tolist()
    [[-1.0, 1.0]]
    """
    logits = as_float(logits)
    return logits - jnp.mean(logits, axis=-1, keepdims=True)


def kl_rows(
    student: Float[Array, "N V"], teacher: Float[Array, "N V"], temperature: float
) -> Float[Array, "N"]:
    """Return ``KL(softmax(teacher/T) ‖ softmax(student/T))`` of each row, in nats.

    Not multiplied by T². No gradient into the teacher. Exactly 0, with gradient 0, in rows that
    agree bit for bit, however the compiler orders the sums.

    >>> import jax.numpy as jnp
    >>> kl_rows(jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 2.0]]), 2.0).tolist()
    [0.0]
    """
    student, teacher = as_float(student), jax.lax.stop_gradient(as_float(teacher))
    equal = jnp.all(student == teacher, axis=-1)
    # Subtracting each row's maximum first keeps the difference exact where both rows carry the same
    # large offset; both maxima are constants because the softmax ignores a shift.
    student, teacher = _shifted(student) / temperature, _shifted(teacher) / temperature
    weight = jnp.exp(teacher)
    teacher_total = jnp.sum(weight, axis=-1)
    student_total = jnp.sum(jnp.exp(student), axis=-1)
    cross = jnp.sum(weight * (teacher - student), axis=-1) / teacher_total
    return jnp.where(equal, 0, cross + jnp.log(student_total) - jnp.log(teacher_total))


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
    shifted = _shifted(logits) / temperature
    weight = jnp.exp(shifted)
    total = jnp.sum(weight, axis=-1)
    return jnp.log(total) - jnp.sum(weight * shifted, axis=-1) / total


def spectral_ratio(matrix: Float[Array, "N M"], k: int, norm: SpectralNorm) -> Scalar:
    """Return the sum of the k largest singular values over a norm of the matrix; 0 if it is zero.

    >>> import jax.numpy as jnp
    >>> float(spectral_ratio(jnp.eye(4), 1, "frobenius"))
    0.5
    """
    matrix = as_float(matrix)
    if min(matrix.shape) == 0:
        return jnp.zeros((), matrix.dtype)
    if norm == "nuclear":
        values = linalg.singular_values(matrix, min(matrix.shape), method="exact")
        top, size = jnp.sum(values[:k]), jnp.sum(values)
    else:
        top, size = linalg.top_k_singular_sum(matrix, k), linalg.frobenius_norm(matrix)
    positive = size > 0
    return jnp.where(positive, top / jnp.where(positive, size, 1), 0)


def check_temperature(where: str, temperature: float) -> None:
    """Raise unless the temperature is a positive number."""
    if not temperature > 0:
        raise InputError(
            f"{where}: expected a temperature above 0, got {temperature}. The published value is 2."
        )


def check_top_k(where: str, top_k: int, vocabulary: int) -> None:
    """Raise unless top_k is 0 (all) or a number of vocabulary entries."""
    if not 0 <= top_k <= vocabulary:
        raise InputError(
            f"{where}: expected top_k between 0 (all) and the {vocabulary} columns of the logits, "
            f"got {top_k}. Lower it."
        )


def check_spectral(where: str, k: int, norm: str) -> None:
    """Raise unless k is positive and the norm is one of the two."""
    if k < 1:
        raise InputError(f"{where}: expected k of at least 1, got {k}. The published value is 10.")
    if norm not in ("frobenius", "nuclear"):
        raise InputError(
            f"{where}: expected norm frobenius or nuclear, got {norm!r}. Choose one of them."
        )


def _shifted(logits: Array) -> Array:
    return logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))


def _unit_rows(logits: Array) -> Array:
    logits = as_float(logits)
    # Scaling by the largest entry first keeps the squares of 1e20 and 1e-30 inside float32.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(logits), axis=-1, keepdims=True))
    scaled = logits / jnp.where(largest > 0, largest, 1)
    squares = jnp.sum(scaled * scaled, axis=-1, keepdims=True)
    return scaled * jnp.where(squares > 0, jax.lax.rsqrt(jnp.where(squares > 0, squares, 1)), 0)


def _keep(logits: Array, mask: Array) -> Array:
    # where, not a product: a masked row may hold NaN or infinity.
    return jnp.where(mask[:, None], as_float(logits), 0)


def _masked_mean(rows: Array, mask: Array) -> Array:
    count = jnp.sum(mask, dtype=rows.dtype)
    return jnp.sum(jnp.where(mask, rows, 0)) / jnp.maximum(count, 1)


def _check_matrix(where: str, logits: Array) -> None:
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise InputError(
            f"{where}: expected logits of two axes with at least one column, got shape "
            f"{logits.shape}. Flatten batch and time into one axis of rows."
        )


def _check_rows(where: str, logits: Array, mask: Array) -> None:
    _check_matrix(where, logits)
    if mask.shape != logits.shape[:1]:
        raise InputError(
            f"{where}: expected a mask of shape {logits.shape[:1]}, one entry per row, got "
            f"{mask.shape}. Flatten the mask like the logits."
        )


def _check_same(where: str, student: Array, teacher: Array) -> None:
    if student.shape != teacher.shape:
        raise InputError(
            f"{where}: expected teacher logits of the student's shape {student.shape}, got "
            f"{teacher.shape}. Run both models on one batch and one vocabulary."
        )
