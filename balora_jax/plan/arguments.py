"""Which training steps does a benchmark compare, and with which arrays?

Every case is the very step of :mod:`balora_jax.training`, with terms, start or head of the config
changed. A checkpoint without weights (a ``config.json`` alone, such as those in ``shapes/``) gets
random ones, and random tokens that all count.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from balora_jax.array_types import Array
from balora_jax.config import RunConfig
from balora_jax.config_file import parse_config
from balora_jax.io.hf_files import read_json_config
from balora_jax.models import starts
from balora_jax.parallel import sharding
from balora_jax.paths import resolve_path
from balora_jax.pretrained.checkpoint import Base, base_of, open_shapes
from balora_jax.tasks import assemble
from balora_jax.tasks.assemble import Program
from balora_jax.tasks.text import run as text_run
from balora_jax.training import optim, steps
from balora_jax.training.run import Loaded

TERMS = ("consistency", "diversity", "spectral")
PUBLISHED = {"consistency": 0.025, "diversity": 0.005, "spectral": 0.005}
"""Weights of a term that the config switches off; the time of a step does not depend on them."""

Arrays = dict[str, Array]


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: title.
        start: of the adapters; None for the config's.
        terms: regularizers that are on.
        head: ``fused`` or ``plain``.
        teacher_cache: of labelled rows, whether a batch brings its teacher's logits.
    """

    name: str
    start: str | None
    terms: tuple[str, ...]
    head: str = "fused"
    teacher_cache: bool = True


CASES = (
    Case("LoRA", "lora", ()),
    Case("PiSSA", None, ()),
    *(Case(f"+ {term}", None, (term,)) for term in TERMS),
    Case("BA-LoRA", None, TERMS),
    Case("LoRA, plain head", "lora", (), "plain"),
    Case("BA-LoRA, plain head", None, TERMS, "plain"),
)


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


def configured(config: RunConfig, case: Case) -> RunConfig:
    """The config of a case; schedules are constant, so that every term is at work in every step."""
    tree = config.model_dump(mode="json")
    for term in TERMS:
        weight = tree["regularizers"][term] or PUBLISHED[term]
        tree["regularizers"][term] = weight if term in case.terms else 0.0
        tree["regularizers"][f"{term}_schedule"] = "constant"
    tree["regularizers"] |= {"adaptive_min": None, "adaptive_max": None}
    if case.start is not None:
        tree["adapter"]["start"] = case.start
    elif tree["adapter"]["start"] == "lora":
        tree["adapter"]["start"] = "pissa"
    tree["training"] |= {"head": case.head, "schedule": "constant", "warmup": 0.0}
    return parse_config(tree, case.name)


def shapes_only(name_or_path: str) -> Base | None:
    """A local folder that holds a ``config.json`` and no weights; None for anything else."""
    folder = Path(resolve_path(name_or_path))
    weights = (".safetensors", ".bin", ".index.json", ".pt", ".msgpack")
    if not (folder / "config.json").is_file():
        return None
    if any(file.name.endswith(weights) for file in folder.iterdir()):
        return None
    raw = read_json_config(folder)
    return base_of(folder, raw)


def opened_base(config: RunConfig) -> Base:
    """The checkpoint of a config, with or without weights; only its ``config.json`` is read."""
    return open_shapes(config.model.name_or_path, config.model.revision)


def weights_of(config: RunConfig) -> tuple[Base, Weights]:
    """Open the checkpoint; load or draw its weights, take or draw a batch."""
    base = shapes_only(config.model.name_or_path)
    if base is None:
        setup = text_run.check(config)
        loaded = setup.base.load_for(setup.plain, setup.mesh)
        return setup.base, Weights(loaded, False, next(setup.batches()))
    program, _ = assemble.program_of(config, base.config)
    length = config.data.max_length
    sharding.whole_length(length, length, program.mesh)
    frozen = random_arrays(program.plain.frozen, program)
    return base, Weights(frozen, True, random_batch(config, base.config.vocab_size))


def random_arrays(shapes: dict[str, jax.ShapeDtypeStruct], program: Program) -> Arrays:
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

    layout = sharding.shardings(shapes, program.mesh)
    return {
        path: jax.jit(draw, static_argnums=(0, 1), out_shardings=layout[path])(
            path, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        )
        for path, leaf in shapes.items()
    }


def random_batch(config: RunConfig, vocabulary: int) -> dict[str, np.ndarray]:
    """Uniform tokens in full rows; every token but the first of a row is to be predicted."""
    training = config.training
    rows = training.batch_size // training.accumulation
    shape = (training.accumulation, rows, config.data.max_length)
    ids = np.random.default_rng(training.seed).integers(0, vocabulary, shape, dtype=np.int32)
    positions = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)
    return {
        "input_ids": ids,
        "positions": np.ascontiguousarray(positions),
        "segment_ids": np.ones(shape, np.int32),
        "loss_mask": np.ones(shape, np.int32),
    }


def loaded_for(program: Program, weights: Weights) -> Loaded:
    """Adapters of a case at their start, beside the shared weights.

    Random weights get random factors of the size that a start would have: a decomposition of a 7B
    model takes minutes and does not change the time of a step.
    """
    config, mesh = program.config, program.mesh
    if not weights.random or config.adapter.start == "lora" or config.adapter.method == "full":
        trainable, origin = assemble.begin(config, program.modules, weights.frozen, None, mesh)
        return Loaded(weights.frozen, origin, trainable)
    drawn = (".lora_a", ".origin_a", ".origin_b")
    shapes = program.student.origin
    origin = random_arrays({k: v for k, v in shapes.items() if k.endswith(drawn)}, program)
    kernels = assemble.kernels_of(weights.frozen, config.model)
    for path, leaf in shapes.items():
        stem, _, name = path.rpartition(".")
        if name == "lora_scale":
            origin[path] = jnp.full(leaf.shape, program.modules[0].scale, leaf.dtype)
        elif name == "origin_norm":
            origin[path] = starts.squared_norms(kernels[f"{stem}.kernel"])
    adapters = {
        path: jnp.sqrt(origin[path.replace(".lora_magnitude", ".origin_norm")])
        if path.endswith(".lora_magnitude")
        # A copy: the step is given this array for good.
        else jnp.array(origin[path.replace(".lora_", ".origin_")], jnp.float32)
        for path in program.student.adapters
    }
    place = sharding.placed
    return Loaded(weights.frozen, place(origin, mesh), place(adapters, mesh))


def trained_shapes(program: Program) -> dict[str, jax.ShapeDtypeStruct]:
    """What trains, float32: the adapters, or every weight of a full fine-tuning."""
    if program.config.adapter.method != "full":
        return program.student.adapters
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
        for path, leaf in program.plain.frozen.items()
    }


def abstract_arguments(program: Program, total_steps: int) -> tuple[Any, ...]:
    """Shapes and shardings of a step's arguments: (state, constants, batch, key)."""
    mesh, length = program.mesh, program.config.data.max_length
    sharding.whole_length(length, length, mesh)
    optimizer = optim.make_optimizer(program.config.training, total_steps)
    state = steps.abstract_state(trained_shapes(program), optimizer, mesh)
    frozen: Any = sharding.with_shardings(program.plain.frozen, mesh)
    origin: Any = sharding.with_shardings(program.student.origin, mesh)
    factor: Any = None
    width = program.decoder.hidden_size
    if assemble.needs_factor(program):
        factor = jax.ShapeDtypeStruct(
            (width, width), jnp.float32, sharding=sharding.replicated(mesh)
        )
    batch = {
        name: jax.ShapeDtypeStruct(value.shape, jnp.int32, sharding=sharding.batch_sharding(mesh))
        for name, value in random_batch(program.config, program.decoder.vocab_size).items()
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh))
    return state, assemble.causal.Constants(frozen, origin, factor), batch, key


def cases_named(names: Sequence[str]) -> tuple[Case, ...]:
    """The cases with these names, all without names."""
    return tuple(case for case in CASES if not names or case.name in names)
