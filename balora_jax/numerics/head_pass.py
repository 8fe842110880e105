"""One pass over chunks of rows: terms of a batch, gradient by hidden states and by the head.

The logits ``Z = H Wᵀ`` exist one chunk of rows at a time. The weights of the terms are known when
the pass runs, so each chunk forms ``d loss / d Z`` beside the values and multiplies it by W at
once: three products of size N·D·V in all (student, teacher, gradient), and what is kept is
``[N, D]``. A head that trains takes a fourth, and ``[V, D]`` in float32, its gradient. Rows that
count for nothing are left out. Nothing here is to be differentiated;
:mod:`balora_jax.numerics.head` attaches the gradient.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from balora_jax.array_types import Array, Bool, Float, Scalar
from balora_jax.numerics.arithmetic import as_float, einsum, ratio, sum_over, wide
from balora_jax.numerics.head_types import Chunk, Chunks, Head, HeadSums, Rows, take
from balora_jax.numerics.objective import TASK, TermSet
from balora_jax.numerics.softmax import cross_entropy_and_gradient, entropy_sum, softmax_of
from balora_jax.numerics.terms.term import Prepared, Term

Scales = dict[str, Scalar]
"""Factor of each sum in the loss, weight over count, by the terms' names and ``task_loss``."""

Adapt = Callable[[Scales, dict[str, Scalar]], Scales]
"""Scales of a micro-batch from the given ones and its teacher's mean entropies by term, in nats."""


class _Pass(NamedTuple):
    """Arrays that every chunk of a micro-batch reads."""

    plan: Chunks
    rows: Rows
    head: Head
    scales: Scales
    terms: tuple[Term, ...]
    prepared: Mapping[str, Prepared | None]
    unchanged: Bool[Array, ""]


class Gradient(NamedTuple):
    """Derivatives of the loss: ``[N, D]`` by the hidden states, ``[V, D]`` by the head or None."""

    hidden: Float[Array, "N D"]
    head: Float[Array, "V D"] | None


def terms_and_gradient(
    rows: Rows, head: Head, scales: Scales, chosen: TermSet, adapt: Adapt | None
) -> tuple[HeadSums, Gradient]:
    """Return the sums over all devices, and ``d(Σ scale · sum)`` by this device's rows and head.

    The derivative by the head is over the rows of all devices; None where the head is frozen.

    See :func:`balora_jax.numerics.head.head_loss`.
    """
    dtype, axes = wide(rows.student), head.axes.rows
    if rows.student.shape[0] == 0:
        return _nothing(chosen, jnp.zeros((), dtype)), Gradient(rows.student, _no_gradient(head))
    term_count = sum_over(jnp.sum(rows.term_mask, dtype=dtype), axes)
    entropies = {
        term.name: _teacher_entropy(rows, head, term)
        for term in chosen.terms
        if term.name in chosen.by_confidence
    }
    if entropies and adapt is not None:
        scales = adapt(scales, {k: ratio(total, term_count) for k, total in entropies.items()})
    by_logits = tuple(term for term in chosen.terms if term.reads == "logits")
    prepared = {term.name: term.prepare(rows, head) for term in by_logits}
    used = rows.label_mask | rows.term_mask
    plan = Chunks.of(used if rows.taught is None else used & rows.taught, head.chunk)
    given = _Pass(plan, rows, head, scales, by_logits, prepared, head.unchanged())
    sums, gradient, by_head = _over_chunks(given, dtype)
    if rows.taught is not None:
        more, others, of_head = _over_chunks(_untaught(given, used & ~rows.taught), dtype)
        sums = {name: total + more.get(name, 0) for name, total in sums.items()}
        gradient, by_head = jax.tree.map(jnp.add, (gradient, by_head), (others, of_head))
    task = sums.pop(TASK)
    found = {name: sum_over(total, axes) for name, total in sums.items()}
    coupled = {name: one for name, one in prepared.items() if one is not None}
    found |= {name: one.value for name, one in coupled.items()}
    for term in chosen.terms:
        if term.reads == "hidden":
            total, more = _hidden_term(rows, term)
            found[term.name] = sum_over(total, axes)
            gradient = gradient + (scales[term.name] * more).astype(gradient.dtype)
    whole = HeadSums(
        task_sum=sum_over(task, axes),
        task_count=sum_over(jnp.sum(rows.label_mask, dtype=dtype), axes),
        term_count=term_count,
        terms=found,
        teacher_entropy=entropies,
        statistics={k: v for one in coupled.values() for k, v in one.statistics.items()},
    )
    by_head = None if by_head is None else sum_over(by_head, axes).astype(head.embedding.dtype)
    return whole, Gradient(gradient, by_head)


def _no_gradient(head: Head) -> Array | None:
    return None if head.original is None else jnp.zeros_like(head.embedding)


def _nothing(chosen: TermSet, zero: Scalar) -> HeadSums:
    terms = {term.name: zero for term in chosen.terms}
    statistics = {name: zero for term in chosen.terms for name in term.statistics}
    entropies = dict.fromkeys(chosen.by_confidence, zero)
    return HeadSums(zero, zero, zero, terms, entropies, statistics)


_Carry = tuple[dict[str, Scalar], Array, Array | None]


def _over_chunks(given: _Pass, dtype: jnp.dtype) -> _Carry:
    """Sums over this device's rows by name, its rows of the gradient [N, D], that by the head."""
    plan, student = given.plan, given.rows.student
    zero = jnp.zeros((), dtype)
    names = [TASK, *(term.name for term in given.terms if not term.couples_rows)]
    table = None if given.head.original is None else given.head.embedding
    first = (
        dict.fromkeys(names, zero),
        jnp.zeros((plan.order.shape[0], student.shape[1]), student.dtype),
        None if table is None else jnp.zeros(table.shape, dtype),
    )

    def add(index: Array, carry: _Carry) -> _Carry:
        total, gradient, by_head = carry
        sums, part, more = _one_chunk(given, index)
        part = part.astype(gradient.dtype)
        gradient = jax.lax.dynamic_update_slice_in_dim(gradient, part, index * plan.size, 0)
        total, by_head = jax.tree.map(jnp.add, (total, by_head), (sums, more))
        return total, gradient, by_head

    sums, gradient, by_head = jax.lax.fori_loop(0, plan.count, add, first)
    return sums, plan.put_back(gradient), by_head


def _untaught(given: _Pass, used: Array) -> _Pass:
    """The pass over the rows without a teacher: no product for it, no term that reads it."""
    return given._replace(
        plan=Chunks.of(used, given.head.chunk),
        rows=given.rows._replace(teacher=None),
        terms=tuple(term for term in given.terms if not term.needs_teacher),
    )


def _one_chunk(given: _Pass, index: Array) -> _Carry:
    """Sums of one chunk, its rows of the gradient by the hidden states, its part of the head's."""
    rows, head, scales = given.rows, given.head, given.scales
    taken, counted = given.plan.rows(index)
    axis = head.axes.vocabulary
    student = take(rows.student, taken, counted)
    teacher = None if rows.teacher is None else take(rows.teacher, taken, counted)
    equal = jnp.zeros_like(counted) if teacher is None else jnp.all(student == teacher, axis=1)
    equal &= given.unchanged
    label_mask, term_mask = (counted & mask[taken] for mask in (rows.label_mask, rows.term_mask))
    logits = head.logits(student)
    teacher_logits = None if teacher is None else head.teacher_logits(teacher)
    softmax = softmax_of(logits, 1.0, axis)
    chunk = Chunk(logits, teacher_logits, softmax, term_mask, equal, taken, axis, head.linear)
    task, gradient = cross_entropy_and_gradient(
        softmax, rows.labels[taken], label_mask, scales[TASK], axis
    )
    sums = {TASK: task}
    for term in given.terms:
        value, more = term.on_chunk(chunk, given.prepared[term.name], scales[term.name])
        gradient = gradient + more
        if value is not None:
            sums[term.name] = value
    gradient = head.logit_map.pull_back(gradient, logits).astype(student.dtype)
    by_hidden = einsum("nv,vd->nd", gradient, head.embedding)
    by_hidden = by_hidden if axis is None else jax.lax.psum(by_hidden, axis)
    for term in given.terms:
        more = term.by_hidden(chunk, given.prepared[term.name], scales[term.name])
        by_hidden = by_hidden if more is None else by_hidden + more
    by_head = None if head.original is None else einsum("nv,nd->vd", gradient, student)
    return sums, by_hidden, by_head


def _hidden_term(rows: Rows, term: Term) -> tuple[Scalar, Float[Array, "N D"]]:
    """A term on hidden states over this device's rows, and its derivative."""
    total, pull = jax.vjp(lambda student: hidden_sum(rows._replace(student=student), term),
                          rows.student)  # fmt: skip
    return total, pull(jnp.ones((), total.dtype))[0]


def hidden_sum(rows: Rows, term: Term) -> Scalar:
    """The sum of a term on hidden states over the rows that count, differentiable."""
    student, teacher = (
        None if hidden is None else as_float(jnp.where(rows.term_mask[:, None], hidden, 0))
        for hidden in (rows.student, rows.teacher)
    )
    assert student is not None
    mask = rows.mask_of(needs_teacher=term.needs_teacher)
    return jnp.sum(jnp.where(mask, term.hidden_rows(student, teacher), 0))


def _teacher_entropy(rows: Rows, head: Head, term: Term) -> Scalar:
    """The entropy of the rows that count: an adaptive weight needs it before the pass."""
    teacher, temperature = rows.teacher, term.confidence_temperature
    assert teacher is not None
    plan = Chunks.of(rows.term_mask, head.chunk)

    def add(index: Array, total: Array) -> Array:
        taken, counted = plan.rows(index)
        logits = head.teacher_logits(take(teacher, taken, counted))
        return total + entropy_sum(logits, counted, temperature, head.axes.vocabulary)

    total = jax.lax.fori_loop(0, plan.count, add, jnp.zeros((), wide(teacher)))
    return sum_over(total, head.axes.rows)
