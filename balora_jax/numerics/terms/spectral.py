"""The spectral term: the share of the leading singular values of the logits, raised.

It couples rows: its value is a statistic of the micro-batch, over all devices. The fused head finds
value and gradient in the width of the model before the pass (:mod:`balora_jax.numerics.ratio`), or
under a soft cap from products with the logits, which are formed again each time.
"""

import functools
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from balora_jax.array_types import Array, Bool, Float, Scalar
from balora_jax.errors import InputError
from balora_jax.numerics import linalg, ratio
from balora_jax.numerics.arithmetic import as_float, einsum, masked, sum_over, wide
from balora_jax.numerics.head_types import Chunk, Chunks, Head, LogitMap, Rows, take
from balora_jax.numerics.ratio import SpectralGradient, SpectralNorm
from balora_jax.numerics.schedules import Course, Schedule
from balora_jax.numerics.terms.term import Prepared, Term, check_matrix, check_rows, setting


@dataclass(frozen=True)
class Spectral(Term):
    """Minus the ratio of singular values. **Source:** the paper, both versions."""

    name: ClassVar[str] = "spectral"
    title: ClassVar[str] = "spectral: minus ratio of singular values"
    weight: ClassVar[float] = 0.005
    schedule: ClassVar[str] = "two_phase"
    course: ClassVar[Course] = "rises"
    variants: ClassVar = {"iclr2026": {"norm": "frobenius"}, "arxiv_v1": {"norm": "nuclear"}}
    for_labels: ClassVar = {"norm": "nuclear"}
    needs_factor: ClassVar[bool] = True
    couples_rows: ClassVar[bool] = True
    least_outputs: ClassVar[int] = 2  # the only singular value is its own sum
    statistics: ClassVar[tuple[str, ...]] = ("spectral_residual",)

    k: int = setting(10, "singular values in the spectral term.")
    norm: SpectralNorm = setting("frobenius", "denominator of the spectral ratio.")
    center_rows: bool = setting(
        False, "subtract each logit row's mean before the spectral term.", late=True
    )

    def on_tokens(
        self,
        student: Float[Array, "N V"],
        teacher: Float[Array, "N V"] | None,
        mask: Bool[Array, "N"],
    ) -> Scalar:
        """:func:`spectral_nlg`."""
        del teacher
        matrix = center_rows(student) if self.center_rows else student
        return spectral_nlg(matrix, mask, k=self.k, norm=self.norm)

    def on_classes(
        self, student: Float[Array, "B C"], teacher: Float[Array, "B C"] | None
    ) -> Scalar:
        """:func:`spectral_nlu`."""
        del teacher
        matrix = center_rows(student) if self.center_rows else student
        return spectral_nlu(matrix, k=self.k, norm=self.norm)

    @property
    def centers_factor(self) -> bool:
        """``center_rows``: centring is linear in the hidden states too."""
        return self.center_rows

    def prepare(self, rows: Rows, head: Head) -> Prepared:
        """The value, and the pieces of the gradient."""
        if head.linear:
            assert head.factor is not None
            hidden = jnp.where(rows.term_mask[:, None], rows.student, 0)
            found = ratio.from_width(hidden, head.factor, self.k, self.norm, head.axes.rows)
        else:
            found = _from_capped_logits(rows, head, self)
        return Prepared(found.value, found, {"spectral_residual": found.residual})

    def on_chunk(
        self, chunk: Chunk, prepared: Prepared | None, scale: Scalar
    ) -> tuple[None, Float[Array, "n V"]]:
        """``scale · shrink · Z``, and where logits are not linear the low-rank part too."""
        found = _pieces(prepared)
        axis = chunk.axis
        matrix = _centred(chunk.student, axis) if self.center_rows else chunk.student
        more = jnp.where(chunk.mask[:, None], scale * found.shrink * matrix, 0)
        if not chunk.linear:
            low_rank = einsum("nk,vk->nv", _left(chunk, found, scale), found.right)
            more = more + (_centred(low_rank, axis) if self.center_rows else low_rank)
        return None, more

    def by_hidden(
        self, chunk: Chunk, prepared: Prepared | None, scale: Scalar
    ) -> Float[Array, "n D"] | None:
        """The low-rank part, which is in the width of the model where logits are linear."""
        found = _pieces(prepared)
        if not chunk.linear:
            return None
        return einsum("nk,dk->nd", _left(chunk, found, scale), found.right)

    def check(self, weight: float, schedule: Schedule) -> None:
        """The number of singular values and the denominator."""
        del weight, schedule
        check_spectral("regularizers.spectral term", self.k, self.norm)

    def check_head(
        self, where: str, columns: int, logit_map: LogitMap | None, *, trains: bool = False
    ) -> None:
        """The settings, and that only the leading singular values of whole logits are wanted."""
        del columns
        whole = logit_map is not None and (trains or logit_map.soft_cap is not None)
        if whole and self.norm == "nuclear":
            raise InputError(
                f"{where}: expected norm frobenius where logits have a soft cap or the head "
                "trains, got nuclear, which needs all singular values of [N, V]. Change the norm, "
                "or set training.head to plain."
            )
        check_spectral(where, self.k, self.norm)

    def remarks(self, rows: int, outputs: int) -> list[str]:
        """A warning where the nuclear ratio takes in every singular value of a batch."""
        # Rows less their mean lie in a space of one dimension less.
        most = min(rows, outputs - 1 if self.center_rows else outputs)
        if self.norm != "nuclear" or self.k < most:
            return []
        advice = {1: "Set regularizers.spectral to 0.", 2: "Use k = 1."}
        centred = " with regularizers.center_rows" if self.center_rows else ""
        return [
            f"warning: regularizers.k = {self.k} takes all {most} singular values of a batch of "
            f"{rows} rows and {outputs} classes{centred}: the spectral term is the constant -1 and "
            f"has no gradient. {advice.get(most, f'Use k below {most}.')}"
        ]


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
    check_rows("spectral_nlg", student, mask)
    check_spectral("spectral_nlg", k, norm)
    return -spectral_ratio(masked(student, mask), k, norm)


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
    check_matrix("spectral_nlu", student)
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


def check_spectral(where: str, k: int, norm: str) -> None:
    """Raise unless k is positive and the norm is one of the two."""
    if k < 1:
        raise InputError(f"{where}: expected k of at least 1, got {k}. The published value is 10.")
    if norm not in ("frobenius", "nuclear"):
        raise InputError(
            f"{where}: expected norm frobenius or nuclear, got {norm!r}. Choose one of them."
        )


def _from_capped_logits(rows: Rows, head: Head, term: Spectral) -> SpectralGradient:
    """The term where logits are not linear: products with a Z that is formed again each time."""
    plan, axes = Chunks.of(rows.term_mask, head.chunk), head.axes
    dtype, count = wide(rows.student), rows.student.shape[0]

    def part(index: Array) -> tuple[Array, Array, Array]:
        taken, counted = plan.rows(index)
        logits = head.logits(take(rows.student, taken, counted))
        if term.center_rows:
            logits = _centred(logits, axes.vocabulary)
        return logits, taken, counted

    def apply(x: Array) -> Array:
        def add(index: Array, images: Array) -> Array:
            image = einsum("nv,vw->nw", part(index)[0], x)
            return jax.lax.dynamic_update_slice_in_dim(images, image, index * plan.size, 0)

        places = jnp.zeros((plan.order.shape[0], x.shape[1]), dtype)
        images = plan.put_back(jax.lax.fori_loop(0, plan.count, add, places))
        return images if axes.vocabulary is None else jax.lax.psum(images, axes.vocabulary)

    def transpose(y: Array) -> Array:
        def add(index: Array, total: Array) -> Array:
            logits, taken, counted = part(index)
            return total + einsum("nv,nw->vw", logits, take(y, taken, counted))

        first = jnp.zeros((head.embedding.shape[0], y.shape[1]), dtype)
        return sum_over(jax.lax.fori_loop(0, plan.count, add, first), axes.rows)

    def add_squares(index: Array, total: Array) -> Array:
        return total + jnp.sum(part(index)[0] ** 2)

    squares = jax.lax.fori_loop(0, plan.count, add_squares, jnp.zeros((), dtype))
    columns = () if axes.vocabulary is None else (axes.vocabulary,)
    return ratio.from_products(
        apply,
        transpose,
        sum_over(squares, axes.rows + columns),
        (count, head.embedding.shape[0]),
        term.k,
        row_axes=axes.rows,
        column_axes=columns,
    )


def _pieces(prepared: Prepared | None) -> SpectralGradient:
    assert prepared is not None
    return prepared.pieces


def _left(chunk: Chunk, found: SpectralGradient, scale: Scalar) -> Array:
    return scale * take(found.left, chunk.taken, chunk.mask)


def _centred(logits: Array, axis: str | None) -> Array:
    mean = jnp.mean(logits, axis=1, keepdims=True)
    return logits - (mean if axis is None else jax.lax.pmean(mean, axis))
