"""Task loss and regularizers of a batch, with their gradient by the hidden states and the head.

:func:`head_loss` runs the pass of :mod:`balora_jax.numerics.head_pass`, which never holds all
logits; :func:`plain_head_loss` calls each term's own function on all ``[N, V]`` logits and is
differentiated automatically. A frozen head is that of student and teacher and gets no gradient;
one that trains gets one, and the teacher's own head, ``original``, is given beside it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from balora_jax.array_types import Array, Float, Scalar
from balora_jax.errors import InputError
from balora_jax.numerics import head_pass, losses
from balora_jax.numerics.arithmetic import ratio
from balora_jax.numerics.head_pass import Adapt, Scales
from balora_jax.numerics.head_types import (
    LINEAR,
    ONE_DEVICE,
    Head,
    HeadAxes,
    HeadSums,
    LogitMap,
    Rows,
    head_products,
)
from balora_jax.numerics.objective import TASK, TermSet
from balora_jax.numerics.softmax import entropy_rows
from balora_jax.numerics.terms.term import Term


def unwrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """The pass as it is, on one device."""
    return function


def head_loss(
    rows: Rows,
    embedding: Float[Array, "V D"],
    scales: Scales,
    chosen: TermSet,
    *,
    chunk: int,
    factor: Float[Array, "D D"] | None = None,
    logit_map: LogitMap = LINEAR,
    adapt: Adapt | None = None,
    axes: HeadAxes = ONE_DEVICE,
    across: Callable[[Callable[..., Any]], Callable[..., Any]] = unwrapped,
    original: Float[Array, "V D"] | None = None,
) -> tuple[Scalar, HeadSums]:
    """Return ``Σ scale · sum`` with its gradient by ``rows.student`` (and W), and the sums.

    At most one chunk of student and teacher logits exists at a time. Logits are products in the
    dtype of the hidden states with float32 accumulation, float32 hidden states at the highest
    precision; ``d loss / d Z`` is rounded to the dtype of the hidden states before its product.
    Only the first result carries a gradient, by ``rows.student`` and, with an ``original``, by
    ``embedding``, summed in float32. Where a row of student and teacher agrees bit for bit, and
    their heads do, its divergence is exactly 0 with gradient 0.

    A term that couples rows couples those of this call: with several micro-batches it is a
    statistic of each one, over all devices.

    Args:
        rows: The micro-batch.
        embedding: Head, ``[V, D]``, rows are vocabulary entries; frozen without an ``original``.
        scales: Factor of each sum in the loss, by the terms' names and ``task_loss``.
        chosen: Which terms, with their settings.
        chunk: Rows per chunk on a device, at least 1. N need not be a multiple.
        factor: Factor R of the head for the spectral term, with its ``center_rows`` that of the
            *centred* head (``linalg.head_factor(W, center=True)``): centring is linear in H too.
            Not read, and may be None, where no term needs it, logits have a soft cap or the head
            trains: then the term works on logits that are formed again each time.
        logit_map: From products to logits.
        adapt: Gives the scales of this micro-batch by its teacher's entropy; read and needed where
            a weight follows it.
        axes: Mesh axes that ``across`` makes manual.
        across: Wraps the computation, such as in ``jax.shard_map``; it takes and returns
            ``(rows, (embedding, original), scales, factor) -> (sums, ([N, D], [V, D] or None))``.
        original: The teacher's head, ``[V, D]``, where ``embedding`` trains.

    Raises:
        InputError: If shapes do not match, the teacher or the factor is missing, or a setting is
            out of range.

    **Source:** the paper's NLG terms; the official code forms ``[B, T, V]`` logits of both models
    several times instead. Gradient in the forward pass: an idea of fused cross-entropy kernels.

    >>> from balora_jax.numerics.terms.diversity import Diversity
    >>> yes, one = jnp.array([True]), jnp.float32(1)
    >>> rows = Rows(jnp.zeros((1, 3)), None, jnp.array([5]), yes, yes)
    >>> scales, chosen = {"task_loss": one, "diversity": one}, TermSet((Diversity(top_k=0),))
    >>> loss, sums = head_loss(rows, jnp.ones((8, 3)), scales, chosen, chunk=4)
    >>> round(float(sums.task_sum), 4), round(float(sums.terms["diversity"]), 4), abs(loss) < 1e-5
    (2.0794, -2.0794, Array(True, dtype=bool))
    """
    check(rows, embedding, chosen, chunk, factor, logit_map, original)
    at = rows.student, None if original is None else embedding
    # Constants from here on: the gradient is formed by hand and attached at the end.
    tables = embedding, original
    rows, tables, scales, factor = jax.lax.stop_gradient((rows, tables, scales, factor))
    if not chosen.needs_teacher:
        rows = rows._replace(teacher=None, taught=None)

    def compute(
        rows: Rows, tables: tuple[Array, Array | None], scales: Scales, factor: Array | None
    ) -> tuple[HeadSums, tuple[Array, Array | None]]:
        scaled = None if factor is None else factor * logit_map.scale
        head = Head(tables[0], scaled, logit_map, chunk, axes, tables[1])
        sums, gradient = head_pass.terms_and_gradient(rows, head, scales, chosen, adapt)
        return sums, (gradient.hidden, gradient.head)

    sums, gradient = across(compute)(rows, tables, scales, factor)
    return _with_gradient(_weighted(scales, sums, chosen, adapt), at, gradient), sums


def _weighted(scales: Scales, sums: HeadSums, chosen: TermSet, adapt: Adapt | None) -> Scalar:
    if chosen.by_confidence and adapt is not None:
        means = {name: ratio(e, sums.term_count) for name, e in sums.teacher_entropy.items()}
        scales = adapt(scales, jax.lax.stop_gradient(means))
    loss = scales[TASK] * sums.task_sum
    for term in chosen.terms:
        loss = loss + scales[term.name] * sums.terms[term.name]
    return loss


@jax.custom_vjp
def _with_gradient(value: Array, at: Any, gradient: Any) -> Array:
    """``value``, with a known derivative with respect to the arrays of ``at``."""
    del at, gradient
    return value


def _with_gradient_fwd(value: Array, at: Any, gradient: Any) -> tuple[Array, Any]:
    del at
    return value, gradient


def _with_gradient_bwd(gradient: Any, g: Array) -> tuple[None, Any, None]:
    return None, jax.tree.map(lambda part: (g * part).astype(part.dtype), gradient), None


_with_gradient.defvjp(_with_gradient_fwd, _with_gradient_bwd)


def default_memory_mib(platform: str) -> int:
    """MiB for a chunk: a CPU computes from its caches, a matrix unit wants many rows.

    >>> default_memory_mib("cpu"), default_memory_mib("tpu")
    (64, 768)
    """
    return 64 if platform == "cpu" else 768


def chunk_rows(vocabulary: int, memory: int) -> int:
    """Rows whose logits fit a budget: about four arrays ``[rows, vocabulary]`` in float32 at once.

    Args:
        vocabulary: columns on a device.
        memory: budget in bytes.

    Returns:
        A multiple of 64 between 64 and 256, which holds the head below a fifteenth of the plain
        one; larger chunks are the caller's choice.

    >>> [chunk_rows(vocabulary, 3 * 2**28) for vocabulary in (32000, 128256, 256000)]
    [256, 256, 192]
    """
    return min(max(memory // (16 * vocabulary) // 64, 1), 4) * 64


def plain_head_loss(
    rows: Rows,
    embedding: Float[Array, "V D"],
    scales: Scales,
    chosen: TermSet,
    *,
    logit_map: LogitMap = LINEAR,
    adapt: Adapt | None = None,
    original: Float[Array, "V D"] | None = None,
) -> tuple[Scalar, HeadSums]:
    """Return what :func:`head_loss` returns, by each term's own function of all logits.

    The readable reference, and ``training.head: plain``: large, and exact term by term.

    Raises:
        InputError: As :func:`head_loss`.
    """
    check(rows, embedding, chosen, 1, None, None, original)
    unchanged = True
    if original is None:
        embedding = original = jax.lax.stop_gradient(embedding)
    else:
        unchanged = jnp.all(embedding == original)
    used = (rows.label_mask | rows.term_mask)[:, None]
    logits = logit_map(head_products(jnp.where(used, rows.student, 0), embedding))
    zero = jnp.zeros((), logits.dtype)
    task, count = losses.cross_entropy(logits, rows.labels, rows.label_mask)
    term_count = jnp.sum(rows.term_mask, dtype=zero.dtype)
    teacher, entropies = None, {}
    if chosen.needs_teacher and rows.teacher is not None:
        hidden = jax.lax.stop_gradient(jnp.where(used, rows.teacher, 0))
        teacher = logit_map(head_products(hidden, jax.lax.stop_gradient(original)))
        entropies = {
            term.name: _masked_sum(
                entropy_rows(teacher, 0, term.confidence_temperature), rows.term_mask
            )
            for term in chosen.terms
            if term.name in chosen.by_confidence
        }
        # Equal hidden states have equal logits in exact arithmetic; two compiled products need not
        # agree in the last bit.
        equal = jnp.all(rows.student == rows.teacher, axis=-1, keepdims=True) & unchanged
        teacher = jax.lax.stop_gradient(jnp.where(equal, logits, teacher))
    terms = {term.name: _plain_sum(term, rows, logits, teacher) for term in chosen.terms}
    statistics = {name: zero for term in chosen.terms for name in term.statistics}
    sums = HeadSums(task, count, term_count, terms, entropies, statistics)
    return _weighted(scales, sums, chosen, adapt), sums


def _plain_sum(term: Term, rows: Rows, logits: Array, teacher: Array | None) -> Scalar:
    """The sum of a term over the rows that count, or the value of one that couples rows."""
    if term.reads == "hidden":
        return head_pass.hidden_sum(
            jax.lax.stop_gradient(rows)._replace(student=rows.student), term
        )
    mask = rows.mask_of(needs_teacher=term.needs_teacher)
    value = term.on_tokens(logits, teacher, mask)
    return value if term.couples_rows else value * jnp.sum(mask, dtype=value.dtype)


def _masked_sum(values: Array, mask: Array) -> Scalar:
    return jnp.sum(jnp.where(mask, values, 0))


def check(
    rows: Rows,
    embedding: Array,
    chosen: TermSet,
    chunk: int,
    factor: Array | None,
    logit_map: LogitMap | None,
    original: Array | None = None,
) -> None:
    """Raise InputError unless shapes and settings fit; without a ``logit_map`` no factor is due."""
    student, width = rows.student, embedding.shape[-1]
    if student.ndim != 2 or embedding.ndim != 2 or student.shape[1] != width:
        raise InputError(
            "head_loss: expected hidden states [N, D] and a head [V, D] of one width D, got "
            f"{student.shape} and {embedding.shape}. Flatten batch and time, do not transpose W."
        )
    flat = student.shape[:1]
    masks = (rows.labels.shape, rows.label_mask.shape, rows.term_mask.shape)
    if any(shape != flat for shape in masks):
        raise InputError(
            f"head_loss: expected labels, label_mask and term_mask of shape {flat}, got "
            f"{masks[0]}, {masks[1]} and {masks[2]}. Flatten them alike."
        )
    if original is not None and original.shape != embedding.shape:
        raise InputError(
            f"head_loss: expected the teacher's head in the shape of the one that trains, "
            f"{embedding.shape}, got {original.shape}. Give both the same vocabulary."
        )
    if chunk < 1:
        raise InputError(f"head_loss: expected chunk of at least 1, got {chunk}. Use 512 or more.")
    for term in chosen.terms:
        _check_term(term, rows, embedding, factor, logit_map, trains=original is not None)


def _check_term(
    term: Term,
    rows: Rows,
    embedding: Array,
    factor: Array | None,
    logit_map: LogitMap | None,
    *,
    trains: bool,
) -> None:
    shape, (columns, width) = rows.student.shape, embedding.shape
    if term.needs_teacher and (rows.teacher is None or rows.teacher.shape != shape):
        raise InputError(
            f"head_loss: expected teacher hidden states of shape {shape} for the {term.name} term, "
            f"got {None if rows.teacher is None else rows.teacher.shape}. Run the teacher or set "
            f"{term.name} to 0."
        )
    term.check_head("head_loss", columns, logit_map, trains=trains)
    linear = logit_map is not None and logit_map.soft_cap is None and not trains
    got = None if factor is None else factor.shape
    if term.needs_factor and linear and got != (width, width):
        raise InputError(
            f"head_loss: expected a factor of shape {(width, width)} for the {term.name} term, got "
            f"{got}. Make it with linalg.head_factor from the same head."
        )
