"""Shapes of all that a training step is given, from a config and a model's ``config.json``."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from balora_jax.config import ModelConfig, TrainingConfig
from balora_jax.parallel import sharding
from balora_jax.paths import resolve_path
from balora_jax.pretrained.checkpoint import Base, open_base
from balora_jax.tasks import teacher
from balora_jax.tasks.text.loss import HIDDEN, Constants
from balora_jax.tasks.text.program import TextProgram
from balora_jax.training import optim, steps


def shapes_only(name_or_path: str) -> Base | None:
    """A local folder that holds a ``config.json`` and no weights; None for anything else."""
    folder = Path(resolve_path(name_or_path))
    weights = (".safetensors", ".bin", ".index.json", ".pt", ".msgpack")
    if not (folder / "config.json").is_file():
        return None
    if any(file.name.endswith(weights) for file in folder.iterdir()):
        return None
    return open_base(str(folder), weights=False)


def opened_base(config: ModelConfig) -> Base:
    """The checkpoint of a config, with or without weights; only its ``config.json`` is read."""
    return open_base(config.name_or_path, config.revision, weights=False)


def random_batch(training: TrainingConfig, length: int, vocabulary: int) -> dict[str, np.ndarray]:
    """Uniform tokens in full rows; every token but the first of a row is to be predicted."""
    rows = training.batch_size // training.accumulation
    shape = (training.accumulation, rows, length)
    ids = np.random.default_rng(training.seed).integers(0, vocabulary, shape, dtype=np.int32)
    positions = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)
    return {
        "input_ids": ids,
        "positions": np.ascontiguousarray(positions),
        "segment_ids": np.ones(shape, np.int32),
        "loss_mask": np.ones(shape, np.int32),
    }


def trained_shapes(program: TextProgram) -> dict[str, jax.ShapeDtypeStruct]:
    """What trains, float32: the adapters and what is beside them, or every weight."""
    if not program.adapters.method.trains_base:
        return program.student.adapters | program.adapters.whole.shapes(program.plain.parameters)
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
        for path, leaf in program.plain.frozen.items()
    }


def kept_shapes(program: TextProgram) -> dict[str, jax.ShapeDtypeStruct]:
    """What a teacher keeps that is the start of the run."""
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, teacher.held_dtype(program.student, path))
        for path, leaf in trained_shapes(program).items()
    }


def abstract_arguments(program: TextProgram, total_steps: int) -> tuple[Any, ...]:
    """Shapes and shardings of a step's arguments: (state, constants, batch, key)."""
    mesh, layout, length = program.mesh, program.layout, program.config.data.max_length
    sharding.round_up_length(length, length, mesh)
    optimizer = optim.make_optimizer(program.config.training, total_steps)
    state = steps.abstract_state(layout.attached(trained_shapes(program)), optimizer, mesh)
    frozen: Any = layout.attached(program.plain.frozen)
    origin: Any = layout.attached(program.student.origin)
    factor: Any = None
    taught: Any = None
    if program.taught_by_start and program.objective.needs_teacher:
        taught = layout.attached(kept_shapes(program))
    width = program.decoder.hidden_size
    if program.needs_factor:
        factor = jax.ShapeDtypeStruct(
            (width, width), jnp.float32, sharding=sharding.replicated(mesh)
        )
    batch = {
        name: jax.ShapeDtypeStruct(value.shape, jnp.int32, sharding=sharding.batch_sharding(mesh))
        for name, value in random_batch(
            program.config.training, length, program.decoder.vocab_size
        ).items()
    }
    if program.keeps_teacher:
        shape = (*batch["input_ids"].shape, width)
        dtype, place = jnp.dtype(program.config.model.dtype), sharding.batch_sharding(mesh)
        batch[HIDDEN] = jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh))
    return state, Constants(frozen, origin, factor, taught), batch, key
