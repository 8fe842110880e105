"""Parts that the programs of all tasks share: devices, objective, the step around a loss."""

import math
from typing import Any

import jax

from balora_jax.config import RegularizersConfig, RunConfig
from balora_jax.errors import InputError
from balora_jax.numerics import objective as objectives
from balora_jax.numerics.objective import Objective, weights
from balora_jax.parallel import sharding
from balora_jax.training import optim, steps


def size_of(shapes: dict[str, jax.ShapeDtypeStruct]) -> int:
    """Numbers in all arrays."""
    return sum(math.prod(leaf.shape) for leaf in shapes.values())


def checked_mesh(config: RunConfig, mesh: sharding.AnyMesh | None = None) -> sharding.AnyMesh:
    """The devices of a run, after checking what depends on them.

    Raises:
        InputError: a mesh of another size, a batch that does not divide over it, or an option that
            the devices lack.
    """
    mesh = sharding.make_mesh(config.mesh) if mesh is None else mesh
    if config.model.remat == "offload" and mesh.devices.flat[0].platform == "cpu":
        raise InputError(
            "model.remat: expected none, dots or full on a CPU, got offload: there is no other "
            "memory to move to. Choose one of them."
        )
    training = config.training
    sharding.check_batch(training.batch_size // training.accumulation, mesh)
    return mesh


def objective_of(config: RegularizersConfig) -> Objective:
    """The objective that a config section describes."""
    return objectives.objective_of(config.of_the_terms())


def parts_of(
    config: RunConfig, objective: Objective, loss: Any, counts: Any, total_steps: int
) -> steps.StepParts:
    """A step around a loss: schedules and optimizer as the config says."""
    return steps.StepParts(
        loss=loss,
        counts=counts,
        weights=lambda step: weights(objective, step, total_steps),
        optimizer=optim.make_optimizer(config.training, total_steps),
        learning_rate=optim.learning_rate_schedule(config.training, total_steps),
        dropout=config.adapter.dropout > 0.0,
        spike_sigmas=config.training.spike_sigmas,
    )
