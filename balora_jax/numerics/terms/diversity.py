"""Diversity: the spread of what the model says.

On tokens the entropy of the K most likely ones, raised; on classes the covariance between their
logits, lowered.
"""

import functools
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from balora_jax.array_types import Array, Bool, Float, Scalar
from balora_jax.errors import InputError
from balora_jax.numerics import top_k as largest_entries
from balora_jax.numerics.arithmetic import as_float, masked, masked_mean
from balora_jax.numerics.head_types import Chunk, LogitMap
from balora_jax.numerics.schedules import Course, Schedule
from balora_jax.numerics.softmax import entropy as entropy_of
from balora_jax.numerics.softmax import entropy_rows, softmax_of
from balora_jax.numerics.terms.term import Prepared, Term, check_matrix, check_rows, setting


@dataclass(frozen=True)
class Diversity(Term):
    """Minus the entropy of the K most likely tokens. **Source:** the paper, both versions."""

    name: ClassVar[str] = "diversity"
    title: ClassVar[str] = "diversity: minus entropy (nats)"
    weight: ClassVar[float] = 0.005
    schedule: ClassVar[str] = "two_phase"
    course: ClassVar[Course] = "rises"
    variants: ClassVar = {"iclr2026": {"top_k": 20}, "arxiv_v1": {"top_k": 0}}
    least_outputs: ClassVar[int] = 2  # one column has no other to vary with

    top_k: int = setting(
        20, "entries whose entropy the diversity term raises; 0 for the full vocabulary."
    )

    def on_tokens(
        self,
        student: Float[Array, "N V"],
        teacher: Float[Array, "N V"] | None,
        mask: Bool[Array, "N"],
    ) -> Scalar:
        """:func:`diversity_nlg`."""
        del teacher
        return diversity_nlg(student, mask, top_k=self.top_k)

    def on_classes(
        self, student: Float[Array, "B C"], teacher: Float[Array, "B C"] | None
    ) -> Scalar:
        """:func:`diversity_nlu`."""
        del teacher
        return diversity_nlu(student)

    def on_chunk(
        self, chunk: Chunk, prepared: Prepared | None, scale: Scalar
    ) -> tuple[Scalar, Float[Array, "n V"]]:
        """The sum of minus the entropy, and ``scale · p (log p + entropy)`` on the K kept."""
        del prepared
        student, axis = chunk.student, chunk.axis
        vocabulary = student.shape[1] * (1 if axis is None else jax.lax.axis_size(axis))
        factor = jnp.where(chunk.mask, scale, 0)[:, None]
        if not 0 < self.top_k < vocabulary:
            entropy = entropy_of(chunk.softmax, axis)
            inner = chunk.softmax.log_p + entropy[:, None]
            gradient = factor * chunk.softmax.probability * inner
            return -jnp.sum(jnp.where(chunk.mask, entropy, 0)), gradient
        found = largest_entries.largest(student, self.top_k, axis)
        best = softmax_of(found.values, 1.0, None)
        entropy = entropy_of(best, None)
        # log p of any entry among the K best; the first of them is the row's maximum.
        log_p = student - found.values[:, :1] - best.log_total
        inner = jnp.exp(log_p) * (log_p + entropy[:, None])
        gradient = factor * jnp.where(largest_entries.chosen(student, found, axis), inner, 0)
        return -jnp.sum(jnp.where(chunk.mask, entropy, 0)), gradient

    def check(self, weight: float, schedule: Schedule) -> None:
        """The number of entries kept."""
        del weight, schedule
        if self.top_k < 0:
            raise InputError(
                f"regularizers.top_k: expected at least 0 (0 is the entire vocabulary), "
                f"got {self.top_k}. The published value is 20."
            )

    def check_head(
        self, where: str, columns: int, logit_map: LogitMap | None, *, trains: bool = False
    ) -> None:
        """That the vocabulary has as many entries."""
        del logit_map, trains
        check_top_k(where, self.top_k, columns)


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
    check_rows("diversity_nlg", student, mask)
    check_top_k("diversity_nlg", top_k, student.shape[1])
    return -masked_mean(entropy_rows(masked(student, mask), top_k), mask)


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
    check_matrix("diversity_nlu", student)
    logits = as_float(student)
    rows, classes = logits.shape
    if rows < 2 or classes < 2:
        return jnp.zeros((), logits.dtype)
    centred = logits - jnp.mean(logits, axis=0, keepdims=True)
    covariance = jnp.einsum("bi,bj->ij", centred, centred, precision=jax.lax.Precision.HIGHEST)
    off_diagonal = jnp.where(jnp.eye(classes, dtype=bool), 0, covariance / (rows - 1))
    return jnp.sum(off_diagonal * off_diagonal) / classes


def check_top_k(where: str, top_k: int, vocabulary: int) -> None:
    """Raise unless top_k is 0 (all) or a number of vocabulary entries."""
    if not 0 <= top_k <= vocabulary:
        raise InputError(
            f"{where}: expected top_k between 0 (all) and the {vocabulary} columns of the logits, "
            f"got {top_k}. Lower it."
        )
