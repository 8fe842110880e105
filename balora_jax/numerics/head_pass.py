"""How does one pass over chunks of rows give the terms of a batch and their gradient?

The logits ``Z = H Wᵀ`` exist one chunk of rows at a time. The weights of the terms are known when
the pass runs, so each chunk forms ``d loss / d Z`` beside the values and multiplies it by W at
once: three products of size N·D·V in all (student, teacher, gradient), and what is kept is
``[N, D]``. Rows that count for nothing are left out. Nothing here is to be differentiated;
:mod:`balora_jax.numerics.head` attaches the gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from balora_jax.array_types import Array, Bool, Float, Int, Scalar
from balora_jax.numerics import logit_terms, spectral
from balora_jax.numerics.logit_terms import RowChoice, RowSums, TermScales, TermSpec
from balora_jax.numerics.spectral import SpectralGradient

_HIGHEST = jax.lax.Precision.HIGHEST


@dataclass(frozen=True)
class LogitMap:
    """From ``H Wᵀ`` to logits: ``cap · tanh(scale · H Wᵀ / cap)``. Static.

    Attributes:
        scale: Factor of the logits (Cohere, Granite).
        soft_cap: Largest size of a logit (Gemma 2); None leaves them linear.
    """

    scale: float = 1.0
    soft_cap: float | None = None

    def __call__(self, products: Array) -> Array:
        """Logits, float32."""
        logits = products * self.scale if self.scale != 1.0 else products
        if self.soft_cap is None:
            return logits
        return self.soft_cap * jnp.tanh(logits / self.soft_cap)

    def pull_back(self, gradient: Array, logits: Array) -> Array:
        """``d loss / d(H Wᵀ)`` from ``d loss / d logits``."""
        if self.soft_cap is not None:
            gradient = gradient * (1 - (logits / self.soft_cap) ** 2)
        return gradient * self.scale if self.scale != 1.0 else gradient


@dataclass(frozen=True)
class HeadAxes:
    """Mesh axes inside ``jax.shard_map``: rows are split over ``rows``, W over ``vocabulary``."""

    rows: tuple[str, ...] = ()
    vocabulary: str | None = None


class HeadTerms(NamedTuple):
    """Sums over one micro-batch, float32 scalars. All but the last two add over micro-batches.

    Attributes:
        task_sum: Cross-entropy summed over labelled rows, in nats.
        task_count: Labelled rows.
        consistency_sum: ``T² · KL`` summed over the rows of the terms.
        diversity_sum: Minus the entropy summed over the rows of the terms.
        term_count: Rows of the terms.
        teacher_entropy_sum: Entropy of the teacher's softmax at T over the full vocabulary, summed;
            0 where no adaptive weight asks for it.
        spectral: Minus the singular value ratio of this micro-batch; a value, not a sum.
        spectral_residual: Relative residual of the leading singular triplets; 0 where exact.
    """

    task_sum: Scalar
    task_count: Scalar
    consistency_sum: Scalar
    diversity_sum: Scalar
    term_count: Scalar
    teacher_entropy_sum: Scalar
    spectral: Scalar
    spectral_residual: Scalar


Adapt = Callable[[TermScales, Scalar], TermScales]
"""Scales of a micro-batch from the given ones and the mean entropy of its teacher, in nats."""


class Rows(NamedTuple):
    """Hidden states of a micro-batch and what each row counts for.

    Attributes:
        student: Final hidden states of the model in training, ``[N, D]``.
        teacher: Those of the frozen model; None where no term reads them.
        labels: Token to predict, ``[N]``; read where ``label_mask``.
        label_mask: Rows of the cross-entropy, ``[N]``.
        term_mask: Rows of the regularizers, ``[N]``.
    """

    student: Float[Array, "N D"]
    teacher: Float[Array, "N D"] | None
    labels: Int[Array, "N"]
    label_mask: Bool[Array, "N"]
    term_mask: Bool[Array, "N"]


@dataclass(frozen=True)
class Head:
    """A frozen head and how its pass runs.

    Attributes:
        embedding: ``[V, D]``; this device's rows if ``axes.vocabulary`` is given.
        factor: R of the head for the spectral term; None where it is off or logits are capped.
        logit_map: From products to logits.
        chunk: Rows of a chunk.
        axes: Mesh axes that are manual here.
    """

    embedding: Float[Array, "V D"]
    factor: Float[Array, "D D"] | None
    logit_map: LogitMap
    chunk: int
    axes: HeadAxes

    def logits(self, hidden: Float[Array, "N D"]) -> Float[Array, "N V"]:
        """Logits of a few rows, this device's columns, float32."""
        return self.logit_map(head_products(hidden, self.embedding))


def terms_and_gradient(
    rows: Rows,
    head: Head,
    scales: TermScales,
    spec: TermSpec,
    adapt: Adapt | None,
) -> tuple[HeadTerms, Float[Array, "N D"]]:
    """Return the terms over all devices, and ``d(Σ scale · term)/dH`` of this device's rows.

    See :func:`balora_jax.numerics.head.head_loss`.
    """
    wide, axes = _wide(rows.student), head.axes
    if rows.student.shape[0] == 0:
        zero = jnp.zeros((), wide)
        return HeadTerms(*(zero,) * len(HeadTerms._fields)), rows.student
    term_count = _sum_over(jnp.sum(rows.term_mask, dtype=wide), axes.rows)
    entropy = jnp.zeros((), wide)
    if spec.teacher_entropy and rows.teacher is not None and adapt is not None:
        entropy = _teacher_entropy(rows.teacher, head, rows.term_mask, spec.temperature)
        scales = adapt(scales, mean_of(entropy, term_count))
    plan = Chunks.of(rows.label_mask | rows.term_mask, head.chunk)
    ratio = _spectral(rows, head, spec) if spec.spectral else None
    zero = jnp.zeros((), wide)
    places = plan.order.shape[0]
    first = (
        RowSums(zero, zero, zero),
        jnp.zeros((places, rows.student.shape[1]), rows.student.dtype),
    )

    def add(index: Array, carry: tuple[RowSums, Array]) -> tuple[RowSums, Array]:
        total, gradient = carry
        sums, part = _chunk(plan, index, rows, head, scales, spec, ratio)
        part = part.astype(gradient.dtype)
        gradient = jax.lax.dynamic_update_slice_in_dim(gradient, part, index * plan.size, 0)
        return jax.tree.map(jnp.add, total, sums), gradient

    sums, gradient = jax.lax.fori_loop(0, plan.count, add, first)
    terms = HeadTerms(
        task_sum=_sum_over(sums.task, axes.rows),
        task_count=_sum_over(jnp.sum(rows.label_mask, dtype=wide), axes.rows),
        consistency_sum=_sum_over(sums.consistency, axes.rows),
        diversity_sum=_sum_over(sums.diversity, axes.rows),
        term_count=term_count,
        teacher_entropy_sum=entropy,
        spectral=zero if ratio is None else ratio.value,
        spectral_residual=zero if ratio is None else ratio.residual,
    )
    return terms, plan.put_back(gradient)


def _chunk(
    plan: "Chunks",
    index: Array,
    rows: Rows,
    head: Head,
    scales: TermScales,
    spec: TermSpec,
    ratio: SpectralGradient | None,
) -> tuple[RowSums, Array]:
    """Sums of one chunk, and its rows of the gradient by hidden states, float32."""
    taken, counted = plan.rows(index)
    axis = head.axes.vocabulary
    student = _take(rows.student, taken, counted)
    teacher = None if rows.teacher is None else _take(rows.teacher, taken, counted)
    equal = jnp.zeros_like(counted) if teacher is None else jnp.all(student == teacher, axis=1)
    choice = RowChoice(
        rows.labels[taken],
        counted & rows.label_mask[taken],
        counted & rows.term_mask[taken],
        equal,
    )
    logits = head.logits(student)
    teacher_logits = None if teacher is None else head.logits(teacher)
    sums, gradient = logit_terms.terms_and_gradient(
        logits, teacher_logits, choice, scales, spec, axis
    )
    left = None
    if ratio is not None:
        left = scales.spectral * _take(ratio.left, taken, choice.term_mask)
        matrix = _centred(logits, axis) if spec.center_rows else logits
        shrink = scales.spectral * ratio.shrink
        more = jnp.where(choice.term_mask[:, None], shrink * matrix, 0)
        if head.logit_map.soft_cap is not None:
            low_rank = _einsum("nk,vk->nv", left, ratio.right)
            more = more + (_centred(low_rank, axis) if spec.center_rows else low_rank)
        gradient = gradient + more
    gradient = head.logit_map.pull_back(gradient, logits).astype(student.dtype)
    by_hidden = _einsum("nv,vd->nd", gradient, head.embedding)
    by_hidden = by_hidden if axis is None else jax.lax.psum(by_hidden, axis)
    if ratio is not None and left is not None and head.logit_map.soft_cap is None:
        by_hidden = by_hidden + _einsum("nk,dk->nd", left, ratio.right)
    return sums, by_hidden


def _spectral(rows: Rows, head: Head, spec: TermSpec) -> SpectralGradient:
    if head.logit_map.soft_cap is not None:
        return _implicit_spectral(rows, head, spec)
    assert head.factor is not None
    hidden = jnp.where(rows.term_mask[:, None], rows.student, 0)
    factor = head.factor * head.logit_map.scale
    return spectral.from_width(hidden, factor, spec.k, spec.norm, head.axes.rows)


def _implicit_spectral(rows: Rows, head: Head, spec: TermSpec) -> SpectralGradient:
    """The term where logits are not linear: products with a Z that is formed again each time."""
    plan, axes = Chunks.of(rows.term_mask, head.chunk), head.axes
    wide, count = _wide(rows.student), rows.student.shape[0]

    def part(index: Array) -> tuple[Array, Array, Array]:
        taken, counted = plan.rows(index)
        logits = head.logits(_take(rows.student, taken, counted))
        if spec.center_rows:
            logits = _centred(logits, axes.vocabulary)
        return logits, taken, counted

    def apply(x: Array) -> Array:
        def add(index: Array, images: Array) -> Array:
            image = _einsum("nv,vw->nw", part(index)[0], x)
            return jax.lax.dynamic_update_slice_in_dim(images, image, index * plan.size, 0)

        places = jnp.zeros((plan.order.shape[0], x.shape[1]), wide)
        images = plan.put_back(jax.lax.fori_loop(0, plan.count, add, places))
        return images if axes.vocabulary is None else jax.lax.psum(images, axes.vocabulary)

    def transpose(y: Array) -> Array:
        def add(index: Array, total: Array) -> Array:
            logits, taken, counted = part(index)
            return total + _einsum("nv,nw->vw", logits, _take(y, taken, counted))

        first = jnp.zeros((head.embedding.shape[0], y.shape[1]), wide)
        return _sum_over(jax.lax.fori_loop(0, plan.count, add, first), axes.rows)

    def add_squares(index: Array, total: Array) -> Array:
        return total + jnp.sum(part(index)[0] ** 2)

    squares = jax.lax.fori_loop(0, plan.count, add_squares, jnp.zeros((), wide))
    columns = () if axes.vocabulary is None else (axes.vocabulary,)
    return spectral.from_products(
        apply,
        transpose,
        _sum_over(squares, axes.rows + columns),
        (count, head.embedding.shape[0]),
        spec.k,
        row_axes=axes.rows,
        column_axes=columns,
    )


def _teacher_entropy(teacher: Array, head: Head, mask: Array, temperature: float) -> Array:
    """The entropy at T summed over the mask: the adaptive weight needs it before the pass."""
    plan = Chunks.of(mask, head.chunk)

    def add(index: Array, total: Array) -> Array:
        taken, counted = plan.rows(index)
        logits = head.logits(_take(teacher, taken, counted))
        return total + logit_terms.entropy_sum(logits, counted, temperature, head.axes.vocabulary)

    total = jax.lax.fori_loop(0, plan.count, add, jnp.zeros((), _wide(teacher)))
    return _sum_over(total, head.axes.rows)


class Chunks(NamedTuple):
    """Which rows each chunk takes: those that count, closed up, in their order.

    Attributes:
        order: Row of each place, ``[places]``; places behind the last used row repeat row 0.
        place: Place of each row, ``[N]``.
        used: Rows that count.
        count: Chunks that hold any; the only number of chunks that costs time.
        size: Rows of a chunk, static.
    """

    order: Array
    place: Array
    used: Array
    count: Array
    size: int

    @classmethod
    def of(cls, used: Array, chunk: int) -> "Chunks":
        """Close up the rows that are used."""
        rows = used.shape[0]
        size = min(chunk, rows)
        places = size * -(-rows // size)
        order = jnp.nonzero(used, size=places, fill_value=0)[0]
        total = jnp.cumsum(used)
        return cls(order, total - 1, used, -(-total[-1] // size), size)

    def rows(self, index: Array) -> tuple[Array, Array]:
        """Rows of a chunk, and which of its places are taken."""
        taken = jax.lax.dynamic_slice_in_dim(self.order, index * self.size, self.size)
        places = index * self.size + jnp.arange(self.size)
        return taken, places < jnp.sum(self.used)

    def put_back(self, values: Array) -> Array:
        """From ``[places, D]`` to ``[N, D]``, zero in rows that were left out."""
        return jnp.where(self.used[:, None], values[jnp.maximum(self.place, 0)], 0)


def head_products(
    hidden: Float[Array, "N D"], embedding: Float[Array, "V D"]
) -> Float[Array, "N V"]:
    """Return ``H Wᵀ`` in float32, multiplied in the dtype of the hidden states.

    >>> import jax.numpy as jnp
    >>> head_products(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0]])).tolist()
    [[11.0]]
    """
    return _einsum("nd,vd->nv", hidden, embedding)


def mean_of(total: Scalar, count: Scalar) -> Scalar:
    """``total / count``, 0 where nothing was counted."""
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1), 0)


def _einsum(indices: str, left: Array, right: Array) -> Array:
    wide = _wide(left)
    return jnp.einsum(
        indices,
        left,
        right.astype(left.dtype),
        preferred_element_type=wide,
        precision=_HIGHEST if left.dtype == wide else None,
    )


def _take(array: Array, taken: Array, counted: Array) -> Array:
    # A row that is left out may hold anything, NaN included, which a product with 0 would keep.
    return jnp.where(counted[:, None], array[taken], 0)


def _centred(logits: Array, axis: str | None) -> Array:
    mean = jnp.mean(logits, axis=1, keepdims=True)
    return logits - (mean if axis is None else jax.lax.pmean(mean, axis))


def _wide(array: Array) -> jnp.dtype:
    return jnp.promote_types(array.dtype, jnp.float32)


def _sum_over(array: Array, axes: tuple[str, ...]) -> Array:
    return jax.lax.psum(array, axes) if axes else array
