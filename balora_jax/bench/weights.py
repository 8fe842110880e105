"""Weights and batches that all cases share: those of a checkpoint, or random ones of its shapes.

A checkpoint without weights (a ``config.json`` alone, such as those in ``shapes/``) gets random
ones. Batches are rows of data, or full rows of random tokens that all count.
"""

import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp

from balora_jax.array_types import Array, Float, PRNGKeyArray
from balora_jax.config import RunConfig
from balora_jax.data.layout import Batch
from balora_jax.data.training_sets import encode_sets, load_sets
from balora_jax.models.starts.start import Factors, Start
from balora_jax.parallel import sharding
from balora_jax.paths import resolve_path
from balora_jax.plan.arguments import random_batch, shapes_only
from balora_jax.pretrained.checkpoint import Base
from balora_jax.pretrained.tokenizer import open_tokenizer
from balora_jax.tasks.text import run as text_run
from balora_jax.tasks.text.program import TextProgram, text_program
from balora_jax.tasks.text.run import TextRun
from balora_jax.tasks.text.score import training_sets
from balora_jax.training.run import Loaded

Arrays = dict[str, Array]

BATCHES = 4
"""Steps of a round on rows of data, which are of unequal lengths."""


@dataclass(frozen=True)
class Weights:
    """The frozen arrays that all cases share.

    Attributes:
        frozen: by path.
        random: whether they were drawn, for want of a checkpoint with weights.
        batches: host arrays [micro-batches, B, T] of steps that follow each other.
        padded: the same examples, one in a row.
    """

    frozen: Arrays
    random: bool
    batches: tuple[Batch, ...]
    padded: tuple[Batch, ...]


def weights_of(
    config: RunConfig, *, full: bool = False, tokenizer: str | None = None
) -> tuple[Base, Weights]:
    """Open the checkpoint; load or draw its weights, take or draw batches.

    Args:
        config: of a run.
        full: draw full rows, though there are rows of data.
        tokenizer: folder of one for the rows, of a checkpoint that has none.

    Raises:
        InputError: a setting that does not fit, or no tokenizer there.
    """
    base = shapes_only(config.model.name_or_path)
    if base is None:
        run = text_run.check(config)
        frozen, random = run.base.load_for(run.plain, run.mesh), False
        base = run.base
    else:
        program = text_program(config, base.config)
        run = None if tokenizer is None else _encoded(program, base, tokenizer)
        frozen, random = random_arrays(program.plain.frozen, program), True
    if run is None or full:
        length = config.data.max_length
        sharding.round_up_length(length, length, sharding.make_mesh(config.mesh))
        rows = (random_batch(config.training, length, base.config.vocab_size),)
        return base, Weights(frozen, random, rows, rows)
    return base, Weights(frozen, random, *_batches_of(run))


def _encoded(program: TextProgram, base: Base, tokenizer: str) -> TextRun:
    """A run on the rows of the config in the tokens of another model's tokenizer."""
    found = open_tokenizer(Path(resolve_path(tokenizer)))
    data = encode_sets(load_sets(training_sets(program.config.data)), found)
    length = text_run.row_length(program.config.data, data, base, program.mesh)
    return TextRun(**vars(program), base=base, tokenizer=found, data=data, length=length)


def _batches_of(run: TextRun) -> tuple[tuple[Batch, ...], tuple[Batch, ...]]:
    """The first batches of a run, and the same with one example in a row."""
    packed = run.config.data.packing == "rows"  # takes more examples than there are rows
    ours, theirs = run.batches(), None if packed else run.batches(mode="padding")
    taken = tuple(_known(next(ours), run) for _ in range(BATCHES))
    if theirs is None:
        return taken, taken
    return taken, tuple(_known(next(theirs), run) for _ in range(BATCHES))


def _known(batch: Batch, run: TextRun) -> Batch:
    """A batch whose tokens are all in the model's vocabulary."""
    return batch | {"input_ids": batch["input_ids"] % run.decoder.vocab_size}


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
