"""Schedules of the weights λ: factors of a weight over the steps of a run.

A schedule is one object in :data:`SCHEDULES`. It says what the rest of the package must know of it:
whether it depends on the length of the run (such a run cannot be lengthened later), whether it
reads ``warmup_fraction``, and whether it follows the teacher's confidence on each micro-batch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from balora_jax.array_types import Array, Scalar
from balora_jax.errors import InputError
from balora_jax.registry import Registry

COSINE_FLOOR = 0.1
"""Share of λ at the end of the cosine schedule, and the adaptive weight's default lower end."""

TWO_PHASE_SILENT = 0.2
"""Share of the steps in which ``two_phase`` keeps a term off (the official script's ratio)."""

TWO_PHASE_RAMP = 0.05
"""Share of the steps in which ``two_phase`` then raises it; at least one step."""

WARMUP_FRACTION = 0.1
"""Share of the steps that the warm-ups take where none is given: the official code's default."""

Course = Literal["any", "falls", "rises"]


@dataclass(frozen=True)
class Schedule:
    """Course of a weight λ over a run. Hashable: a static jit argument.

    Attributes:
        name: what configs call it.
        factor: ``(step, total_steps, warmup_fraction)`` → factor of λ, a float32 scalar; the step
            counts those done before this one and may be traced.
        course: ``falls`` or ``rises`` over the run; a term takes those of its own course, and
            ``any`` suits every term.
        depends_on_length: whether the factor reads ``total_steps``.
        reads_warmup: whether it reads ``warmup_fraction``.
        by_confidence: ``(low, high, mean entropy of the teacher, columns)`` → λ on a micro-batch,
            in place of ``factor``; None for schedules that do not follow the teacher.
    """

    name: str
    factor: Callable[[Array, int, float], Scalar]
    course: Course = "any"
    depends_on_length: bool = True
    reads_warmup: bool = False
    by_confidence: Callable[[float, float, Scalar, int], Scalar] | None = None


def constant(step: Array, total_steps: int, warmup_fraction: float) -> Scalar:
    """Return 1.

    >>> float(constant(jnp.float32(3), 10, 0.1))
    1.0
    """
    del step, total_steps, warmup_fraction
    return jnp.ones((), jnp.float32)


def cosine(step: Array, total_steps: int, warmup_fraction: float) -> Scalar:
    """Return the cosine decay from 1 to 0.1.

    **Source:** official 2026 code: ``0.1 + 0.9·½(1 + cos(π t/T))``.

    >>> [round(float(cosine(jnp.float32(t), 40, 0.1)), 3) for t in (0, 20, 40)]
    [1.0, 0.55, 0.1]
    """
    del warmup_fraction
    decay = 0.5 * (1 + jnp.cos(jnp.pi * step / total_steps))
    return COSINE_FLOOR + (1 - COSINE_FLOOR) * decay


def two_phase(step: Array, total_steps: int, warmup_fraction: float) -> Scalar:
    """Return 0 for a fifth of the steps, then a linear rise to 1.

    **Source:** official 2026 code: ``⌊0.2 T⌋`` steps off and a ramp of ``max(⌊0.05 T⌋, 1)`` steps.

    >>> [float(two_phase(jnp.float32(t), 40, 0.1)) for t in (8, 9, 10)]
    [0.0, 0.5, 1.0]
    """
    del warmup_fraction
    silent = _steps(TWO_PHASE_SILENT, total_steps)
    ramp = max(_steps(TWO_PHASE_RAMP, total_steps), 1)
    return jnp.clip((step - silent) / ramp, 0, 1)


def linear_warmup(step: Array, total_steps: int, warmup_fraction: float) -> Scalar:
    """Return the progress of the warm-up: 1 from ``⌊warmup_fraction·T⌋`` steps on.

    **Source:** official 2026 code.

    >>> [float(linear_warmup(jnp.float32(t), 40, 0.1)) for t in (0, 1, 4)]
    [0.0, 0.25, 1.0]
    """
    length = _steps(warmup_fraction, total_steps)
    return jnp.clip(step / length, 0, 1) if length else jnp.ones((), jnp.float32)


def quadratic_warmup(step: Array, total_steps: int, warmup_fraction: float) -> Scalar:
    """Return the square of :func:`linear_warmup`.

    **Source:** official 2026 code.

    >>> [float(quadratic_warmup(jnp.float32(t), 40, 0.1)) for t in (0, 1, 4)]
    [0.0, 0.0625, 1.0]
    """
    progress = linear_warmup(step, total_steps, warmup_fraction)
    return progress * progress


def adaptive_weight(low: float, high: float, mean_entropy: Scalar, columns: int) -> Scalar:
    """Return λ by the teacher's confidence: high where the teacher is sure, low where it is not.

    ``low + (high - low)·(1 - clamp(H / log V, 0, 1))``.

    Args:
        low: λ at an undecided teacher.
        high: λ at a certain one.
        mean_entropy: Mean entropy of the teacher's softmax over the counted rows, in nats.
        columns: V, entries of the vocabulary or classes, at least 2.

    Returns:
        Float32 scalar.

    Raises:
        InputError: If there are fewer than two columns.

    **Source:** official 2026 code.

    >>> round(float(adaptive_weight(0.1, 1.0, jnp.log(16.0) / 2, 16)), 4)
    0.55
    """
    if columns < 2:
        raise InputError(
            f"adaptive_weight: expected a vocabulary of at least 2, got {columns}. Pass V."
        )
    doubt = jnp.clip(mean_entropy / math.log(columns), 0, 1)
    return low + (high - low) * (1 - doubt)


def _steps(fraction: float, total_steps: int) -> int:
    # 0.29 * 100 is 28.999...: a product that should be whole must not lose a step to rounding.
    return math.floor(fraction * total_steps + 1e-9)


SCHEDULES: Registry[Schedule] = Registry("schedule", "regularizers")
SCHEDULES.register(Schedule("constant", constant, depends_on_length=False))
SCHEDULES.register(Schedule("cosine", cosine, "falls"))
SCHEDULES.register(
    Schedule("adaptive", constant, "falls", depends_on_length=False, by_confidence=adaptive_weight)
)
SCHEDULES.register(Schedule("two_phase", two_phase, "rises"))
SCHEDULES.register(Schedule("linear_warmup", linear_warmup, "rises", reads_warmup=True))
SCHEDULES.register(Schedule("quadratic_warmup", quadratic_warmup, "rises", reads_warmup=True))
