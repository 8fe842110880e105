"""What are the task loss and the regularizers of a batch, seen from its hidden states?

The logits ``Z = H Wᵀ`` of a micro-batch are the largest array of a training step. Here they exist
one chunk of tokens at a time: every sum is accumulated by a scan whose body is rematerialised, and
the spectral term uses ``singular values(H Wᵀ) = those of H Rᵀ`` with the D x D factor of the frozen
head (:func:`balora_jax.numerics.linalg.head_factor`).
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from balora_jax.array_types import Array, Bool, Float, Int, Scalar
from balora_jax.errors import InputError
from balora_jax.numerics import losses, regularizers
from balora_jax.numerics.regularizers import SpectralNorm

_HIGHEST = jax.lax.Precision.HIGHEST


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
        teacher_entropy: Compute the teacher's entropy at T (adaptive consistency weight).
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


class HeadTerms(NamedTuple):
    """Sums over one micro-batch, float32 scalars. All but ``spectral`` add over micro-batches.

    Attributes:
        task_sum: Cross-entropy summed over labelled rows, in nats.
        task_count: Labelled rows.
        consistency_sum: ``T² · KL`` summed over the rows of the terms.
        diversity_sum: Minus the entropy summed over the rows of the terms.
        term_count: Rows of the terms.
        teacher_entropy_sum: Entropy of the teacher's softmax at T over the full vocabulary, summed.
        spectral: Minus the singular value ratio of this micro-batch; a value, not a sum.
    """

    task_sum: Scalar
    task_count: Scalar
    consistency_sum: Scalar
    diversity_sum: Scalar
    term_count: Scalar
    teacher_entropy_sum: Scalar
    spectral: Scalar


class _Rows(NamedTuple):
    student: Array
    teacher: Array | None
    labels: Array
    label_mask: Array
    term_mask: Array


def head_terms(
    student: Float[Array, "N D"],
    teacher: Float[Array, "N D"] | None,
    embedding: Float[Array, "V D"],
    labels: Int[Array, "N"],
    label_mask: Bool[Array, "N"],
    term_mask: Bool[Array, "N"],
    spec: TermSpec,
    *,
    chunk: int,
    head_factor: Float[Array, "D D"] | None = None,
) -> HeadTerms:
    """Return the task loss and every term of ``spec`` from final hidden states, chunk by chunk.

    At most one chunk of student and teacher logits exists at a time, in the forward and in the
    backward pass. Logits are ``H Wᵀ`` in the dtype of the hidden states with float32 accumulation;
    float32 hidden states are multiplied at the highest precision. The gradient flows into
    ``student`` only: teacher and head are frozen. Where a row of student and teacher agrees bit for
    bit, its KL is exactly 0 with gradient 0.

    The spectral term couples the rows of this call: with several micro-batches it is a statistic of
    each one, on the global batch axis of that micro-batch.

    Args:
        student: Final hidden states of the model in training, ``[N, D]``.
        teacher: Those of the frozen model, ``[N, D]``; may be None if no term needs them, and is
            not read then.
        embedding: Frozen head, ``[V, D]``, rows are vocabulary entries.
        labels: Token to predict at each row, ``[N]``; read where ``label_mask`` is True.
        label_mask: Rows of the cross-entropy, ``[N]``.
        term_mask: Rows of the regularizers, ``[N]``.
        spec: Which terms, and their settings.
        chunk: Rows per chunk, at least 1. N need not be a multiple. 512 or more keeps a matrix
            unit busy.
        head_factor: Factor R of the head for the spectral term. With ``spec.center_rows`` pass the
            factor of the *centred* head (``linalg.head_factor(W, center=True)``): the row mean of
            ``H Wᵀ`` is ``H`` times the mean row of W, so centring is linear in H too. None forms
            the ``[N, V]`` logits for the spectral term: a reference, not for training.

    Returns:
        Float32 scalars; terms that ``spec`` leaves out are 0.

    Raises:
        InputError: If shapes do not match, the teacher is missing, or a setting is out of range.

    **Source:** the paper's NLG terms; the official code forms ``[B, T, V]`` logits of both models
    several times instead.

    >>> import jax.numpy as jnp
    >>> spec = TermSpec(False, True, False, 2.0, 0, 10, "frobenius", False, False)
    >>> yes = jnp.array([True])
    >>> terms = head_terms(
    ...     jnp.zeros((1, 3)), None, jnp.ones((8, 3)), jnp.array([5]), yes, yes, spec, chunk=4
    ... )
    >>> round(float(terms.task_sum), 4), round(float(terms.diversity_sum), 4)
    (2.0794, -2.0794)
    """
    _check(student, teacher, embedding, labels, label_mask, term_mask, spec, chunk, head_factor)
    embedding = jax.lax.stop_gradient(embedding)
    # Padding rows may hold anything, NaN included, which a product with 0 would keep.
    used = (label_mask | term_mask)[:, None]
    rows = _Rows(
        jnp.where(used, student, 0),
        jax.lax.stop_gradient(jnp.where(used, teacher, 0))
        if teacher is not None and spec.needs_teacher
        else None,
        labels,
        label_mask,
        term_mask,
    )
    zero = jnp.zeros((), jnp.promote_types(student.dtype, jnp.float32))
    sums = _scan_chunks(rows, embedding, spec, chunk, zero)
    spectral = _spectral(rows, embedding, spec, head_factor) if spec.spectral else zero
    return HeadTerms(
        task_sum=sums[0],
        task_count=jnp.sum(label_mask, dtype=zero.dtype),
        consistency_sum=sums[1],
        diversity_sum=sums[2],
        term_count=jnp.sum(term_mask, dtype=zero.dtype),
        teacher_entropy_sum=sums[3],
        spectral=spectral,
    )


def _scan_chunks(
    rows: _Rows, embedding: Array, spec: TermSpec, chunk: int, zero: Array
) -> tuple[Array, Array, Array, Array]:
    count = rows.labels.shape[0]
    size = max(1, min(chunk, count))
    chunks = max(1, -(-count // size))

    def split(array: Array) -> Array:
        padding = [(0, size * chunks - count)] + [(0, 0)] * (array.ndim - 1)
        # Strided, not contiguous: chunk i takes rows i, i + chunks, ... so that a batch axis
        # that is sharded over devices stays sharded inside every chunk.
        strided = jnp.pad(array, padding).reshape(size, chunks, *array.shape[1:])
        return jnp.swapaxes(strided, 0, 1)

    def body(carry: tuple[Array, ...], part: _Rows) -> tuple[tuple[Array, ...], None]:
        sums = _chunk_sums(part, embedding, spec, zero)
        return tuple(total + new for total, new in zip(carry, sums, strict=True)), None

    # The scan already keeps forward and backward apart, so the barrier against CSE is not needed.
    body = jax.checkpoint(body, prevent_cse=False)
    split_rows = jax.tree.map(split, rows)
    (task, consistency, diversity, entropy), _ = jax.lax.scan(body, (zero,) * 4, split_rows)
    return task, consistency, diversity, entropy


def _chunk_sums(
    rows: _Rows, embedding: Array, spec: TermSpec, zero: Array
) -> tuple[Array, Array, Array, Array]:
    logits = head_logits(rows.student, embedding)
    task = jnp.sum(losses.label_loss_rows(logits, rows.labels, rows.label_mask))
    consistency = diversity = teacher_entropy = zero

    def total(values: Array) -> Array:
        return jnp.sum(jnp.where(rows.term_mask, values, 0))

    if spec.diversity:
        diversity = -total(regularizers.entropy_rows(logits, spec.top_k))
    if rows.teacher is not None:
        teacher = head_logits(rows.teacher, embedding)
        if spec.consistency:
            kl = regularizers.kl_rows(logits, teacher, spec.temperature)
            # Equal hidden states have equal logits in exact arithmetic; two compiled products need
            # not agree in the last bit.
            equal = jnp.all(rows.student == rows.teacher, axis=-1)
            consistency = spec.temperature**2 * total(jnp.where(equal, 0, kl))
        if spec.teacher_entropy:
            teacher_entropy = total(regularizers.entropy_rows(teacher, 0, spec.temperature))
    return task, consistency, diversity, teacher_entropy


def head_logits(hidden: Float[Array, "N D"], embedding: Float[Array, "V D"]) -> Float[Array, "N V"]:
    """Return ``H Wᵀ`` in float32, multiplied in the dtype of the hidden states.

    >>> import jax.numpy as jnp
    >>> head_logits(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0]])).tolist()
    [[11.0]]
    """
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    return jnp.einsum(
        "nd,vd->nv",
        hidden,
        embedding.astype(hidden.dtype),
        preferred_element_type=wide,
        precision=_HIGHEST if hidden.dtype == wide else None,
    )


def _spectral(rows: _Rows, embedding: Array, spec: TermSpec, head_factor: Array | None) -> Array:
    hidden = jnp.where(rows.term_mask[:, None], rows.student, 0)
    if head_factor is None:
        matrix = head_logits(hidden, embedding)
        if spec.center_rows:
            matrix = regularizers.center_rows(matrix)
    else:
        # Singular values need float32 products even when the hidden states are bfloat16.
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        factor = jax.lax.stop_gradient(jnp.asarray(head_factor, wide))
        matrix = jnp.einsum("nd,ed->ne", hidden.astype(wide), factor, precision=_HIGHEST)
    return -regularizers.spectral_ratio(matrix, spec.k, spec.norm)


def _check(
    student: Array,
    teacher: Array | None,
    embedding: Array,
    labels: Array,
    label_mask: Array,
    term_mask: Array,
    spec: TermSpec,
    chunk: int,
    head_factor: Array | None,
) -> None:
    if student.ndim != 2 or embedding.ndim != 2 or student.shape[1] != embedding.shape[1]:
        raise InputError(
            "head_terms: expected hidden states [N, D] and a head [V, D] of one width D, got "
            f"{student.shape} and {embedding.shape}. Flatten batch and time, do not transpose W."
        )
    flat = student.shape[:1]
    if not labels.shape == label_mask.shape == term_mask.shape == flat:
        raise InputError(
            f"head_terms: expected labels, label_mask and term_mask of shape {flat}, got "
            f"{labels.shape}, {label_mask.shape} and {term_mask.shape}. Flatten them alike."
        )
    if spec.needs_teacher and (teacher is None or teacher.shape != student.shape):
        raise InputError(
            f"head_terms: expected teacher hidden states of shape {student.shape} for the "
            f"consistency term, got {None if teacher is None else teacher.shape}. Run the teacher "
            "or set consistency to 0."
        )
    if chunk < 1:
        raise InputError(f"head_terms: expected chunk of at least 1, got {chunk}. Use 512 or more.")
    if head_factor is not None and head_factor.shape != (student.shape[1],) * 2:
        raise InputError(
            f"head_terms: expected a head_factor of shape {(student.shape[1],) * 2}, got "
            f"{head_factor.shape}. Make it with linalg.head_factor from the same head."
        )
    regularizers.check_temperature("head_terms", spec.temperature)
    regularizers.check_top_k("head_terms", spec.top_k if spec.diversity else 0, embedding.shape[0])
    regularizers.check_spectral("head_terms", spec.k, spec.norm)
