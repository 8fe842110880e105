"""The loss of one micro-batch of labelled rows: task, teacher and the three terms."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from balora_jax.array_types import Array, Float, PRNGKeyArray, Scalar
from balora_jax.models.structure import Structure
from balora_jax.numerics import losses, regularizers
from balora_jax.numerics.logit_terms import TermScales, TermSpec
from balora_jax.numerics.objective import Objective, adaptive_weight
from balora_jax.numerics.regularizers import ConsistencyForm

Arrays = dict[str, Array]
Batch = Mapping[str, Array]
Parts = dict[str, Scalar]

TEACHER = "teacher_logits"
"""Key of a batch that brings its teacher's logits [B, C] along."""


class Constants(NamedTuple):
    """What a step reads and never changes.

    Attributes:
        frozen: the checkpoint's weights by path.
        origin: scales and frozen starts of the adapters.
        teacher_head: the frozen head of the teacher.
    """

    frozen: Arrays
    origin: Arrays
    teacher_head: Arrays


class Counts(NamedTuple):
    """Over all devices and micro-batches of a step: labelled rows, tokens, micro-batches."""

    task: Scalar
    tokens: Scalar
    micro_batches: int


def counts_of(batch: Batch) -> Counts:
    """Global counts of a batch [micro-batches, B, …]; every row has a label."""
    labels = batch["labels"]
    tokens = jnp.sum(batch["attention_mask"])
    return Counts(jnp.float32(labels.size), tokens, labels.shape[0])


def consistency_form(variant: str, outputs: int) -> ConsistencyForm:
    """The published form of the consistency term; with one output plain squared differences.

    A softmax over one column is 1 whatever the logit, and a row of one number scaled to length 1
    keeps its sign only, so for a regression both published forms say nothing.
    """
    if outputs == 1:
        return "mse"
    return "normalized_mse" if variant == "arxiv_v1" else "kl"


def spectral_remarks(spec: TermSpec, rows: int, outputs: int) -> list[str]:
    """A warning where the nuclear ratio takes in every singular value of a batch."""
    # Rows less their mean lie in a space of one dimension less.
    most = min(rows, outputs - 1 if spec.center_rows else outputs)
    if not spec.spectral or spec.norm != "nuclear" or spec.k < most:
        return []
    advice = {1: "Set regularizers.spectral to 0.", 2: "Use k = 1."}
    centred = " with regularizers.center_rows" if spec.center_rows else ""
    return [
        f"warning: regularizers.k = {spec.k} takes all {most} singular values of a batch of "
        f"{rows} rows and {outputs} classes{centred}: the spectral term is the constant -1 and "
        f"has no gradient. {advice.get(most, f'Use k below {most}.')}"
    ]


@dataclass(frozen=True)
class LabelsLoss:
    """The objective on one micro-batch (a pure function of arrays).

    Attributes:
        student: structure with adapters and head.
        teacher: the structure without adapters, for batches that bring no teacher logits.
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
        weights: tuple[Scalar, Scalar, Scalar],
        dropout_key: PRNGKeyArray | None,
        emphasis: TermScales | None = None,
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
        values = {"task_loss": self.task_sum(logits, batch["labels"]) / counts.task}
        values |= {name: share * value for name, value in self._terms(logits, teacher).items()}
        lambda1 = self._lambda1(weights[0], teacher)
        factors = TermScales(jnp.float32(1), lambda1, *weights[1:])
        if emphasis is not None:
            factors = jax.tree.map(jnp.multiply, factors, emphasis)
        loss = sum(factor * value for factor, value in zip(factors, values.values(), strict=True))
        return jnp.asarray(loss), values | {"lambda1": share * lambda1}

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
        module = self.teacher.bind(constants.frozen, constants.teacher_head)
        arrays = (batch[name] for name in ("input_ids", "attention_mask", "token_type_ids"))
        return jax.lax.stop_gradient(module(*arrays))

    def _terms(self, logits: Float[Array, "B C"], teacher: Array | None) -> Parts:
        """The three terms of this micro-batch, unweighted; 0 where a term is off."""
        spec, zero = self.objective.term_spec, jnp.zeros((), jnp.float32)
        consistency = diversity = spectral = zero
        if teacher is not None:
            form = consistency_form(self.objective.variant, self.outputs)
            consistency = regularizers.consistency_nlu(
                logits, teacher, temperature=spec.temperature, form=form
            )
        if spec.diversity:
            diversity = regularizers.diversity_nlu(logits)
        if spec.spectral:
            rows = regularizers.center_rows(logits) if spec.center_rows else logits
            spectral = regularizers.spectral_nlu(rows, k=spec.k, norm=spec.norm)
        return {"consistency": consistency, "diversity": diversity, "spectral": spectral}

    def _lambda1(self, lambda1: Scalar, teacher: Array | None) -> Scalar:
        spec = self.objective.term_spec
        if teacher is None or not spec.teacher_entropy:
            return lambda1
        entropy = regularizers.entropy_rows(teacher, 0, spec.temperature)
        return adaptive_weight(self.objective, jnp.mean(entropy), self.outputs)
