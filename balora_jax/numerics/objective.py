"""How do the terms become one loss: which weights, on which schedule, divided by what?

``L = L_task + λ1·L_consistency + λ2·L_diversity + λ3·L_spectral``. The objective is a static
description; the weights are functions of the optimizer step, and :func:`scales` turns them into the
factor of each sum of a micro-batch in the global loss.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import jax.numpy as jnp

from balora_jax.array_types import Array, Int, Scalar
from balora_jax.errors import InputError
from balora_jax.numerics import regularizers
from balora_jax.numerics.head_pass import HeadTerms
from balora_jax.numerics.logit_terms import TermScales, TermSpec
from balora_jax.numerics.regularizers import SpectralNorm

Variant = Literal["iclr2026", "arxiv_v1"]
ConsistencySchedule = Literal["constant", "cosine", "adaptive"]
FocusSchedule = Literal["constant", "two_phase", "linear_warmup", "quadratic_warmup"]
MaskAlignment = Literal["shifted", "official"]

COSINE_FLOOR = 0.1
"""Share of λ1 at the end of the cosine schedule, and the adaptive weight's default lower end."""

TWO_PHASE_SILENT = 0.2
"""Share of the steps in which ``two_phase`` keeps a term off (the official script's ratio)."""

TWO_PHASE_RAMP = 0.05
"""Share of the steps in which ``two_phase`` then raises it; at least one step."""

_VARIANTS: dict[str, tuple[float, int, SpectralNorm]] = {
    "iclr2026": (2.0, 20, "frobenius"),
    "arxiv_v1": (1.0, 0, "nuclear"),
}


@dataclass(frozen=True)
class Objective:
    """The weights, forms and schedules of the three terms. Hashable: a static jit argument.

    ``temperature``, ``top_k`` and ``norm`` left at None take the variant's values and hold them
    after construction: 2.0, 20, frobenius for ``iclr2026`` and 1.0, 0, nuclear for ``arxiv_v1``.

    Attributes:
        variant: ``iclr2026`` is the camera-ready form. ``arxiv_v1`` is the form of v1-v5, which
            fixes temperature 1, the full-vocabulary entropy and the nuclear ratio.
        consistency: λ1, at least 0; 0 removes the term and the teacher.
        diversity: λ2, at least 0; 0 removes the term.
        spectral: λ3, at least 0; 0 removes the term.
        temperature: T > 0 of the consistency term.
        top_k: K of the diversity term; 0 is the entire vocabulary.
        k: Leading singular values of the spectral term.
        norm: Denominator of the spectral term.
        consistency_schedule: ``constant``; ``cosine`` from λ1 to 0.1·λ1; ``adaptive`` by the
            teacher's confidence on each micro-batch.
        diversity_schedule: ``constant``; ``two_phase``, 0 for 20 % of the steps then a linear rise
            over 5 %; ``linear_warmup`` or ``quadratic_warmup`` over ``warmup_fraction``.
        spectral_schedule: The same choices for λ3.
        adaptive_min: Weight at an undecided teacher; None is 0.1·λ1.
        adaptive_max: Weight at a certain teacher; None is λ1.
        mask_alignment: ``shifted`` puts the terms on the positions of the cross-entropy;
            ``official`` on the unshifted positions of the authors' code. Read where masks are made.
        center_rows: Subtract each logit row's mean before the singular values.
        warmup_fraction: Share of the steps that the two warm-ups take, in ``[0, 1]``; 0.1 is the
            official code's default.

    Raises:
        InputError: If a value is out of range, unknown, or contradicts the variant.

    **Source:** paper (ICLR 2026) and official 2026 code; the official code has one schedule for λ2
    and λ3, here each has its own.

    >>> Objective(variant="arxiv_v1", consistency=1e-4).term_spec.norm
    'nuclear'
    """

    variant: Variant = "iclr2026"
    consistency: float = 0.0
    diversity: float = 0.0
    spectral: float = 0.0
    temperature: float | None = None
    top_k: int | None = None
    k: int = 10
    norm: SpectralNorm | None = None
    consistency_schedule: ConsistencySchedule = "constant"
    diversity_schedule: FocusSchedule = "constant"
    spectral_schedule: FocusSchedule = "constant"
    adaptive_min: float | None = None
    adaptive_max: float | None = None
    mask_alignment: MaskAlignment = "shifted"
    center_rows: bool = False
    warmup_fraction: float = 0.1

    def __post_init__(self) -> None:
        self._check_choices()
        for name, form in zip(
            ("temperature", "top_k", "norm"), _VARIANTS[self.variant], strict=True
        ):
            given = getattr(self, name)
            if given is None:
                object.__setattr__(self, name, form)
            elif self.variant == "arxiv_v1" and given != form:
                raise InputError(
                    f"regularizers.{name}: expected {form} for variant arxiv_v1, got {given}. "
                    "Leave it out or use variant iclr2026."
                )
        self._check_numbers()
        self._check_adaptive()

    def _check_choices(self) -> None:
        choices = {
            "variant": Variant,
            "consistency_schedule": ConsistencySchedule,
            "diversity_schedule": FocusSchedule,
            "spectral_schedule": FocusSchedule,
            "mask_alignment": MaskAlignment,
        }
        for name, literal in choices.items():
            if getattr(self, name) not in get_args(literal):
                raise InputError(
                    f"regularizers.{name}: expected one of {', '.join(get_args(literal))}, "
                    f"got {getattr(self, name)!r}. Choose one of them."
                )

    def _check_numbers(self) -> None:
        for name in ("consistency", "diversity", "spectral"):
            weight = getattr(self, name)
            if not (weight >= 0 and math.isfinite(weight)):
                raise InputError(
                    f"regularizers.{name}: expected a weight of at least 0, got {weight}. "
                    "Use 0 to switch the term off."
                )
        if not 0 <= self.warmup_fraction <= 1:
            raise InputError(
                "regularizers.warmup_fraction: expected a share of the steps between 0 and 1, "
                f"got {self.warmup_fraction}. The official default is 0.1."
            )
        spec = self.term_spec
        regularizers.check_temperature("regularizers.temperature", spec.temperature)
        regularizers.check_spectral("regularizers.spectral term", spec.k, spec.norm)
        if spec.top_k < 0:
            raise InputError(
                f"regularizers.top_k: expected at least 0 (0 is the entire vocabulary), "
                f"got {spec.top_k}. The published value is 20."
            )

    def _check_adaptive(self) -> None:
        given = self.adaptive_min is not None or self.adaptive_max is not None
        if given and self.consistency_schedule != "adaptive":
            raise InputError(
                "regularizers.adaptive_min, adaptive_max: expected consistency_schedule "
                f"adaptive, got {self.consistency_schedule}. Remove the two or change the schedule."
            )
        low, high = self.adaptive_range
        if not 0 <= low <= high:
            raise InputError(
                "regularizers.adaptive_min, adaptive_max: expected 0 <= adaptive_min <= "
                f"adaptive_max, got {low} and {high}. Swap or raise them."
            )

    @property
    def adaptive_range(self) -> tuple[float, float]:
        """Lower and upper end of the adaptive consistency weight, defaults filled in."""
        low = COSINE_FLOOR * self.consistency if self.adaptive_min is None else self.adaptive_min
        return low, self.consistency if self.adaptive_max is None else self.adaptive_max

    @property
    def needs_teacher(self) -> bool:
        """Whether a step has to run the frozen model."""
        return self.consistency > 0

    @property
    def term_spec(self) -> TermSpec:
        """Static settings for the head; a term with weight 0 is not computed."""
        temperature, top_k, norm = _VARIANTS[self.variant]
        return TermSpec(
            consistency=self.consistency > 0,
            diversity=self.diversity > 0,
            spectral=self.spectral > 0,
            temperature=temperature if self.temperature is None else self.temperature,
            top_k=top_k if self.top_k is None else self.top_k,
            k=self.k,
            norm=norm if self.norm is None else self.norm,
            center_rows=self.center_rows,
            teacher_entropy=self.consistency > 0 and self.consistency_schedule == "adaptive",
        )


def weights(
    objective: Objective, step: int | Int[Array, ""], total_steps: int
) -> tuple[Scalar, Scalar, Scalar]:
    """Return λ1, λ2, λ3 at an optimizer step, as float32 scalars.

    A weight of 0 stays 0. The adaptive λ1 depends on the micro-batch: here it is the plain λ1, and
    :func:`adaptive_weight` gives the value that takes its place.

    Args:
        objective: The description.
        step: Optimizer steps done before this one, 0 in the first; may be traced.
        total_steps: Optimizer steps of the entire run, at least 1.

    Raises:
        InputError: If total_steps < 1.

    **Source:** official 2026 code: cosine ``0.1·λ1 + 0.9·λ1·½(1 + cos(π t/T))``; ``two_phase`` with
    ``⌊0.2 T⌋`` steps off and a ramp of ``max(⌊0.05 T⌋, 1)`` steps; the warm-ups reach 1 at
    ``⌊warmup_fraction·T⌋`` steps (at once if that is 0) with the progress or its square.

    >>> objective = Objective(consistency=1.0, diversity=2.0, consistency_schedule="cosine",
    ...                       diversity_schedule="two_phase")
    >>> [tuple(round(float(w), 3) for w in weights(objective, t, 40)) for t in (0, 9, 20)]
    [(1.0, 0.0, 0.0), (0.892, 1.0, 0.0), (0.55, 2.0, 0.0)]
    """
    if total_steps < 1:
        raise InputError(
            f"weights: expected total_steps of at least 1, got {total_steps}. Train more."
        )
    t = jnp.asarray(step, jnp.float32)
    first = jnp.float32(objective.consistency)
    if objective.consistency_schedule == "cosine":
        decay = 0.5 * (1 + jnp.cos(jnp.pi * t / total_steps))
        first = first * (COSINE_FLOOR + (1 - COSINE_FLOOR) * decay)
    factors = [
        _focus_factor(schedule, t, total_steps, objective.warmup_fraction)
        for schedule in (objective.diversity_schedule, objective.spectral_schedule)
    ]
    return first, objective.diversity * factors[0], objective.spectral * factors[1]


def _focus_factor(schedule: str, t: Array, total_steps: int, warmup_fraction: float) -> Array:
    if schedule == "constant":
        return jnp.ones((), jnp.float32)
    if schedule == "two_phase":
        silent = _steps(TWO_PHASE_SILENT, total_steps)
        ramp = max(_steps(TWO_PHASE_RAMP, total_steps), 1)
        return jnp.clip((t - silent) / ramp, 0, 1)
    length = _steps(warmup_fraction, total_steps)
    progress = jnp.clip(t / length, 0, 1) if length else jnp.ones((), jnp.float32)
    return progress if schedule == "linear_warmup" else progress * progress


def _steps(fraction: float, total_steps: int) -> int:
    # 0.29 * 100 is 28.999...: a product that should be whole must not lose a step to rounding.
    return math.floor(fraction * total_steps + 1e-9)


def adaptive_weight(objective: Objective, mean_teacher_entropy: Scalar, vocabulary: int) -> Scalar:
    """Return λ1 by the teacher's confidence: high where the teacher is sure, low where it is not.

    ``λ_min + (λ_max - λ_min)·(1 - clamp(H / log V, 0, 1))``.

    Args:
        objective: Gives λ_min and λ_max.
        mean_teacher_entropy: Mean entropy of the teacher's softmax at T over the counted tokens, in
            nats.
        vocabulary: V, at least 2.

    Returns:
        Float32 scalar; 0 where λ1 is 0.

    Raises:
        InputError: If the vocabulary has fewer than two entries.

    **Source:** official 2026 code.

    >>> import jax.numpy as jnp
    >>> round(float(adaptive_weight(Objective(consistency=1.0), jnp.log(16.0) / 2, 16)), 4)
    0.55
    """
    if vocabulary < 2:
        raise InputError(
            f"adaptive_weight: expected a vocabulary of at least 2, got {vocabulary}. Pass V."
        )
    if objective.consistency == 0:
        return jnp.zeros((), jnp.float32)
    low, high = objective.adaptive_range
    doubt = jnp.clip(mean_teacher_entropy / math.log(vocabulary), 0, 1)
    return low + (high - low) * (1 - doubt)


def scales(
    weights: tuple[Scalar, Scalar, Scalar],
    *,
    task_count: Scalar,
    term_count: Scalar,
    micro_batches: int,
) -> TermScales:
    """Return the factor of each sum of a micro-batch in the loss of the step.

    With them shares add: the sum of the losses of the micro-batches is the loss of the step, and
    the sum of their gradients its gradient. Token sums are divided by the global counts, once; the
    spectral value, a statistic of the micro-batch, by the number of micro-batches.

    Args:
        weights: λ1, λ2, λ3 of this step, λ1 from :func:`adaptive_weight` where it is adaptive.
        task_count: Labelled rows over all micro-batches of the step.
        term_count: Rows of the terms over all micro-batches of the step.
        micro_batches: Micro-batches of the step.

    Returns:
        Float32 scalars; a count of 0 makes its factor 0.

    Raises:
        InputError: If micro_batches < 1.

    >>> import jax.numpy as jnp
    >>> weights = tuple(jnp.float32(x) for x in (0.5, 1, 2))
    >>> found = scales(weights, task_count=jnp.float32(4), term_count=jnp.float32(5),
    ...                micro_batches=2)
    >>> [round(float(scale), 3) for scale in found]
    [0.25, 0.1, 0.2, 1.0]
    """
    if micro_batches < 1:
        raise InputError(
            f"scales: expected micro_batches of at least 1, got {micro_batches}. Pass their number."
        )
    first, second, third = weights
    one = jnp.ones((), jnp.float32)
    return TermScales(
        task=_ratio(one, task_count),
        consistency=_ratio(first, term_count),
        diversity=_ratio(second, term_count),
        spectral=third / micro_batches,
    )


def parts(
    terms: HeadTerms,
    lambda1: Scalar,
    *,
    task_count: Scalar,
    term_count: Scalar,
    micro_batches: int,
) -> dict[str, Scalar]:
    """Return what a micro-batch adds to the logged values of its step, unweighted.

    ``task_loss``, ``consistency``, ``diversity``, ``spectral`` and ``spectral_residual``, and
    ``lambda1``, the consistency weight used here: all add up over micro-batches.

    >>> import jax.numpy as jnp
    >>> terms = HeadTerms(*(jnp.float32(x) for x in (6, 2, 4, -2, 2, 0, -0.5, 0)))
    >>> found = parts(terms, jnp.float32(1), task_count=jnp.float32(4), term_count=jnp.float32(4),
    ...               micro_batches=2)
    >>> float(found["task_loss"]), float(found["spectral"]), float(found["lambda1"])
    (1.5, -0.25, 0.5)
    """
    return {
        "task_loss": _ratio(terms.task_sum, task_count),
        "consistency": _ratio(terms.consistency_sum, term_count),
        "diversity": _ratio(terms.diversity_sum, term_count),
        "spectral": terms.spectral / micro_batches,
        "spectral_residual": terms.spectral_residual / micro_batches,
        "lambda1": lambda1 / micro_batches,
    }


def _ratio(total: Scalar, count: Scalar) -> Scalar:
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1), 0)
