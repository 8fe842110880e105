"""A compiled step on rows with labels."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from balora_jax.bench.cases import Case, configured
from balora_jax.bench.measure import OurStep
from balora_jax.config import RunConfig
from balora_jax.tasks.labels import run as labels_run
from balora_jax.tasks.labels.run import LabelsRun


@dataclass(frozen=True)
class LabelsCase:
    """One compiled case.

    Attributes:
        run: its program and data.
        step: one optimizer step.
        shape: of the batch.
    """

    run: LabelsRun
    step: OurStep
    shape: tuple[int, ...]

    @property
    def model_flops(self) -> float:
        """Operations that a step cannot do without."""
        return self.run.step_flops(self.shape, math.prod(self.shape[:2]))


def compiled_case(config: RunConfig, case: Case) -> LabelsCase:
    """Open, load and compile a case on the first batch of its own data."""
    run = labels_run.check(configured(config, case))
    loaded = run.load()
    constants = run.constants(loaded)
    batch: dict[str, Any] = next(run.batches())
    if run.keeps_teacher:
        # Any logits will do for the time of a step; a run computes them once, before the first.
        shape = (*batch["labels"].shape, run.outputs)
        batch = run.prepare(batch, np.zeros((len(run.data.examples), run.outputs), np.float32))
        assert batch[labels_run.TEACHER].shape == shape
    parts = run.step_parts(10**6)
    seed = run.config.training.seed
    step = OurStep(parts, run.mesh, loaded.trainable, constants, [batch], seed)
    return LabelsCase(run, step, batch["input_ids"].shape)
