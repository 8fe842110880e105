"""The interface of a term of the loss: what the package asks of each, and what it does itself.

A term on logits that is a mean over rows gives :meth:`Term.rows`; one on hidden states gives
:meth:`Term.hidden_rows`. That is enough to train with text and labels, with both heads, on any
mesh. A term that couples rows, or whose derivative is cheaper by hand, overrides more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from balora_jax.array_types import Array, Bool, Float, Scalar
from balora_jax.errors import InputError
from balora_jax.numerics.arithmetic import as_float, masked, masked_mean
from balora_jax.numerics.head_types import Chunk, Head, LogitMap, Rows
from balora_jax.numerics.schedules import SCHEDULES, Course, Schedule

Variant = Literal["iclr2026", "arxiv_v1"]


class Prepared(NamedTuple):
    """Findings of a term over all rows of a micro-batch, before the pass over chunks.

    Attributes:
        value: Of a term that couples rows, over all devices.
        pieces: What its chunks need.
        statistics: What else it tells, by the names in :attr:`Term.statistics`.
    """

    value: Scalar
    pieces: Any
    statistics: dict[str, Scalar]


def setting(default: Any, says: str, *, late: bool = False) -> Any:
    """A setting of a term, a field of its dataclass: its default, and what it says.

    ``late`` settings stand behind the schedules in a config.
    """
    return field(default=default, metadata={"says": says, "late": late})


@dataclass(frozen=True)
class Term:
    """A term of the loss; its fields are its settings. Hashable: a static jit argument.

    Attributes:
        variant: the published form.
        name: config key of its weight λ, and its column in the metrics.
        title: of its curve.
        weight: λ where the config gives none.
        schedule: of λ where the config names none.
        course: the schedules that λ may follow, see :class:`Schedule`.
        variants: published forms: settings where the config gives none.
        for_labels: settings of a run on labels where the config gives none.
        reads: ``logits`` or ``hidden`` states.
        needs_teacher: whether it reads the frozen model's.
        needs_factor: whether the fused head needs the factor of a linear head for it.
        couples_rows: whether it is a value of a micro-batch, not a mean over rows.
        follows_confidence: whether its λ may follow the teacher's entropy.
        least_outputs: outputs of a labels head from which on it says anything.
        statistics: columns of the metrics that it adds for text.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    weight: ClassVar[float] = 0.0
    schedule: ClassVar[str] = "constant"
    course: ClassVar[Course] = "any"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    for_labels: ClassVar[Mapping[str, Any]] = {}
    reads: ClassVar[Literal["logits", "hidden"]] = "logits"
    needs_teacher: ClassVar[bool] = False
    needs_factor: ClassVar[bool] = False
    couples_rows: ClassVar[bool] = False
    follows_confidence: ClassVar[bool] = False
    least_outputs: ClassVar[int] = 1
    statistics: ClassVar[tuple[str, ...]] = ()

    variant: Variant = "iclr2026"

    def rows(
        self, student: Float[Array, "N V"], teacher: Float[Array, "N V"] | None
    ) -> Float[Array, "N"]:
        """The value of each row of logits, differentiable; token and class logits alike."""
        del student, teacher
        raise InputError(
            f"term {self.name}: expected a method rows, on_tokens or hidden_rows, got none. "
            "Write one of them."
        )

    def hidden_rows(
        self, student: Float[Array, "N D"], teacher: Float[Array, "N D"] | None
    ) -> Float[Array, "N"]:
        """The value of each row of final hidden states in float32, where ``reads`` is hidden."""
        return self.rows(student, teacher)

    def on_tokens(
        self,
        student: Float[Array, "N V"],
        teacher: Float[Array, "N V"] | None,
        mask: Bool[Array, "N"],
    ) -> Scalar:
        """The term on the logits of tokens: the mean over the rows that count."""
        teacher = None if teacher is None else masked(teacher, mask)
        return masked_mean(self.rows(masked(student, mask), teacher), mask)

    def on_classes(
        self, student: Float[Array, "B C"], teacher: Float[Array, "B C"] | None
    ) -> Scalar:
        """The term on the logits of classes: the mean over the batch."""
        return jnp.mean(self.rows(as_float(student), teacher))

    def prepare(self, rows: Rows, head: Head) -> Prepared | None:
        """What the fused head finds over all rows before the pass; of most terms nothing."""
        del rows, head
        return None

    def on_chunk(
        self, chunk: Chunk, prepared: Prepared | None, scale: Scalar
    ) -> tuple[Scalar | None, Float[Array, "n V"]]:
        """The sum over the counted rows of a chunk, and ``scale`` times its gradient.

        The sum is None where the term couples rows. Here by automatic derivatives of :meth:`rows`;
        columns that are split over devices are gathered, a chunk at a time.
        """
        del prepared
        student, teacher = _whole(chunk.student, chunk.axis), chunk.teacher
        if teacher is not None:
            teacher = _whole(teacher, chunk.axis)
            # Equal hidden states have equal logits; two compiled products need not agree in the
            # last bit.
            teacher = jnp.where(chunk.equal[:, None], student, teacher)
        total, pull = jax.vjp(lambda z: jnp.sum(jnp.where(chunk.mask, self.rows(z, teacher), 0)),
                              student)  # fmt: skip
        (gradient,) = pull(jnp.ones((), total.dtype))
        return total, scale * _own(gradient, chunk.student.shape[1], chunk.axis)

    def by_hidden(
        self, chunk: Chunk, prepared: Prepared | None, scale: Scalar
    ) -> Float[Array, "n D"] | None:
        """A chunk's own share of the gradient with respect to the hidden states, or None."""
        del chunk, prepared, scale
        return None

    @property
    def centers_factor(self) -> bool:
        """Whether the factor that it needs is that of the centred head."""
        return False

    @property
    def confidence_temperature(self) -> float:
        """Temperature of the teacher's softmax whose entropy an adaptive λ follows."""
        return 1.0

    def adaptive_range(self, weight: float) -> tuple[float, float]:
        """Lower and upper end of a λ that follows the teacher's confidence."""
        return 0.0, weight

    def check(self, weight: float, schedule: Schedule) -> None:
        """Raises InputError where a setting is out of range."""
        del weight, schedule

    def check_head(
        self, where: str, columns: int, logit_map: LogitMap | None, *, trains: bool = False
    ) -> None:
        """Raises InputError where a head does not suit the term; no ``logit_map`` for the plain."""
        del where, columns, logit_map, trains

    def remarks(self, rows: int, outputs: int) -> list[str]:
        """What a reader should know of the term on batches of rows with labels."""
        del rows, outputs
        return []


def schedules_of(term: Term) -> tuple[Schedule, ...]:
    """The schedules that a term's λ may follow.

    >>> class Moved(Term):
    ...     name, title = "moved", "how far"
    >>> [schedule.name for schedule in schedules_of(Moved())][:3]
    ['constant', 'cosine', 'two_phase']
    """
    return tuple(
        schedule
        for schedule in SCHEDULES.values()
        if "any" in (term.course, schedule.course) or term.course == schedule.course
        if term.follows_confidence or schedule.by_confidence is None
    )


def names_of(schedules: Sequence[Schedule]) -> list[str]:
    """What configs call them."""
    return [schedule.name for schedule in schedules]


def check_matrix(where: str, logits: Array) -> None:
    """Raise unless logits are a matrix with columns."""
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise InputError(
            f"{where}: expected logits of two axes with at least one column, got shape "
            f"{logits.shape}. Flatten batch and time into one axis of rows."
        )


def check_rows(where: str, logits: Array, mask: Array) -> None:
    """Raise unless logits are a matrix with one entry of the mask per row."""
    check_matrix(where, logits)
    if mask.shape != logits.shape[:1]:
        raise InputError(
            f"{where}: expected a mask of shape {logits.shape[:1]}, one entry per row, got "
            f"{mask.shape}. Flatten the mask like the logits."
        )


def check_same(where: str, student: Array, teacher: Array) -> None:
    """Raise unless both models' logits have one shape."""
    if student.shape != teacher.shape:
        raise InputError(
            f"{where}: expected teacher logits of the student's shape {student.shape}, got "
            f"{teacher.shape}. Run both models on one batch and one vocabulary."
        )


def _whole(logits: Array, axis: str | None) -> Array:
    return logits if axis is None else jax.lax.all_gather(logits, axis, axis=1, tiled=True)


def _own(gradient: Array, columns: int, axis: str | None) -> Array:
    if axis is None:
        return gradient
    first = jax.lax.axis_index(axis) * columns
    return jax.lax.dynamic_slice_in_dim(gradient, first, columns, axis=1)
