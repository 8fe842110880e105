"""Consistency: how far the model moved from the frozen one, by what it says.

On tokens the KL divergence to the teacher's softmax at temperature T; on classes the same, or
squared differences. The chunk form needs two softmaxes and no derivative of either.
"""

import functools
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import jax
import jax.numpy as jnp

from balora_jax.array_types import Array, Bool, Float, Scalar
from balora_jax.errors import InputError
from balora_jax.numerics.arithmetic import as_float, masked, masked_mean
from balora_jax.numerics.head_types import Chunk, LogitMap
from balora_jax.numerics.schedules import COSINE_FLOOR, Course, Schedule
from balora_jax.numerics.softmax import below_their_maximum, row_sum, softmax_of
from balora_jax.numerics.terms.term import (
    Prepared,
    Term,
    check_matrix,
    check_rows,
    check_same,
    setting,
)

ConsistencyForm = Literal["kl", "normalized_mse", "mse"]


@dataclass(frozen=True)
class Consistency(Term):
    """KL divergence to the frozen model. **Source:** the paper, both versions."""

    name: ClassVar[str] = "consistency"
    title: ClassVar[str] = "consistency: T² KL to the teacher"
    weight: ClassVar[float] = 0.025
    schedule: ClassVar[str] = "cosine"
    course: ClassVar[Course] = "falls"
    variants: ClassVar = {"iclr2026": {"temperature": 2.0}, "arxiv_v1": {"temperature": 1.0}}
    needs_teacher: ClassVar[bool] = True
    follows_confidence: ClassVar[bool] = True

    temperature: float = setting(2.0, "T of the consistency term.")
    adaptive_min: float | None = setting(
        None, "lower end of an ``adaptive`` λ1; 0.1 λ1 where not given.", late=True
    )
    adaptive_max: float | None = setting(
        None, "upper end of an ``adaptive`` λ1; λ1 where not given.", late=True
    )

    def on_tokens(
        self,
        student: Float[Array, "N V"],
        teacher: Float[Array, "N V"] | None,
        mask: Bool[Array, "N"],
    ) -> Scalar:
        """:func:`consistency_nlg`."""
        assert teacher is not None
        return consistency_nlg(student, teacher, mask, temperature=self.temperature)

    def on_classes(
        self, student: Float[Array, "B C"], teacher: Float[Array, "B C"] | None
    ) -> Scalar:
        """:func:`consistency_nlu` in the variant's form."""
        assert teacher is not None
        form = consistency_form(self.variant, student.shape[1])
        return consistency_nlu(student, teacher, temperature=self.temperature, form=form)

    def on_chunk(
        self, chunk: Chunk, prepared: Prepared | None, scale: Scalar
    ) -> tuple[Scalar, Float[Array, "n V"]]:
        """The sum of ``T² · KL``, and ``scale · T · (p_S - p_T)``."""
        del prepared
        assert chunk.teacher is not None
        s, t = (softmax_of(z, self.temperature, chunk.axis) for z in (chunk.student, chunk.teacher))
        # Formed once and kept for both uses: the CPU compiler would rather keep three other arrays.
        p = jax.lax.optimization_barrier(t.probability)
        moved = (chunk.teacher - chunk.student) - (t.largest - s.largest)
        mean_moved = row_sum(p * moved, chunk.axis) / self.temperature
        divergence = mean_moved + s.log_total[:, 0] - t.log_total[:, 0]
        counted = chunk.mask & ~chunk.equal
        value = self.temperature**2 * jnp.sum(jnp.where(counted, divergence, 0))
        factor = jnp.where(counted, self.temperature * scale, 0)[:, None]
        return value, factor * (s.probability - p)

    @property
    def confidence_temperature(self) -> float:
        """T of the divergence."""
        return self.temperature

    def adaptive_range(self, weight: float) -> tuple[float, float]:
        """``adaptive_min`` and ``adaptive_max``, defaults filled in."""
        low = COSINE_FLOOR * weight if self.adaptive_min is None else self.adaptive_min
        return low, weight if self.adaptive_max is None else self.adaptive_max

    def check(self, weight: float, schedule: Schedule) -> None:
        """The temperature, and the range of an adaptive weight."""
        check_temperature("regularizers.temperature", self.temperature)
        given = self.adaptive_min is not None or self.adaptive_max is not None
        if given and schedule.by_confidence is None:
            raise InputError(
                "regularizers.adaptive_min, adaptive_max: expected consistency_schedule "
                f"adaptive, got {schedule.name}. Remove the two or change the schedule."
            )
        low, high = self.adaptive_range(weight)
        if not 0 <= low <= high:
            raise InputError(
                "regularizers.adaptive_min, adaptive_max: expected 0 <= adaptive_min <= "
                f"adaptive_max, got {low} and {high}. Swap or raise them."
            )

    def check_head(
        self, where: str, columns: int, logit_map: LogitMap | None, *, trains: bool = False
    ) -> None:
        """The temperature."""
        del columns, logit_map, trains
        check_temperature(where, self.temperature)

    def remarks(self, rows: int, outputs: int) -> list[str]:
        """The form for a single output."""
        del rows
        if outputs > 1:
            return []
        return ["note: consistency with one output is the mean squared difference of the scores."]


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
    check_rows("consistency_nlg", student, mask)
    check_same("consistency_nlg", student, teacher)
    check_temperature("consistency_nlg", temperature)
    rows = kl_rows(masked(student, mask), masked(teacher, mask), temperature)
    return temperature**2 * masked_mean(rows, mask)


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
    check_matrix("consistency_nlu", student)
    check_same("consistency_nlu", student, teacher)
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


def consistency_form(variant: str, outputs: int) -> ConsistencyForm:
    """The published form of the term on classes; with one output plain squared differences.

    A softmax over one column is 1 whatever the logit, and a row of one number scaled to length 1
    keeps its sign only, so for a regression both published forms say nothing.
    """
    if outputs == 1:
        return "mse"
    return "normalized_mse" if variant == "arxiv_v1" else "kl"


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
    student, teacher = (below_their_maximum(z) / temperature for z in (student, teacher))
    weight = jnp.exp(teacher)
    teacher_total = jnp.sum(weight, axis=-1)
    student_total = jnp.sum(jnp.exp(student), axis=-1)
    cross = jnp.sum(weight * (teacher - student), axis=-1) / teacher_total
    return jnp.where(equal, 0, cross + jnp.log(student_total) - jnp.log(teacher_total))


def check_temperature(where: str, temperature: float) -> None:
    """Raise unless the temperature is a positive number."""
    if not temperature > 0:
        raise InputError(
            f"{where}: expected a temperature above 0, got {temperature}. The published value is 2."
        )


def _unit_rows(logits: Array) -> Array:
    logits = as_float(logits)
    # Scaling by the largest entry first keeps the squares of 1e20 and 1e-30 inside float32.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(logits), axis=-1, keepdims=True))
    scaled = logits / jnp.where(largest > 0, largest, 1)
    squares = jnp.sum(scaled * scaled, axis=-1, keepdims=True)
    return scaled * jnp.where(squares > 0, jax.lax.rsqrt(jnp.where(squares > 0, squares, 1)), 0)
