"""What are the task loss and the regularizers of a batch, and their gradient by hidden states?

:func:`head_loss` runs the pass of :mod:`balora_jax.numerics.head_pass`, which never holds all
logits; :func:`plain_head_loss` is the same from all ``[N, V]`` logits by automatic derivatives.
The head is frozen and gets no gradient.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from balora_jax.array_types import Array, Float, Scalar
from balora_jax.errors import InputError
from balora_jax.numerics import head_pass, losses, regularizers
from balora_jax.numerics.head_pass import (
    Adapt,
    Head,
    HeadAxes,
    HeadTerms,
    LogitMap,
    Rows,
    head_products,
    mean_of,
)
from balora_jax.numerics.logit_terms import TermScales, TermSpec

LINEAR, ONE_DEVICE = LogitMap(), HeadAxes()


def unwrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """The pass as it is, on one device."""
    return function


def head_loss(
    rows: Rows,
    embedding: Float[Array, "V D"],
    scales: TermScales,
    spec: TermSpec,
    *,
    chunk: int,
    factor: Float[Array, "D D"] | None = None,
    logit_map: LogitMap = LINEAR,
    adapt: Adapt | None = None,
    axes: HeadAxes = ONE_DEVICE,
    across: Callable[[Callable[..., Any]], Callable[..., Any]] = unwrapped,
) -> tuple[Scalar, HeadTerms]:
    """Return ``Σ scale · term`` with its gradient by ``rows.student``, and the terms.

    At most one chunk of student and teacher logits exists at a time. Logits are products in the
    dtype of the hidden states with float32 accumulation, float32 hidden states at the highest
    precision; ``d loss / d Z`` is rounded to the dtype of the hidden states before its product.
    Only the first result carries a gradient, and only by ``rows.student``. Where a row of student
    and teacher agrees bit for bit, its divergence is exactly 0 with gradient 0.

    The spectral term couples the rows of this call: with several micro-batches it is a statistic of
    each one, over all devices.

    Args:
        rows: The micro-batch.
        embedding: Frozen head, ``[V, D]``, rows are vocabulary entries.
        scales: Factor of each term in the loss.
        spec: Which terms, and their settings.
        chunk: Rows per chunk on a device, at least 1. N need not be a multiple.
        factor: Factor R of the head for the spectral term, with ``spec.center_rows`` that of the
            *centred* head (``linalg.head_factor(W, center=True)``): centring is linear in H too.
            Not read, and may be None, where the term is off or logits have a soft cap.
        logit_map: From products to logits.
        adapt: Gives the scales of this micro-batch by its teacher's entropy; read and needed where
            ``spec.teacher_entropy``.
        axes: Mesh axes that ``across`` makes manual.
        across: Wraps the computation, such as in ``jax.shard_map``; it takes and returns
            ``(rows, embedding, scales, factor) -> (terms, gradient [N, D])``.

    Raises:
        InputError: If shapes do not match, the teacher or the factor is missing, or a setting is
            out of range.

    **Source:** the paper's NLG terms; the official code forms ``[B, T, V]`` logits of both models
    several times instead. Gradient in the forward pass: an idea of fused cross-entropy kernels.

    >>> import jax.numpy as jnp
    >>> spec = TermSpec(False, True, False, 2.0, 0, 10, "frobenius", False, False)
    >>> yes, one = jnp.array([True]), jnp.float32(1)
    >>> rows = Rows(jnp.zeros((1, 3)), None, jnp.array([5]), yes, yes)
    >>> scales = TermScales(one, one, one, one)
    >>> loss, terms = head_loss(rows, jnp.ones((8, 3)), scales, spec, chunk=4)
    >>> round(float(terms.task_sum), 4), round(float(terms.diversity_sum), 4), abs(loss) < 1e-5
    (2.0794, -2.0794, Array(True, dtype=bool))
    """
    check(rows, embedding, spec, chunk, factor, logit_map)
    student = rows.student
    # Constants from here on: the gradient is formed by hand and attached at the end.
    rows, embedding, scales, factor = jax.lax.stop_gradient((rows, embedding, scales, factor))
    if not spec.needs_teacher:
        rows = rows._replace(teacher=None)

    def compute(
        rows: Rows, embedding: Array, scales: TermScales, factor: Array | None
    ) -> tuple[HeadTerms, Array]:
        head = Head(embedding, factor, logit_map, chunk, axes)
        return head_pass.terms_and_gradient(rows, head, scales, spec, adapt)

    terms, gradient = across(compute)(rows, embedding, scales, factor)
    return _with_gradient(_weighted(scales, terms, spec, adapt), student, gradient), terms


def _weighted(scales: TermScales, terms: HeadTerms, spec: TermSpec, adapt: Adapt | None) -> Scalar:
    if spec.teacher_entropy and adapt is not None:
        mean = mean_of(terms.teacher_entropy_sum, terms.term_count)
        scales = adapt(scales, jax.lax.stop_gradient(mean))
    sums = (terms.task_sum, terms.consistency_sum, terms.diversity_sum, terms.spectral)
    return sum((a * b for a, b in zip(scales, sums, strict=True)), jnp.zeros((), sums[0].dtype))


@jax.custom_vjp
def _with_gradient(value: Array, at: Array, gradient: Array) -> Array:
    """``value``, with a known derivative by ``at``."""
    del at, gradient
    return value


def _with_gradient_fwd(value: Array, at: Array, gradient: Array) -> tuple[Array, Array]:
    del at
    return value, gradient


def _with_gradient_bwd(gradient: Array, g: Array) -> tuple[None, Array, None]:
    return None, (g * gradient).astype(gradient.dtype), None


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
    scales: TermScales,
    spec: TermSpec,
    *,
    logit_map: LogitMap = LINEAR,
    adapt: Adapt | None = None,
) -> tuple[Scalar, HeadTerms]:
    """Return what :func:`head_loss` returns from all ``[N, V]`` logits, by automatic derivatives.

    The readable reference, and ``training.head: plain``: large, and exact term by term.

    Raises:
        InputError: As :func:`head_loss`.
    """
    check(rows, embedding, spec, 1, None, None)
    embedding = jax.lax.stop_gradient(embedding)
    used = (rows.label_mask | rows.term_mask)[:, None]
    logits = logit_map(head_products(jnp.where(used, rows.student, 0), embedding))
    zero = jnp.zeros((), logits.dtype)
    task, count = losses.cross_entropy(logits, rows.labels, rows.label_mask)
    consistency = diversity = entropy = ratio = zero

    def total(values: Array) -> Array:
        return jnp.sum(jnp.where(rows.term_mask, values, 0))

    if spec.needs_teacher and rows.teacher is not None:
        teacher = jax.lax.stop_gradient(jnp.where(used, rows.teacher, 0))
        teacher_logits = logit_map(head_products(teacher, embedding))
        # Equal hidden states have equal logits in exact arithmetic; two compiled products need not
        # agree in the last bit.
        equal = jnp.all(rows.student == rows.teacher, axis=-1)
        if spec.consistency:
            divergence = regularizers.kl_rows(logits, teacher_logits, spec.temperature)
            consistency = spec.temperature**2 * total(jnp.where(equal, 0, divergence))
        if spec.teacher_entropy:
            entropy = total(regularizers.entropy_rows(teacher_logits, 0, spec.temperature))
    if spec.diversity:
        diversity = -total(regularizers.entropy_rows(logits, spec.top_k))
    if spec.spectral:
        matrix = regularizers.center_rows(logits) if spec.center_rows else logits
        matrix = jnp.where(rows.term_mask[:, None], matrix, 0)
        ratio = -regularizers.spectral_ratio(matrix, spec.k, spec.norm)
    term_count = jnp.sum(rows.term_mask, dtype=zero.dtype)
    terms = HeadTerms(task, count, consistency, diversity, term_count, entropy, ratio, zero)
    return _weighted(scales, terms, spec, adapt), terms


def check(
    rows: Rows,
    embedding: Array,
    spec: TermSpec,
    chunk: int,
    factor: Array | None,
    logit_map: LogitMap | None,
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
    if spec.needs_teacher and (rows.teacher is None or rows.teacher.shape != student.shape):
        raise InputError(
            f"head_loss: expected teacher hidden states of shape {student.shape} for the "
            f"consistency term, got {None if rows.teacher is None else rows.teacher.shape}. Run "
            "the teacher or set consistency to 0."
        )
    if chunk < 1:
        raise InputError(f"head_loss: expected chunk of at least 1, got {chunk}. Use 512 or more.")
    if spec.spectral and logit_map is not None:
        _check_factor(spec, factor, width, logit_map)
    regularizers.check_temperature("head_loss", spec.temperature)
    regularizers.check_top_k("head_loss", spec.top_k if spec.diversity else 0, embedding.shape[0])
    regularizers.check_spectral("head_loss", spec.k, spec.norm)


def _check_factor(spec: TermSpec, factor: Array | None, width: int, logit_map: LogitMap) -> None:
    if logit_map.soft_cap is not None and spec.norm == "nuclear":
        raise InputError(
            "head_loss: expected norm frobenius where logits have a soft cap, got nuclear, which "
            "needs all singular values of [N, V]. Change the norm, or set training.head to plain."
        )
    got = None if factor is None else factor.shape
    if logit_map.soft_cap is None and got != (width, width):
        raise InputError(
            f"head_loss: expected a factor of shape {(width, width)} for the spectral term, got "
            f"{got}. Make it with linalg.head_factor from the same head."
        )
