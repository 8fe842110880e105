"""Weights and a batch that all cases share: those of a checkpoint, or random ones of its shapes.

A checkpoint without weights (a ``config.json`` alone, such as those in ``shapes/``) gets random
ones, and random tokens that all count.
"""

import zlib
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from balora_jax.array_types import Array, Float, PRNGKeyArray
from balora_jax.config import RunConfig
from balora_jax.models.starts.start import Factors, Start
from balora_jax.parallel import sharding
from balora_jax.plan.arguments import random_batch, shapes_only
from balora_jax.pretrained.checkpoint import Base
from balora_jax.tasks.text import run as text_run
from balora_jax.tasks.text.program import TextProgram, text_program
from balora_jax.training.run import Loaded

Arrays = dict[str, Array]


@dataclass(frozen=True)
class Weights:
    """The frozen arrays that all cases share.

    Attributes:
        frozen: by path.
        random: whether they were drawn, for want of a checkpoint with weights.
        batch: host arrays [micro-batches, B, T].
        padded: the same examples, one in a row.
    """

    frozen: Arrays
    random: bool
    batch: dict[str, np.ndarray]
    padded: dict[str, np.ndarray]


def weights_of(config: RunConfig) -> tuple[Base, Weights]:
    """Open the checkpoint; load or draw its weights, take or draw a batch."""
    base = shapes_only(config.model.name_or_path)
    if base is None:
        setup = text_run.check(config)
        loaded = setup.base.load_for(setup.plain, setup.mesh)
        batch = next(setup.batches())
        padded = batch if config.data.packing == "rows" else next(setup.batches(mode="padding"))
        return setup.base, Weights(loaded, False, batch, padded)
    program = text_program(config, base.config)
    length = config.data.max_length
    sharding.round_up_length(length, length, program.mesh)
    frozen = random_arrays(program.plain.frozen, program)
    batch = random_batch(config.training, length, base.config.vocab_size)
    return base, Weights(frozen, True, batch, batch)


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
    config, adapters = program.config, program.adapters
    if weights.random and adapters.start.has_origin:
        adapters = replace(adapters, start=Drawn())
    trainable, origin = adapters.begin(
        weights.frozen, config.model, program.layout, seed=config.training.seed
    )
    return Loaded(weights.frozen, origin, trainable)


class Drawn(Start):
    """Random factors of the size that those of a decomposition would have."""

    name = "drawn"

    def factors(
        self,
        kernel: Float[Array, "D F"],
        rank: int,
        scale: Float[Array, ""] | float,
        key: PRNGKeyArray,
        moment: Float[Array, "D D"] | None,
    ) -> Factors:
        """Normal, of standard deviation 0.02."""
        del scale, moment
        a, b = jax.random.split(key)
        d_in, d_out = kernel.shape
        return 0.02 * jax.random.normal(a, (d_in, rank)), 0.02 * jax.random.normal(b, (rank, d_out))
