"""The loss and the terms of an encoder on held-out rows with labels."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from balora_jax.array_types import Array, Float
from balora_jax.data.labels import LabelsExample
from balora_jax.numerics.objective import TASK
from balora_jax.parallel import hosts
from balora_jax.tasks.labels.loss import Arrays, Constants, LabelsLoss

OverRows = Callable[[Any, Any, Sequence[LabelsExample], str], np.ndarray]
"""``(forward, parts, examples, title)`` → what a jitted forward gives of every row, in order."""


class LabelsValidator:
    """Loss and terms of held-out rows.

    The loss is the mean over all rows. A term is a statistic of a micro-batch: here of as many rows
    as one of the training has, in their order, and of the micro-batches the mean by their rows.

    Args:
        loss: of the training.
        forward, taught: jitted forwards of the model and of its teacher, for ``over_rows``.
        examples: the held-out rows.
        micro_batch: rows of a micro-batch.
        over_rows: runs them.
    """

    def __init__(
        self,
        loss: LabelsLoss,
        forward: Any,
        taught: Any,
        examples: Sequence[LabelsExample],
        *,
        micro_batch: int,
        over_rows: OverRows,
    ):
        self.loss, self.forward, self.taught = loss, forward, taught
        self.examples, self.over_rows = examples, over_rows
        self.labels = np.asarray([example.label for example in examples])
        self.starts = range(0, len(examples), micro_batch)
        self.terms = [term.name for term in loss.objective.term_set.terms]
        self._teacher: np.ndarray | None = None
        self._values = jax.jit(self._of_group)

    def __call__(self, constants: Constants, trainable: Arrays) -> dict[str, float]:
        """``loss`` and each term that is on, unweighted."""
        parts = (constants.frozen, constants.origin, trainable)
        logits = self.over_rows(self.forward, parts, self.examples, "validation")
        teacher = self._taught_once(constants)
        found, rows = [], []
        for start in self.starts:
            part = slice(start, start + self.starts.step)
            own = None if teacher is None else teacher[part]
            found.append(hosts.gathered(self._values(logits[part], own, self.labels[part])))
            rows.append(len(self.labels[part]))
        values, weights = np.stack(found).astype(np.float64), np.array(rows) / len(self.labels)
        loss = float(values[:, 0].sum() / len(self.labels))
        means = (weights @ values[:, 1:]).tolist()
        return {"loss": loss} | dict(zip(self.terms, means, strict=True))

    def _taught_once(self, constants: Constants) -> np.ndarray | None:
        """The teacher's logits, which never change."""
        if self._teacher is None and self.loss.objective.needs_teacher:
            title = "teacher of the validation"
            parts = constants.of_teacher
            self._teacher = self.over_rows(self.taught, parts, self.examples, title)
        return self._teacher

    def _of_group(
        self, logits: Float[Array, "B C"], teacher: Float[Array, "B C"] | None, labels: Array
    ) -> Float[Array, "S"]:
        """Of a micro-batch: the sum of the loss, and the terms."""
        values = {TASK: self.loss.task_sum(logits, labels)} | self.loss.terms(logits, teacher)
        return jnp.stack([values[name] for name in (TASK, *self.terms)])
