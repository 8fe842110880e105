"""The loss of one micro-batch of a causal language model: task, teacher and terms."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from balora_jax.array_types import Array, Bool, Float, Int, PRNGKeyArray, Scalar
from balora_jax.models.decoder import Decoder
from balora_jax.models.structure import Structure
from balora_jax.numerics import head, objective
from balora_jax.numerics.arithmetic import ratio
from balora_jax.numerics.head_pass import Adapt, Scales
from balora_jax.numerics.head_types import ONE_DEVICE, HeadAxes, HeadSums, Rows
from balora_jax.numerics.objective import Objective
from balora_jax.tasks.text.sample import RowSample, Share

Arrays = dict[str, Array]
Batch = dict[str, Array]
Parts = dict[str, Scalar]


HIDDEN = "teacher_hidden"
"""Key of a batch that brings its teacher's final hidden states [B, T, D] along."""


class Constants(NamedTuple):
    """Arrays that a step reads and never changes.

    Attributes:
        frozen: the checkpoint's weights by path.
        origin: scales and frozen starts of the adapters.
        head_factor: R [D, D] with σ(H Wᵀ) = σ(H Rᵀ); None where no term reads it, or the head
            trains.
        start: what trains, as it was at step 0, where that is the teacher; None where the
            checkpoint's weights are.
    """

    frozen: Arrays
    origin: Arrays
    head_factor: Float[Array, "D D"] | None
    start: Arrays | None = None

    @property
    def of_teacher(self) -> tuple[Arrays, ...]:
        """The arrays that the teacher is bound to."""
        if self.start is None:
            return (self.frozen,)
        return self.frozen, self.origin, self.start


class Targets(NamedTuple):
    """Next-token labels of a micro-batch and the positions that count, flat over N = B·T."""

    labels: Int[Array, "N"]
    task_mask: Bool[Array, "N"]
    term_mask: Bool[Array, "N"]


def targets_of(
    batch: Batch, mask_alignment: str, flatten: Callable[[Array], Array] = jnp.ravel
) -> Targets:
    """Shift a micro-batch so that position t is scored on token t + 1 of the same segment.

    ``loss_mask`` marks the tokens to be predicted. The regularizers use the same positions
    (``shifted``), or the marked tokens' own positions (``official``). ``flatten`` gives the order
    of the rows N, [B, T] to [N].

    Source: ``official`` is the authors' code, which drops the position that predicts the first
    response token and keeps the one after EOS.
    """
    task_mask, term_mask = _positions(batch, mask_alignment)
    labels = jnp.roll(batch["input_ids"], -1, axis=-1)
    return Targets(flatten(labels), flatten(task_mask), flatten(term_mask))


def _positions(
    batch: Batch, mask_alignment: str
) -> tuple[Bool[Array, "... T"], Bool[Array, "... T"]]:
    """Where the task and where the regularizers count."""
    marked, segments = batch["loss_mask"] > 0, batch["segment_ids"]
    same_segment = jnp.roll(segments, -1, axis=-1) == segments
    marked_next = jnp.roll(marked, -1, axis=-1) & same_segment
    task_mask = marked_next.at[..., -1].set(False)
    return task_mask, marked if mask_alignment == "official" else task_mask


class Counts(NamedTuple):
    """Positions over all devices and micro-batches of a step, the divisors of every mean."""

    task: Scalar
    term: Scalar
    micro_batches: int

    @property
    def tokens(self) -> Scalar:
        """Tokens in the loss."""
        return self.task


def counts_of(batch: Batch, mask_alignment: str) -> Counts:
    """Global counts of a batch [micro-batches, B, T]."""
    task_mask, term_mask = _positions(batch, mask_alignment)
    return Counts(jnp.sum(task_mask), jnp.sum(term_mask), batch["input_ids"].shape[0])


READ = ("input_ids", "positions", "segment_ids")
"""Keys of what a model reads of a batch."""


def tokens_of(batch: Batch) -> tuple[Array, ...]:
    """What a model reads of a micro-batch."""
    return tuple(batch[name] for name in READ)


def merged(x: Array) -> Array:
    """[B, T, …] as [N, …], row after row."""
    return x.reshape(-1, *x.shape[2:])


@dataclass(frozen=True)
class HeadPlan:
    """Plan of the head's pass on the devices.

    Attributes:
        kind: ``fused``, chunk by chunk with the gradient formed beside the values, or ``plain``,
            all logits at once and automatic derivatives.
        chunk: rows per chunk on a device; not read by ``plain``.
        axes: mesh axes that are manual inside ``across``.
        across: runs the pass on every device's own rows and vocabulary.
        layout: lays rows and heads out for ``plain``.
        flatten: [B, T, …] to [N, …] in an order that keeps every device's tokens with it.
    """

    kind: Literal["fused", "plain"]
    chunk: int
    axes: HeadAxes = ONE_DEVICE
    across: Callable[[Callable[..., Any]], Callable[..., Any]] = head.unwrapped
    layout: Callable[[Rows, Any], tuple[Rows, Any]] = lambda rows, tables: (rows, tables)
    flatten: Callable[[Array], Array] = merged


@dataclass(frozen=True)
class TextLoss:
    """The objective on one micro-batch (a pure function of arrays).

    Attributes:
        student: structure with adapters.
        teacher: the same structure without them, bound to the same frozen arrays; or the
            student's own, bound to what it started from.
        objective: weights, temperatures and schedules.
        head: how the pass over the logits runs.
        trains_head: the table that scores the vocabulary trains; the teacher keeps its own.
        share: of the rows, on which terms that read the teacher are computed; None for all.
        drops: a key is for dropout as well, not for the sample alone.
    """

    student: Structure
    teacher: Structure
    objective: Objective
    head: HeadPlan
    trains_head: bool = False
    share: Share | None = None
    drops: bool = True

    def __call__(
        self,
        adapters: Arrays,
        constants: Constants,
        batch: Batch,
        counts: Counts,
        weights: dict[str, Scalar],
        key: PRNGKeyArray | None,
        emphasis: Scales | None = None,
    ) -> tuple[Scalar, Parts]:
        """This micro-batch's share of the step's loss, and its named parts.

        The parts add up over micro-batches to the logged values. A term whose weight is 0 is not
        in the program, nor the teacher if nothing needs it. ``emphasis`` multiplies each term's
        place in the loss, for gradients of single terms.
        """
        targets = targets_of(batch, self.objective.mask_alignment, self.head.flatten)
        sample = None if self.share is None else self.share.of(batch["input_ids"].shape[0])
        teacher, taught = self._teacher(constants, batch, sample, key)
        # After the teacher, so that nothing of the student waits in memory meanwhile.
        student = self._student(adapters, constants, batch, key)
        rows = Rows(student, teacher, *targets, taught)
        module = self.student.bind(constants.frozen, constants.origin, adapters)
        divisors = {
            "task_count": counts.task,
            "term_count": counts.term,
            "micro_batches": counts.micro_batches,
        }
        scaled = functools.partial(objective.scales, self.objective, **divisors)
        confident = functools.partial(
            objective.confident, self.objective, columns=module.head.shape[0]
        )

        def adapt(scales: Scales, mean_entropy: dict[str, Scalar]) -> Scales:
            return scales | scaled(confident(mean_entropy)) if mean_entropy else scales

        scales = self._of_all(scaled(weights), sample)
        loss, sums = self._head_loss(rows, module, constants, scales, emphasis, adapt)
        sums = sums._replace(terms=self._of_all(sums.terms, sample))
        means = {name: ratio(e, sums.term_count) for name, e in sums.teacher_entropy.items()}
        found = {k: v / counts.micro_batches for k, v in confident(means).items()}
        return loss, objective.parts(self.objective, sums, **divisors) | objective.columns_of(found)

    def _of_all(self, values: Scales, sample: RowSample | None) -> Scales:
        """Sums or scales by name, of terms that read a sample for all rows that it stands for."""
        if sample is None:
            return values
        terms, factor = self.objective.term_set.terms, sample.factor
        sampled = [term.name for term in terms if term.needs_teacher]
        return values | {name: values[name] * factor for name in sampled}

    def _student(
        self, adapters: Arrays, constants: Constants, batch: Batch, key: PRNGKeyArray | None
    ) -> Float[Array, "N D"]:
        """Final hidden states of the model in training."""
        module = self.student.bind(constants.frozen, constants.origin, adapters)
        return self.head.flatten(module.hidden(*tokens_of(batch), key if self.drops else None))

    def _teacher(
        self,
        constants: Constants,
        batch: Batch,
        sample: RowSample | None,
        key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "N D"] | None, Bool[Array, "N"] | None]:
        """Those of the teacher, if a term reads them, and the rows that have them, None for all."""
        if not self.objective.needs_teacher:
            return None, None
        if sample is None:
            return self.head.flatten(self._taught(constants, batch, tokens_of(batch))), None
        assert key is not None  # a step with a share wants one
        drawn = sample.draw(key)
        mask = sample.mask(drawn)[:, None]
        taught = self.head.flatten(jnp.broadcast_to(mask, batch["input_ids"].shape))
        arrays = tuple(sample.take(array, drawn) for array in tokens_of(batch))
        hidden = self._taught(constants, batch, arrays)
        if HIDDEN not in batch:
            hidden = sample.put_back(hidden, drawn)
        return self.head.flatten(hidden), taught

    def _taught(
        self, constants: Constants, batch: Batch, arrays: tuple[Array, ...]
    ) -> Float[Array, "... D"]:
        """The teacher's final hidden states: those that the batch brings, or of these tokens."""
        if HIDDEN in batch:
            return batch[HIDDEN]
        return jax.lax.stop_gradient(self.teacher.bind(*constants.of_teacher).hidden(*arrays))

    def _head_loss(
        self,
        rows: Rows,
        module: Decoder,
        constants: Constants,
        scales: Scales,
        emphasis: Scales | None,
        adapt: Adapt,
    ) -> tuple[Scalar, HeadSums]:
        def emphasised(scales: Scales, mean_entropy: dict[str, Scalar]) -> Scales:
            scales = adapt(scales, mean_entropy)
            if emphasis is None:
                return scales
            return {name: scale * emphasis[name] for name, scale in scales.items()}

        chosen = self.objective.term_set
        original = self.teacher.bind(*constants.of_teacher).head if self.trains_head else None
        if not chosen.by_confidence:
            scales = emphasised(scales, {})
        if self.head.kind == "plain":
            rows, (table, original) = self.head.layout(rows, (module.head, original))
            return head.plain_head_loss(
                rows,
                table,
                scales,
                chosen,
                logit_map=module.logit_map,
                adapt=emphasised,
                original=original,
            )
        return head.head_loss(
            rows,
            module.head,
            scales,
            chosen,
            chunk=self.head.chunk,
            factor=constants.head_factor,
            logit_map=module.logit_map,
            adapt=emphasised,
            axes=self.head.axes,
            across=self.head.across,
            original=original,
        )
