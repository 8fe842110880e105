"""The loss of one micro-batch of rows with labels: task, teacher and terms."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from balora_jax.array_types import Array, Float, PRNGKeyArray, Scalar
from balora_jax.models.structure import Structure
from balora_jax.numerics import losses, objective
from balora_jax.numerics.objective import TASK, Objective
from balora_jax.numerics.softmax import entropy_rows
from balora_jax.numerics.terms import TERMS

Arrays = dict[str, Array]
Batch = Mapping[str, Array]
Parts = dict[str, Scalar]

TEACHER = "teacher_logits"
"""Key of a batch that brings its teacher's logits [B, C] along."""


class Constants(NamedTuple):
    """Arrays that a step reads and never changes.

    Attributes:
        frozen: the checkpoint's weights by path.
        origin: scales and frozen starts of the adapters.
        teacher_head: the frozen head of the teacher.
        start: what trains in the encoder, as it was at step 0, where that is the teacher; None
            where the checkpoint's weights are.
    """

    frozen: Arrays
    origin: Arrays
    teacher_head: Arrays
    start: Arrays | None = None

    @property
    def of_teacher(self) -> tuple[Arrays, ...]:
        """The arrays that the teacher is bound to."""
        if self.start is None:
            return self.frozen, self.teacher_head
        return self.frozen, self.origin, self.start, self.teacher_head


class Counts(NamedTuple):
    """Over all devices and micro-batches of a step: rows with labels, tokens, micro-batches."""

    task: Scalar
    tokens: Scalar
    micro_batches: int


def counts_of(batch: Batch) -> Counts:
    """Global counts of a batch [micro-batches, B, …]; every row has a label."""
    labels = batch["labels"]
    tokens = jnp.sum(batch["attention_mask"])
    return Counts(jnp.float32(labels.size), tokens, labels.shape[0])


@dataclass(frozen=True)
class LabelsLoss:
    """The objective on one micro-batch (a pure function of arrays).

    Attributes:
        student: structure with adapters and head.
        teacher: the structure without adapters, or the student's own where the teacher is the
            start; for batches that bring no teacher logits.
        objective: weights, temperatures and schedules; terms that one output leaves undefined have
            the weight 0.
        outputs: C; 1 for regression.
    """

    student: Structure
    teacher: Structure
    objective: Objective
    outputs: int

    def __call__(
        self,
        trainable: Arrays,
        constants: Constants,
        batch: Batch,
        counts: Counts,
        weights: dict[str, Scalar],
        dropout_key: PRNGKeyArray | None,
        emphasis: dict[str, Scalar] | None = None,
    ) -> tuple[Scalar, Parts]:
        """This micro-batch's share of the step's loss, and its named parts.

        The parts add up over micro-batches to the logged values; a mean over rows, a covariance
        and singular values are all statistics of the micro-batch on the whole batch axis. A term
        whose weight is 0 is not in the program. ``emphasis`` multiplies each term's place in the
        loss.
        """
        arrays = [batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")]
        teacher = self._teacher_logits(constants, batch)
        student = self.student.bind(constants.frozen, constants.origin, trainable)
        logits = student(*arrays, dropout_key=dropout_key)
        share = 1.0 / counts.micro_batches
        values = {TASK: self.task_sum(logits, batch["labels"]) / counts.task}
        values |= {name: share * value for name, value in self.terms(logits, teacher).items()}
        confident = self._confident(teacher)
        factors = {TASK: jnp.float32(1), **weights, **confident}
        if emphasis is not None:
            factors = {name: factor * emphasis[name] for name, factor in factors.items()}
        loss = sum(factors[name] * value for name, value in values.items())
        columns = objective.columns_of({k: share * v for k, v in confident.items()})
        return jnp.asarray(loss), values | columns

    def task_sum(self, logits: Float[Array, "B C"], labels: Array) -> Scalar:
        """Summed cross-entropy of the classes, or squared error of the scores."""
        everywhere = jnp.ones(labels.shape, bool)
        if self.outputs == 1:
            return losses.mean_squared_error(logits[:, 0], labels, everywhere)[0]
        return losses.cross_entropy(logits, labels, everywhere)[0]

    def _teacher_logits(self, constants: Constants, batch: Batch) -> Float[Array, "B C"] | None:
        if not self.objective.needs_teacher:
            return None
        if TEACHER in batch:
            return batch[TEACHER]
        module = self.teacher.bind(*constants.of_teacher)
        arrays = (batch[name] for name in ("input_ids", "attention_mask", "token_type_ids"))
        return jax.lax.stop_gradient(module(*arrays))

    def terms(self, logits: Float[Array, "B C"], teacher: Array | None) -> Parts:
        """Every term of this micro-batch, unweighted; 0 where a term is off."""
        found = dict.fromkeys(TERMS, jnp.zeros((), jnp.float32))
        for term in self.objective.term_set.terms:
            found[term.name] = term.on_classes(logits, teacher)
        return found

    def _confident(self, teacher: Array | None) -> Parts:
        """The weights that follow the teacher's confidence on this micro-batch, by name."""
        means = {}
        for term in self.objective.term_set.terms:
            if term.name in self.objective.term_set.by_confidence and teacher is not None:
                entropy = entropy_rows(teacher, 0, term.confidence_temperature)
                means[term.name] = jnp.mean(entropy)
        return objective.confident(self.objective, means, self.outputs)
