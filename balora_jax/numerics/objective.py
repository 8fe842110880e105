"""The loss as a sum: which terms, with which weights on which schedule, divided by what.

``L = L_task + Σ λ_i·L_i`` over the registered terms. An :class:`Objective` is a static description;
the weights are functions of the optimizer step, and :func:`scales` turns them into the factor of
each sum of a micro-batch in the global loss. Everything goes by the terms' names.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax.numpy as jnp

from balora_jax.array_types import Array, Int, Scalar
from balora_jax.errors import InputError
from balora_jax.numerics.arithmetic import ratio
from balora_jax.numerics.head_types import HeadSums
from balora_jax.numerics.schedules import SCHEDULES, WARMUP_FRACTION, Schedule
from balora_jax.numerics.terms import TERMS, keys_of, settings_of
from balora_jax.numerics.terms.term import Term, Variant, names_of, schedules_of

MaskAlignment = Literal["shifted", "official"]

TASK = "task_loss"
"""Name of the task's own loss, beside those of the terms."""

FIXED_FORMS = ("arxiv_v1",)
"""Variants whose settings are part of the published form and cannot be changed."""


OWN_KEYS = ("variant", "mask_alignment", "warmup_fraction")
"""Keys of a config's section that belong to no term."""


@dataclass(frozen=True)
class TermSet:
    """The terms that a step computes. Hashable: a static jit argument.

    A term that is not in it costs nothing: it is absent from the compiled program.

    Attributes:
        terms: in the order in which they are added up.
        by_confidence: names of those whose weight follows the teacher's entropy.
    """

    terms: tuple[Term, ...]
    by_confidence: tuple[str, ...] = ()

    @property
    def needs_teacher(self) -> bool:
        """Whether any of them reads the frozen model."""
        return any(term.needs_teacher for term in self.terms)

    @property
    def needs_factor(self) -> bool:
        """Whether any of them reads the factor of a linear head."""
        return any(term.needs_factor for term in self.terms)

    @property
    def centers_factor(self) -> bool:
        """Whether that factor is of the centred head.

        Raises:
            InputError: If two terms want different ones.
        """
        wanted = {term.centers_factor for term in self.terms if term.needs_factor}
        if len(wanted) > 1:
            raise InputError(
                "regularizers.center_rows: expected terms that read one factor of the head, got "
                "some that center it and some that do not. Switch one of them off."
            )
        return wanted == {True}


@dataclass(frozen=True)
class Weighted:
    """A term in the loss.

    Attributes:
        term: with its settings.
        weight: λ, at least 0; 0 leaves the term out.
        schedule: of λ over the run.
    """

    term: Term
    weight: float
    schedule: Schedule


@dataclass(frozen=True)
class Objective:
    """Every registered term with its weight. Hashable: a static jit argument.

    Attributes:
        weighted: the terms, in the registry's order.
        mask_alignment: ``shifted`` puts the terms on the positions of the cross-entropy;
            ``official`` on the unshifted positions of the authors' code. Read where masks are made.
        warmup_fraction: share of the steps that a warm-up of a weight takes, in ``[0, 1]``.
    """

    weighted: tuple[Weighted, ...]
    mask_alignment: MaskAlignment = "shifted"
    warmup_fraction: float = WARMUP_FRACTION

    def __post_init__(self) -> None:
        if self.mask_alignment not in get_args(MaskAlignment):
            raise _not_among("mask_alignment", get_args(MaskAlignment), self.mask_alignment)
        if not 0 <= self.warmup_fraction <= 1:
            raise InputError(
                "regularizers.warmup_fraction: expected a share of the steps between 0 and 1, "
                f"got {self.warmup_fraction}. The official default is {WARMUP_FRACTION}."
            )
        read = any(one.schedule.reads_warmup for one in self.weighted)
        if not read and self.warmup_fraction != WARMUP_FRACTION:
            readers = [schedule.name for schedule in SCHEDULES.values() if schedule.reads_warmup]
            raise InputError(
                "regularizers.warmup_fraction: expected a schedule that reads it, "
                f"{' or '.join(readers)}, got none with {self.warmup_fraction}. Remove it or "
                "change a schedule."
            )

    def __getitem__(self, name: str) -> Weighted:
        """The term of this name, its weight and its schedule."""
        return next(one for one in self.weighted if one.term.name == name)

    @property
    def active(self) -> tuple[Weighted, ...]:
        """The terms that are on."""
        return tuple(one for one in self.weighted if one.weight > 0)

    @property
    def term_set(self) -> TermSet:
        """What a step computes."""
        adaptive = (one for one in self.active if one.schedule.by_confidence is not None)
        return TermSet(
            tuple(one.term for one in self.active), tuple(one.term.name for one in adaptive)
        )

    @property
    def needs_teacher(self) -> bool:
        """Whether a step has to run the frozen model."""
        return self.term_set.needs_teacher


def objective_of(settings: Mapping[str, Any], *, labels: bool = False) -> Objective:
    """Return the objective that the keys of a config's section describe.

    Args:
        settings: weights, schedules and settings by key; one that is left out or None takes the
            value of the variant, or its term's default. A weight that is left out is 0, a schedule
            constant.
        labels: whether the rows have labels: then terms take what they have for labels first.

    Raises:
        InputError: If a value is out of range, unknown, or contradicts the variant.

    **Source:** paper (ICLR 2026) and official 2026 code; the official code has one schedule for λ2
    and λ3, here each has its own.

    >>> found = objective_of({"variant": "arxiv_v1", "consistency": 1e-4})
    >>> found["spectral"].term.norm, [one.term.name for one in found.active]
    ('nuclear', ['consistency'])
    """
    known = [*OWN_KEYS, *(key for term in TERMS.values() for key in keys_of(term))]
    for key in settings:
        if key not in known:
            raise InputError(
                f"regularizers.{key}: unknown key. It knows {', '.join(known)}. Correct it."
            )
    variant = settings.get("variant", "iclr2026")
    if variant not in get_args(Variant):
        raise _not_among("variant", get_args(Variant), variant)
    fixed = {key: settings[key] for key in OWN_KEYS[1:] if key in settings}
    weighted = tuple(_weighted(term, variant, settings, labels) for term in TERMS.values())
    return Objective(weighted, **fixed)


def _weighted(term: Term, variant: str, settings: Mapping[str, Any], labels: bool) -> Weighted:
    weight = settings.get(term.name, 0.0)
    if not (weight >= 0 and math.isfinite(weight)):
        raise InputError(
            f"regularizers.{term.name}: expected a weight of at least 0, got {weight}. "
            "Use 0 to switch the term off."
        )
    key = f"{term.name}_schedule"
    allowed, named = schedules_of(term), settings.get(key, "constant")
    if named not in names_of(allowed):
        raise _not_among(key, names_of(allowed), named)
    form = term.variants.get(variant, {})
    values = {}
    for name in (field.name for field in settings_of(term)):
        given = settings.get(name)
        if given is None:
            default = form.get(name, getattr(term, name))
            given = term.for_labels.get(name, default) if labels else default
        elif variant in FIXED_FORMS and given != form.get(name, given):
            raise InputError(
                f"regularizers.{name}: expected {form[name]} for variant {variant}, got {given}. "
                "Leave it out or use variant iclr2026."
            )
        values[name] = given
    whole = dataclasses.replace(term, variant=variant, **values)
    whole.check(weight, SCHEDULES[named])
    return Weighted(whole, weight, SCHEDULES[named])


def _not_among(key: str, names: Any, got: Any) -> InputError:
    return InputError(
        f"regularizers.{key}: expected one of {', '.join(names)}, got {got!r}. Choose one of them."
    )


def for_labels(objective: Objective, outputs: int) -> Objective:
    """Return the objective of a labels head: terms that its outputs leave undefined are off.

    Args:
        objective: made with ``labels=True``.
        outputs: C; 1 for a regression.

    Raises:
        InputError: A weight that follows the entropy of a single output, or a term on the hidden
            states of tokens.

    >>> both = objective_of({"consistency": 1.0, "diversity": 1.0}, labels=True)
    >>> [one.term.name for one in for_labels(both, 1).active]
    ['consistency']
    """
    for one in objective.active:
        name = one.term.name
        if one.term.reads == "hidden":
            raise InputError(
                f"regularizers.{name}: expected 0 with labels, got {one.weight}: the term reads "
                "the hidden states of tokens. Set it to 0."
            )
        if outputs == 1 and one.schedule.by_confidence is not None:
            other = [s.name for s in schedules_of(one.term) if s.by_confidence is None]
            raise InputError(
                f"regularizers.{name}_schedule: expected {' or '.join(other)} for a regression, "
                f"got {one.schedule.name}: a single output has no entropy. Choose one of them."
            )
    return dataclasses.replace(
        objective,
        weighted=tuple(
            one if one.term.least_outputs <= outputs else dataclasses.replace(one, weight=0.0)
            for one in objective.weighted
        ),
    )


def label_remarks(objective: Objective, rows: int, outputs: int) -> list[str]:
    """Return what a reader should know of the terms before they trust a comparison.

    Args:
        objective: made with ``labels=True``, before :func:`for_labels`.
        rows: of a micro-batch.
        outputs: C; 1 for a regression.
    """
    undefined = [o.term.name for o in objective.active if o.term.least_outputs > outputs]
    lines = []
    if undefined:
        verb = "are constants; they are" if len(undefined) > 1 else "is a constant; it is"
        names = " and ".join(f"the {name}" for name in undefined)
        lines.append(f"note: with one output {names} term {verb} left out.")
    on = (o.term for o in objective.active if o.term.name not in undefined)
    return lines + [line for term in on for line in term.remarks(rows, outputs)]


def length_schedules(settings: Mapping[str, Any]) -> list[str]:
    """Schedules of weights at work that depend on the number of steps of the run, with their keys.

    Args:
        settings: weights and schedules by the keys of a config's section, all given.

    >>> length_schedules({"consistency": 1.0, "consistency_schedule": "cosine"})
    ['consistency_schedule cosine']
    >>> length_schedules({"consistency": 0.0, "consistency_schedule": "cosine"})
    []
    """
    found = {f"{name}_schedule": name for name in TERMS if settings.get(name, 0.0) > 0.0}
    return [f"{key} {settings[key]}" for key in found if SCHEDULES[settings[key]].depends_on_length]


def weights(
    objective: Objective, step: int | Int[Array, ""], total_steps: int
) -> dict[str, Scalar]:
    """Return λ of every term by name at an optimizer step, as float32 scalars.

    A weight of 0 stays 0. One that follows the teacher's confidence depends on the micro-batch:
    here it is the plain λ, and :func:`confident` gives the value that takes its place.

    Args:
        objective: The description.
        step: Optimizer steps done before this one, 0 in the first; may be traced.
        total_steps: Optimizer steps of the entire run, at least 1.

    Raises:
        InputError: If total_steps < 1.

    >>> objective = objective_of({"consistency": 1.0, "diversity": 2.0,
    ...     "consistency_schedule": "cosine", "diversity_schedule": "two_phase"})
    >>> [[round(float(w), 3) for w in weights(objective, t, 40).values()] for t in (0, 9, 20)]
    [[1.0, 0.0, 0.0], [0.892, 1.0, 0.0], [0.55, 2.0, 0.0]]
    """
    if total_steps < 1:
        raise InputError(
            f"weights: expected total_steps of at least 1, got {total_steps}. Train more."
        )
    t, fraction = jnp.asarray(step, jnp.float32), objective.warmup_fraction
    return {
        one.term.name: jnp.float32(one.weight) * one.schedule.factor(t, total_steps, fraction)
        for one in objective.weighted
    }


def columns_of(weights: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return weights under their columns in the metrics: λ1 is that of the first term.

    >>> list(columns_of({"spectral": jnp.float32(3), "consistency": jnp.float32(1)}))
    ['lambda1', 'lambda3']
    """
    return {f"lambda{i}": weights[name] for i, name in enumerate(TERMS, start=1) if name in weights}


def confident(
    objective: Objective, mean_entropy: Mapping[str, Scalar], columns: int
) -> dict[str, Scalar]:
    """Return λ of the terms whose weight follows the teacher's confidence on a micro-batch.

    Args:
        objective: The description.
        mean_entropy: Of the teacher's softmax at each term's temperature, by name, in nats.
        columns: Entries of the vocabulary, or classes.

    Raises:
        InputError: If there are fewer than two columns.

    >>> objective = objective_of({"consistency": 1.0, "consistency_schedule": "adaptive"})
    >>> {k: float(v) for k, v in confident(objective, {"consistency": jnp.float32(0)}, 9).items()}
    {'consistency': 1.0}
    """
    found = {}
    for one in objective.active:
        if one.schedule.by_confidence is not None:
            low, high = one.term.adaptive_range(one.weight)
            entropy = mean_entropy[one.term.name]
            found[one.term.name] = one.schedule.by_confidence(low, high, entropy, columns)
    return found


def scales(
    objective: Objective,
    weights: Mapping[str, Scalar],
    *,
    task_count: Scalar,
    term_count: Scalar,
    micro_batches: int,
) -> dict[str, Scalar]:
    """Return the factor of each sum of a micro-batch in the loss of the step, by name.

    With them shares add: the sum of the losses of the micro-batches is the loss of the step, and
    the sum of their gradients its gradient. Sums over rows are divided by the global counts, once;
    the value of a term that couples rows, a statistic of the micro-batch, by the number of
    micro-batches.

    Args:
        objective: The description.
        weights: λ by name; only those given are turned into scales.
        task_count: Rows with labels over all micro-batches of the step.
        term_count: Rows of the terms over all micro-batches of the step.
        micro_batches: Micro-batches of the step.

    Returns:
        Float32 scalars by the names of the terms, and :data:`TASK`; a count of 0 makes its factor
        0.

    Raises:
        InputError: If micro_batches < 1.

    >>> weights = {name: jnp.float32(x) for name, x in zip(TERMS, (0.5, 1, 2))}
    >>> found = scales(objective_of({}), weights, task_count=jnp.float32(4),
    ...                term_count=jnp.float32(5), micro_batches=2)
    >>> {name: round(float(scale), 3) for name, scale in found.items()}
    {'task_loss': 0.25, 'consistency': 0.1, 'diversity': 0.2, 'spectral': 1.0}
    """
    if micro_batches < 1:
        raise InputError(
            f"scales: expected micro_batches of at least 1, got {micro_batches}. Pass their number."
        )
    found = {TASK: ratio(jnp.ones((), jnp.float32), task_count)}
    for one in objective.weighted:
        name = one.term.name
        if name in weights and one.term.couples_rows:
            found[name] = weights[name] / micro_batches
        elif name in weights:
            found[name] = ratio(weights[name], term_count)
    return found


def parts(
    objective: Objective,
    sums: HeadSums,
    *,
    task_count: Scalar,
    term_count: Scalar,
    micro_batches: int,
) -> dict[str, Scalar]:
    """Return what a micro-batch adds to the logged values of its step, unweighted.

    The task's loss, every registered term, 0 where it is off, and the terms' statistics: all add up
    over micro-batches.

    >>> f = jnp.float32
    >>> sums = HeadSums(f(6), f(2), f(2), {"consistency": f(2), "spectral": f(-0.5)}, {}, {})
    >>> found = parts(objective_of({}), sums, task_count=f(4), term_count=f(4), micro_batches=2)
    >>> [float(found[name]) for name in ("task_loss", "consistency", "diversity", "spectral")]
    [1.5, 0.5, 0.0, -0.25]
    """
    found, zero = {TASK: ratio(sums.task_sum, task_count)}, jnp.zeros((), sums.task_sum.dtype)
    for one in objective.weighted:
        total = sums.terms.get(one.term.name, zero)
        split = total / micro_batches if one.term.couples_rows else ratio(total, term_count)
        found[one.term.name] = split
        for name in one.term.statistics:
            found[name] = sums.statistics.get(name, zero) / micro_batches
    return found
