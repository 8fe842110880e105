"""From a config to a run that is ready to start; every check happens here, before any writing."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from balora_jax.array_types import Array
from balora_jax.config import AdapterConfig, DataConfig, ModelConfig, RegularizersConfig, RunConfig
from balora_jax.data.batches import BatchIterator, common_length
from balora_jax.data.examples import EncodedSet, encode_rows
from balora_jax.data.sources import load_rows
from balora_jax.errors import InputError
from balora_jax.evals.run import example_settings, questions, validation_rows
from balora_jax.io.peft_adapter import PeftAdapter, read_peft
from balora_jax.io.pretrained import Base, open_base, peft_modules, sampling_for
from balora_jax.models import starts
from balora_jax.models.adapters import (
    AdaptedModule,
    AdapterShape,
    LinearShape,
    adapter_shapes,
    plan_adapters,
    trainable_parameters,
)
from balora_jax.models.decoder import DecoderConfig, Structure, structure
from balora_jax.models.registry import linear_shapes
from balora_jax.numerics import head, linalg
from balora_jax.numerics.objective import Objective, weights
from balora_jax.training import causal, optim, sharding, steps

Arrays = dict[str, Array]


@dataclass(frozen=True)
class Program:
    """What is computed, from shapes alone: no weights and no data.

    Attributes:
        config: the whole run.
        decoder: the pretrained model's shape.
        plain: the model without adapters, which is the teacher.
        student: the same structure with adapters.
        modules: the adapted layers.
        objective: weights, terms and schedules.
        mesh: the devices.
    """

    config: RunConfig
    decoder: DecoderConfig
    plain: Structure
    student: Structure
    modules: tuple[AdaptedModule, ...]
    objective: Objective
    mesh: Mesh

    @property
    def trainable(self) -> int:
        """Trainable parameters."""
        return trainable_parameters(self.modules)

    @property
    def total(self) -> int:
        """Parameters of the frozen model."""
        return sum(math.prod(leaf.shape) for leaf in self.plain.frozen.values())


@dataclass(frozen=True)
class Setup(Program):
    """A checked run: a program and its data, but no weights yet.

    Attributes:
        base: the pretrained checkpoint.
        tokenizer: its tokenizer.
        peft: the adapter to go on from, if the start names one.
        data: encoded training rows and what became of them.
        validation: rows of the score, empty for none.
        length: tokens of every row of a batch.
    """

    base: Base
    tokenizer: Any
    peft: PeftAdapter | None
    data: EncodedSet
    validation: Sequence[Mapping[str, Any]]
    length: int

    @property
    def use_rslora(self) -> bool:
        """Whether the scales are alpha / √rank."""
        if self.peft is not None:
            return bool(self.peft.config.get("use_rslora"))
        return self.config.adapter.use_rslora

    def batches(self) -> BatchIterator:
        """The training batches, from the beginning."""
        training = self.config.training
        return BatchIterator(
            self.data.examples,
            batch_size=training.batch_size // training.accumulation,
            accumulation=training.accumulation,
            length=self.length,
            mode="packing" if self.config.data.packing else "padding",
            seed=training.seed,
            pad_id=sampling_for(self.tokenizer, 1).pad_id,
        )

    def total_steps(self, batches: BatchIterator) -> int:
        """Optimizer steps of the whole run."""
        training = self.config.training
        if training.max_steps is not None:
            return training.max_steps
        assert training.epochs is not None
        return math.ceil(training.epochs * batches.batches_per_epoch())


@dataclass(frozen=True)
class Loaded:
    """The arrays of a run at step 0."""

    frozen: Arrays
    origin: Arrays
    adapters: Arrays


def check(config: RunConfig) -> Setup:
    """Open and check everything a run reads, short of loading the weights.

    Raises:
        InputError: whatever is wrong, as one sentence.
    """
    objective_of(config.regularizers)  # before a checkpoint is looked for
    base = open_base(config.model.name_or_path, config.model.revision)
    program, peft = program_of(config, base.config)
    tokenizer = base.tokenizer()
    settings = example_settings(config.data)
    rows = load_rows(config.data.train, split=config.data.split, limit=config.data.train_limit)
    data = encode_rows(rows, tokenizer, settings)
    _check_vocabulary(data, base)
    validation = validation_rows(config)
    questions(validation, tokenizer, config)  # raises before anything is written
    return Setup(
        **vars(program),
        base=base,
        tokenizer=tokenizer,
        peft=peft,
        data=data,
        validation=validation,
        length=_row_length(config.data, data, base),
    )


def program_of(
    config: RunConfig, decoder: DecoderConfig, mesh: Mesh | None = None
) -> tuple[Program, PeftAdapter | None]:
    """The computation that a config asks for on a model, and the adapter it begins with if any.

    Args:
        config: the whole run.
        decoder: the pretrained model's shape.
        mesh: the devices; those of this machine as the config lays them out where not given.

    Raises:
        InputError: a setting that does not fit the model or the devices.
    """
    objective = objective_of(config.regularizers)
    plain = model_structure(decoder, config.model, {})
    peft, modules = plan(config.adapter, linear_shapes(decoder, plain.frozen))
    shapes = adapter_shapes(
        modules,
        origin=starts.start_has_origin(config.adapter.start),
        dropout=config.adapter.dropout,
    )
    mesh = sharding.make_mesh(config.mesh) if mesh is None else mesh
    if config.model.remat == "offload" and mesh.devices.flat[0].platform == "cpu":
        raise InputError(
            "model.remat: expected none, dots or full on a CPU, got offload: there is no other "
            "memory to move to. Choose one of them."
        )
    sharding.shardings(plain.frozen, mesh)
    training = config.training
    sharding.check_batch(training.batch_size // training.accumulation, mesh)
    student = model_structure(decoder, config.model, shapes)
    return Program(config, decoder, plain, student, modules, objective, mesh), peft


def model_structure(
    decoder: DecoderConfig, config: ModelConfig, adapters: dict[str, AdapterShape]
) -> Structure:
    """The model's shapes with the options of the config's section."""
    return structure(
        decoder,
        adapters=adapters,
        dtype=config.dtype,
        remat=config.remat,
        kernel=config.attention,
    )


def objective_of(config: RegularizersConfig) -> Objective:
    """The objective that a config section describes; the fields have the same names."""
    return Objective(**config.model_dump())


def plan(
    config: AdapterConfig, linears: Sequence[LinearShape]
) -> tuple[PeftAdapter | None, tuple[AdaptedModule, ...]]:
    """The adapted layers, and the PEFT adapter they begin with if the start names a folder."""
    if Path(config.start).is_dir():
        peft = read_peft(config.start)
        return peft, peft_modules(peft, linears, config.start)
    starts.check_start(config.start)
    return None, plan_adapters(
        linears,
        rank=config.rank,
        alpha=config.rank if config.alpha is None else config.alpha,
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
        use_rslora=config.use_rslora,
    )


def _row_length(config: DataConfig, data: EncodedSet, base: Base) -> int:
    length = config.max_length if config.packing else None
    length = length or common_length(data.examples, config.max_length)
    longest = max(len(example.input_ids) for example in data.examples)
    if longest > base.config.max_length:
        raise InputError(
            f"data.max_length: expected at most {base.config.max_length}, the positions that "
            f"{base.folder.name} was made for, got a row of {longest} tokens. Lower it."
        )
    return length


def _check_vocabulary(data: EncodedSet, base: Base) -> None:
    highest = max(int(example.input_ids.max()) for example in data.examples)
    if highest >= base.config.vocab_size:
        raise InputError(
            f"{base.folder}: expected token ids below vocab_size {base.config.vocab_size}, got "
            f"{highest} from its tokenizer. Use the tokenizer that belongs to the weights."
        )


def load(setup: Setup) -> Loaded:
    """Load the frozen weights and make the adapters' start, each array on its devices."""
    config, mesh = setup.config, setup.mesh
    frozen = setup.base.load(setup.plain.frozen, mesh)
    if setup.peft is not None:
        adapters, origin = starts.start_from_factors(setup.modules, frozen, setup.peft.tensors)
    else:
        adapters, origin = starts.start_adapters(
            setup.modules,
            frozen,
            start=config.adapter.start,
            key=jax.random.key(config.training.seed),
        )
    return Loaded(frozen, place(origin, mesh), place(adapters, mesh))


def place(arrays: Arrays, mesh: Mesh) -> Arrays:
    """Arrays laid out as the sharding table says."""
    return {
        path: jax.device_put(value, sharding.sharding_of(path, value.shape, mesh))
        for path, value in arrays.items()
    }


def constants_of(program: Program, loaded: Loaded) -> causal.Constants:
    """What a step reads; the head is factorised once if the spectral term is on."""
    factor = None
    if needs_factor(program):
        table = "embed_tokens" if program.decoder.tie_word_embeddings else "lm_head"
        weights = np.asarray(loaded.frozen[f"{table}.embedding"]).astype(np.float32)
        factor = linalg.head_factor(weights, center=program.objective.center_rows)
        factor = jax.device_put(jnp.asarray(factor), sharding.replicated(program.mesh))
    return causal.Constants(loaded.frozen, loaded.origin, factor)


def needs_factor(program: Program) -> bool:
    """Whether the spectral term reads the factor of the head."""
    fused = program.config.training.head == "fused"
    linear = program.decoder.logit_map.soft_cap is None
    return program.objective.term_spec.spectral and fused and linear


def step_parts(program: Program, total_steps: int) -> steps.StepParts:
    """The pure functions of a training step."""
    config, objective = program.config, program.objective
    loss = causal.CausalLoss(
        student=program.student,
        teacher=program.plain,
        objective=objective,
        head=head_plan(program),
    )
    return steps.StepParts(
        loss=loss,
        counts=lambda batch: causal.counts_of(batch, objective.mask_alignment),
        weights=lambda step: weights(objective, step, total_steps),
        optimizer=optim.make_optimizer(config.training, total_steps),
        learning_rate=optim.learning_rate_schedule(config.training, total_steps),
        dropout=config.adapter.dropout > 0.0,
    )


def head_plan(program: Program) -> causal.HeadPlan:
    """How the pass over the logits runs on the mesh."""
    training, mesh, vocabulary = program.config.training, program.mesh, program.decoder.vocab_size
    platform = mesh.devices.flat[0].platform
    memory = training.head_memory_mib or head.default_memory_mib(platform)
    columns = vocabulary // mesh.shape["tensor"]
    chunk = training.head_chunk or head.chunk_rows(columns, memory * 2**20)
    return causal.HeadPlan(
        training.head,
        chunk,
        sharding.head_axes(mesh),
        sharding.across_devices(mesh),
        sharding.head_layout(mesh),
    )
