"""What do a few rows of logits add to the loss, and what is the derivative by each logit?

The derivatives of cross-entropy, KL divergence and entropy by the logits are short formulas in the
softmaxes that the values need anyway, so the pass that computes the values returns both
(:mod:`balora_jax.numerics.head`). Entries are picked by comparison, never by a scatter. The
vocabulary may be split over a mesh axis: then three small sums cross it, no logits do.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from balora_jax.array_types import Array, Bool, Float, Int, Scalar
from balora_jax.numerics import top_k
from balora_jax.numerics.regularizers import SpectralNorm


@dataclass(frozen=True)
class TermSpec:
    """Which terms a step computes, and their static settings. Hashable: a static jit argument.

    A term that is False costs nothing: it is absent from the compiled program.

    Attributes:
        consistency: Compute the KL divergence to the teacher.
        diversity: Compute the entropy of the student.
        spectral: Compute the singular value ratio of the student's logits.
        temperature: T of the KL divergence and of the teacher's entropy.
        top_k: K of the entropy; 0 is the entire vocabulary.
        k: Number of leading singular values.
        norm: Denominator of the ratio.
        center_rows: Subtract each logit row's mean before the singular values. The other terms are
            softmaxes and do not see a shift of a row.
        teacher_entropy: The consistency weight needs the teacher's entropy at T (adaptive).
    """

    consistency: bool
    diversity: bool
    spectral: bool
    temperature: float
    top_k: int
    k: int
    norm: SpectralNorm
    center_rows: bool
    teacher_entropy: bool

    @property
    def needs_teacher(self) -> bool:
        """Whether any computed term reads the teacher's hidden states."""
        return self.consistency or self.teacher_entropy


class TermScales(NamedTuple):
    """The factor of each sum in the loss: weight over count. Float32 scalars, may be traced."""

    task: Scalar
    consistency: Scalar
    diversity: Scalar
    spectral: Scalar


class RowSums(NamedTuple):
    """Sums over rows, over the entire vocabulary; float32 scalars."""

    task: Scalar
    consistency: Scalar
    diversity: Scalar


class RowChoice(NamedTuple):
    """What each row is and what it counts for.

    Attributes:
        labels: Token to predict, ``[N]``; read where ``label_mask``.
        label_mask: Rows of the cross-entropy, ``[N]``.
        term_mask: Rows of the regularizers, ``[N]``.
        equal: Rows whose student and teacher agree bit for bit, ``[N]``; their divergence is 0.
    """

    labels: Int[Array, "N"]
    label_mask: Bool[Array, "N"]
    term_mask: Bool[Array, "N"]
    equal: Bool[Array, "N"]


class _Softmax(NamedTuple):
    """``softmax(z / T)`` by its row constants: ``log p = (z - largest) / T - log_total``.

    Each use forms the probabilities again from the logits: an exponential costs less than an array
    of ``[N, V]`` that is written and read back.
    """

    logits: Array
    largest: Array
    log_total: Array
    temperature: float

    @property
    def log_p(self) -> Array:
        # The row's maximum first keeps differences exact where a row has a large offset.
        return (self.logits - self.largest) / self.temperature - self.log_total

    @property
    def probability(self) -> Array:
        return jnp.exp(self.log_p)


def terms_and_gradient(
    student: Float[Array, "N V"],
    teacher: Float[Array, "N V"] | None,
    rows: RowChoice,
    scales: TermScales,
    spec: TermSpec,
    axis: str | None = None,
) -> tuple[RowSums, Float[Array, "N V"]]:
    """Return the sums of the softmax terms and ``d(Σ scale · sum) / d(student)``.

    Args:
        student: Logits in float32, ``[N, V]``; this device's columns if ``axis`` is given.
        teacher: Those of the frozen model; None where no term needs it.
        rows: Labels and masks; a row that counts for nothing has gradient 0.
        scales: Factor of each sum; ``spectral`` is not read.
        spec: Which terms.
        axis: Mesh axis inside ``jax.shard_map`` that the vocabulary is split over.

    >>> import jax.numpy as jnp
    >>> spec = TermSpec(False, False, False, 2.0, 0, 10, "frobenius", False, False)
    >>> yes = jnp.array([True])
    >>> rows = RowChoice(jnp.array([1]), yes, yes, ~yes)
    >>> scales = TermScales(jnp.float32(4), *[jnp.float32(0)] * 3)
    >>> sums, gradient = terms_and_gradient(jnp.zeros((1, 4)), None, rows, scales, spec)
    >>> gradient.tolist()
    [[1.0, -3.0, 1.0, 1.0]]
    """
    zero = jnp.zeros((), student.dtype)
    softmax = _softmax(student, 1.0, axis)
    task, gradient = _cross_entropy(softmax, rows, scales.task, axis)
    consistency = diversity = zero
    if spec.consistency and teacher is not None:
        consistency, more = _divergence(student, teacher, rows, scales.consistency, spec, axis)
        gradient = gradient + more
    if spec.diversity:
        diversity, more = _negative_entropy(student, softmax, rows, scales.diversity, spec, axis)
        gradient = gradient + more
    return RowSums(task, consistency, diversity), gradient


def entropy_sum(
    logits: Float[Array, "N V"],
    mask: Bool[Array, "N"],
    temperature: float,
    axis: str | None = None,
) -> Scalar:
    """Return the entropy of each row's softmax at a temperature, summed over the mask, in nats.

    >>> import jax.numpy as jnp
    >>> round(float(entropy_sum(jnp.zeros((1, 8)), jnp.array([True]), 2.0)), 4)
    2.0794
    """
    softmax = _softmax(logits, temperature, axis)
    return jnp.sum(jnp.where(mask, _entropy(softmax, axis), 0))


def _softmax(logits: Array, temperature: float, axis: str | None) -> _Softmax:
    largest = _row_max(logits)
    if axis is not None:
        largest = jax.lax.pmax(largest, axis)
    total = _row_sum(jnp.exp((logits - largest) / temperature), axis)
    return _Softmax(logits, largest, jnp.log(total)[:, None], temperature)


def _row_max(logits: Array) -> Array:
    # Not jnp.max: the CPU compiler would fuse that into the product which made the logits, and the
    # product would take more than twice as long.
    return -jnp.min(-logits, axis=1, keepdims=True)


def _row_sum(entries: Array, axis: str | None) -> Array:
    total = jnp.sum(entries, axis=1)
    return total if axis is None else jax.lax.psum(total, axis)


def _entropy(softmax: _Softmax, axis: str | None) -> Array:
    return -_row_sum(softmax.probability * softmax.log_p, axis)


def _cross_entropy(
    softmax: _Softmax, rows: RowChoice, scale: Array, axis: str | None
) -> tuple[Array, Array]:
    columns = jax.lax.broadcasted_iota(jnp.int32, softmax.logits.shape, 1)
    if axis is not None:
        columns = columns + jax.lax.axis_index(axis).astype(jnp.int32) * columns.shape[1]
    is_label = columns == rows.labels[:, None]
    chosen = _row_sum(jnp.where(is_label, softmax.logits - softmax.largest, 0), axis)
    losses = jnp.where(rows.label_mask, softmax.log_total[:, 0] - chosen, 0)
    factor = jnp.where(rows.label_mask, scale, 0)[:, None]
    return jnp.sum(losses), factor * (softmax.probability - is_label)


def _divergence(
    student: Array,
    teacher: Array,
    rows: RowChoice,
    scale: Array,
    spec: TermSpec,
    axis: str | None,
) -> tuple[Array, Array]:
    s, t = (_softmax(z, spec.temperature, axis) for z in (student, teacher))
    # Formed once and kept for both uses: the CPU compiler would rather keep three other arrays.
    p = jax.lax.optimization_barrier(t.probability)
    moved = (teacher - student) - (t.largest - s.largest)
    mean_moved = _row_sum(p * moved, axis) / spec.temperature
    divergence = mean_moved + s.log_total[:, 0] - t.log_total[:, 0]
    counted = rows.term_mask & ~rows.equal
    value = spec.temperature**2 * jnp.sum(jnp.where(counted, divergence, 0))
    factor = jnp.where(counted, spec.temperature * scale, 0)[:, None]
    return value, factor * (s.probability - p)


def _negative_entropy(
    student: Array,
    softmax: _Softmax,
    rows: RowChoice,
    scale: Array,
    spec: TermSpec,
    axis: str | None,
) -> tuple[Array, Array]:
    vocabulary = student.shape[1] * (1 if axis is None else jax.lax.axis_size(axis))
    factor = jnp.where(rows.term_mask, scale, 0)[:, None]
    if not 0 < spec.top_k < vocabulary:
        entropy = _entropy(softmax, axis)
        inner = softmax.log_p + entropy[:, None]
        gradient = factor * softmax.probability * inner
        return -jnp.sum(jnp.where(rows.term_mask, entropy, 0)), gradient
    found = top_k.largest(student, spec.top_k, axis)
    best = _softmax(found.values, 1.0, None)
    entropy = _entropy(best, None)
    # log p of any entry among the K best; the first of them is the row's maximum.
    log_p = student - found.values[:, :1] - best.log_total
    inner = jnp.exp(log_p) * (log_p + entropy[:, None])
    gradient = factor * jnp.where(top_k.chosen(student, found, axis), inner, 0)
    return -jnp.sum(jnp.where(rows.term_mask, entropy, 0)), gradient
