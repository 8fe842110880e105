"""Parts that the programs of all tasks share: devices, objective, the step around a loss."""

from typing import Any

from balora_jax.config import ModelConfig, RegularizersConfig, TrainingConfig
from balora_jax.errors import InputError
from balora_jax.numerics import objective as objectives
from balora_jax.numerics.objective import Objective, weights
from balora_jax.parallel import sharding
from balora_jax.training import optim, steps


def check_mesh(model: ModelConfig, training: TrainingConfig, mesh: sharding.AnyMesh) -> None:
    """Check what depends on the devices.

    Raises:
        InputError: a batch that does not divide over them, or an option that they lack.
    """
    if model.remat == "offload" and sharding.platform_of(mesh) == "cpu":
        raise InputError(
            "model.remat: expected none, dots or full on a CPU, got offload: there is no other "
            "memory to move to. Choose one of them."
        )
    sharding.check_batch(training.batch_size // training.accumulation, mesh)


def objective_of(config: RegularizersConfig) -> Objective:
    """The objective that a config section describes."""
    return objectives.objective_of(config.of_the_terms())


def parts_of(
    training: TrainingConfig,
    objective: Objective,
    loss: Any,
    counts: Any,
    total_steps: int,
    *,
    dropout: bool,
) -> steps.StepParts:
    """A step around a loss: schedules and optimizer as the config's section says."""
    return steps.StepParts(
        loss=loss,
        counts=counts,
        weights=lambda step: weights(objective, step, total_steps),
        optimizer=optim.make_optimizer(training, total_steps),
        learning_rate=optim.learning_rate_schedule(training, total_steps),
        dropout=dropout,
        spike_sigmas=training.spike_sigmas,
    )
