"""The loss of one micro-batch of a causal language model: task, teacher and the three terms."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from balora_jax.array_types import Array, Bool, Float, Int, PRNGKeyArray, Scalar
from balora_jax.models.decoder import Structure
from balora_jax.numerics import head, objective
from balora_jax.numerics.objective import Objective

Arrays = dict[str, Array]
Batch = dict[str, Array]
Parts = dict[str, Scalar]


class Constants(NamedTuple):
    """What a step reads and never changes.

    Attributes:
        frozen: the checkpoint's weights by path; they are the teacher.
        origin: scales and frozen starts of the adapters.
        head_factor: R [D, D] with σ(H Wᵀ) = σ(H Rᵀ); None where no spectral term is on.
    """

    frozen: Arrays
    origin: Arrays
    head_factor: Float[Array, "D D"] | None


class Targets(NamedTuple):
    """Next-token labels of a micro-batch and the positions that count, flat over N = B·T."""

    labels: Int[Array, "N"]
    task_mask: Bool[Array, "N"]
    term_mask: Bool[Array, "N"]


def targets_of(batch: Batch, mask_alignment: str) -> Targets:
    """Shift a micro-batch so that position t is scored on token t + 1 of the same segment.

    ``loss_mask`` marks the tokens to be predicted. The regularizers use the same positions
    (``shifted``), or the marked tokens' own positions (``official``).

    Source: ``official`` is the authors' code, which drops the position that predicts the first
    response token and keeps the one after EOS.
    """
    ids, marked, segments = batch["input_ids"], batch["loss_mask"] > 0, batch["segment_ids"]
    labels = jnp.roll(ids, -1, axis=-1)
    same_segment = jnp.roll(segments, -1, axis=-1) == segments
    marked_next = jnp.roll(marked, -1, axis=-1) & same_segment
    task_mask = marked_next.at[..., -1].set(False)
    term_mask = marked if mask_alignment == "official" else task_mask
    return Targets(labels.reshape(-1), task_mask.reshape(-1), term_mask.reshape(-1))


class Counts(NamedTuple):
    """Positions over all devices and micro-batches of a step, the divisors of every mean."""

    task: Scalar
    term: Scalar
    micro_batches: int


def counts_of(batch: Batch, mask_alignment: str) -> Counts:
    """Global counts of a batch [micro-batches, B, T]."""
    targets = targets_of(batch, mask_alignment)
    micro_batches = batch["input_ids"].shape[0]
    return Counts(jnp.sum(targets.task_mask), jnp.sum(targets.term_mask), micro_batches)


@dataclass(frozen=True)
class CausalLoss:
    """The objective on one micro-batch (a pure function of arrays).

    Attributes:
        student: structure with adapters.
        teacher: the same structure without them, bound to the same frozen arrays.
        objective: weights, temperatures and schedules.
        chunk: tokens whose logits exist at the same time.
        head_constraint: lays the head out for the pass over chunks (once, not per chunk).
    """

    student: Structure
    teacher: Structure
    objective: Objective
    chunk: int
    head_constraint: Callable[[Array], Array] = lambda table: table

    def __call__(
        self,
        adapters: Arrays,
        constants: Constants,
        batch: Batch,
        counts: Counts,
        weights: tuple[Scalar, Scalar, Scalar],
        dropout_key: PRNGKeyArray | None,
    ) -> tuple[Scalar, Parts]:
        """This micro-batch's share of the step's loss, and its named parts.

        The parts add up over micro-batches to the logged values. A term whose weight is 0 is not
        in the program, nor the teacher if nothing needs it.
        """
        module = self.student.bind(constants.frozen, constants.origin, adapters)
        arrays = (batch["input_ids"], batch["positions"], batch["segment_ids"])
        student = module.hidden(*arrays, dropout_key)
        teacher = None
        if self.objective.needs_teacher:
            teacher = self.teacher.bind(constants.frozen).hidden(*arrays)
            teacher = jax.lax.stop_gradient(teacher).reshape(-1, teacher.shape[-1])
        targets = targets_of(batch, self.objective.mask_alignment)
        table = self.head_constraint(module.head)
        terms = head.head_terms(
            student.reshape(-1, student.shape[-1]),
            teacher,
            table,
            targets.labels,
            targets.task_mask,
            targets.term_mask,
            self.objective.term_spec,
            chunk=self.chunk,
            head_factor=constants.head_factor,
        )
        loss, parts = objective.combine(
            self.objective,
            terms,
            weights,
            task_count=counts.task,
            term_count=counts.term,
            vocabulary=table.shape[0],
            micro_batches=counts.micro_batches,
        )
        # Every part is summed over micro-batches; for the weight that makes a mean.
        return loss, parts | {"lambda1": parts["lambda1"] / counts.micro_batches}
