"""Weights and a batch that all cases share: those of a checkpoint, or random ones of its shapes.

A checkpoint without weights (a ``config.json`` alone, such as those in ``shapes/``) gets random
ones, and random tokens that all count.
"""

import zlib
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from balora_jax.array_types import Array
from balora_jax.config import RunConfig
from balora_jax.models.starts.stacks import squared_norms
from balora_jax.parallel import sharding
from balora_jax.plan.arguments import random_batch, shapes_only
from balora_jax.pretrained.checkpoint import Base
from balora_jax.tasks.text import run as text_run
from balora_jax.tasks.text.program import TextProgram, text_program
from balora_jax.training.adapters import kernels_of
from balora_jax.training.run import Loaded

Arrays = dict[str, Array]


@dataclass(frozen=True)
class Weights:
    """The frozen arrays that all cases share.

    Attributes:
        frozen: by path.
        random: whether they were drawn, for want of a checkpoint with weights.
        batch: host arrays [micro-batches, B, T].
    """

    frozen: Arrays
    random: bool
    batch: dict[str, np.ndarray]


def weights_of(config: RunConfig) -> tuple[Base, Weights]:
    """Open the checkpoint; load or draw its weights, take or draw a batch."""
    base = shapes_only(config.model.name_or_path)
    if base is None:
        setup = text_run.check(config)
        loaded = setup.base.load_for(setup.plain, setup.mesh)
        return setup.base, Weights(loaded, False, next(setup.batches()))
    program = text_program(config, base.config)
    length = config.data.max_length
    sharding.whole_length(length, length, program.mesh)
    frozen = random_arrays(program.plain.frozen, program)
    return base, Weights(frozen, True, random_batch(config, base.config.vocab_size))


def random_arrays(shapes: dict[str, jax.ShapeDtypeStruct], program: TextProgram) -> Arrays:
    """Normal weights of standard deviation 0.02, norms of 1, each made where it belongs.

    Codes are uniform, with the scale that gives the weights they stand for about this size.
    """
    step = 0.02 / {"none": 1.0, "int8": 73.0, "nf4": 0.57}[program.config.model.quantization]

    def draw(path: str, leaf: jax.ShapeDtypeStruct) -> Array:
        key = jax.random.fold_in(jax.random.key(0), zlib.crc32(path.encode()))
        if path.endswith(".scale"):
            return jnp.ones(leaf.shape, leaf.dtype)
        if path.endswith(".kernel_scale"):
            return jnp.full(leaf.shape, step, leaf.dtype)
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            bits = jax.random.bits(key, leaf.shape, jnp.uint8)
            return jax.lax.bitcast_convert_type(bits, leaf.dtype)
        return 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)

    layout = program.layout
    return {
        path: jax.jit(draw, static_argnums=(0, 1), out_shardings=layout(path, leaf.shape))(
            path, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        )
        for path, leaf in shapes.items()
    }


def loaded_for(program: TextProgram, weights: Weights) -> Loaded:
    """Adapters of a case at their start, beside the shared weights.

    Random weights get random factors of the size that a start would have: a decomposition of a 7B
    model takes minutes and does not change the time of a step.
    """
    config, layout = program.config, program.layout
    modules, start = program.adapters.modules, program.adapters.start
    if not (weights.random and modules and start.has_origin):
        seed = config.training.seed
        trainable, origin = program.adapters.begin(weights.frozen, config.model, layout, seed=seed)
        return Loaded(weights.frozen, origin, trainable)
    drawn = (".lora_a", ".origin_a", ".origin_b")
    shapes = program.student.origin
    origin = random_arrays({k: v for k, v in shapes.items() if k.endswith(drawn)}, program)
    kernels = kernels_of(weights.frozen, config.model)
    for path, leaf in shapes.items():
        stem, _, name = path.rpartition(".")
        if name == "lora_scale":
            origin[path] = jnp.full(leaf.shape, modules[0].scale, leaf.dtype)
        elif name == "origin_norm":
            origin[path] = squared_norms(kernels[f"{stem}.kernel"])
    adapters = {
        path: jnp.sqrt(origin[path.replace(".lora_magnitude", ".origin_norm")])
        if path.endswith(".lora_magnitude")
        # A copy: the step is given this array for good.
        else jnp.array(origin[path.replace(".lora_", ".origin_")], jnp.float32)
        for path in program.student.adapters
    }
    return Loaded(weights.frozen, layout.placed(origin), layout.placed(adapters))
