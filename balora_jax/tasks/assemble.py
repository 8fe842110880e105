"""From a config and a model's shapes to the computation of a step, without weights or data."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from balora_jax.array_types import Array, Float
from balora_jax.config import ModelConfig, RegularizersConfig, RunConfig
from balora_jax.errors import InputError
from balora_jax.models.adapters import AdapterShape
from balora_jax.models.decoder import structure
from balora_jax.models.decoder_config import DecoderConfig
from balora_jax.models.structure import Structure
from balora_jax.models.weight_names import linear_shapes, weight_rules
from balora_jax.numerics import head, linalg
from balora_jax.numerics.objective import Objective, weights
from balora_jax.parallel import hosts, sharding
from balora_jax.parallel.axes import TOKENS, VOCABULARY
from balora_jax.tasks.text import loss as causal
from balora_jax.training import optim, steps
from balora_jax.training.adapters import Adapters, adapters_of, check_full
from balora_jax.training.run import Loaded


@dataclass(frozen=True)
class Program:
    """What a step of a causal language model computes.

    Attributes:
        config: the whole run.
        decoder: the pretrained model's shape.
        plain: the model without adapters, which is the teacher.
        student: the same structure with adapters.
        adapters: what trains, and where it begins.
        objective: weights, terms and schedules.
        mesh: the devices.
    """

    config: RunConfig
    decoder: DecoderConfig
    plain: Structure
    student: Structure
    adapters: Adapters
    objective: Objective
    mesh: Mesh

    @property
    def layout(self) -> sharding.Layout:
        """Where every array of a run lies."""
        return sharding.Layout(self.student.axes, self.mesh)

    @property
    def trainable(self) -> int:
        """Trainable parameters; padding of stacks is not counted."""
        return self.adapters.trainable(self.total)

    @property
    def total(self) -> int:
        """Parameters of the frozen model."""
        return size_of(self.plain.parameters)


def size_of(shapes: dict[str, jax.ShapeDtypeStruct]) -> int:
    """Numbers in all arrays."""
    return sum(math.prod(leaf.shape) for leaf in shapes.values())


def program_of(config: RunConfig, decoder: DecoderConfig, mesh: Mesh | None = None) -> Program:
    """The computation that a config asks for on a model.

    Args:
        config: the whole run.
        decoder: the pretrained model's shape.
        mesh: the devices; those of this machine as the config lays them out where not given.

    Raises:
        InputError: a setting that does not fit the model or the devices.
    """
    objective = objective_of(config.regularizers)
    plain = model_structure(decoder, config.model, {})
    linears = linear_shapes(weight_rules(decoder), plain.parameters)
    adapters = adapters_of(config.adapter, linears)
    mesh = checked_mesh(config, mesh)
    sharding.Layout(plain.axes, mesh).attached(plain.frozen)  # raises where an axis does not divide
    check_full(config.adapter, config.model)
    check_head(config)
    student = model_structure(decoder, config.model, adapters.shapes)
    return Program(config, decoder, plain, student, adapters, objective, mesh)


def checked_mesh(config: RunConfig, mesh: Mesh | None = None) -> Mesh:
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
    _check_tokens_split(config, mesh)
    training = config.training
    sharding.check_batch(training.batch_size // training.accumulation, mesh)
    return mesh


def _check_tokens_split(config: RunConfig, mesh: Mesh) -> None:
    """Raises InputError where rows are split over devices that cannot be."""
    parts = mesh.shape[TOKENS]
    if parts > 1 and config.task == "nlu":
        raise InputError(
            f"mesh.{TOKENS}: expected 1 with task nlu, got {parts}: only the tokens of causal "
            "models are split over devices. Set it to 1."
        )
    if parts > 1 and config.model.attention == "cudnn":
        raise InputError(
            f"model.attention: expected auto or xla with mesh.{TOKENS} {parts}, got cudnn, which "
            "takes whole rows only. Choose another."
        )


def check_head(config: RunConfig) -> None:
    """Raises InputError where a full fine-tuning is to run with the fused head."""
    if config.adapter.method == "full" and config.training.head == "fused":
        raise InputError(
            "training.head: expected plain with adapter.method full, got fused, which forms no "
            "gradient of the head itself. Set training.head=plain."
        )


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
        quantization=config.quantization,
    )


def objective_of(config: RegularizersConfig) -> Objective:
    """The objective that a config section describes; its fields have the same names."""
    return Objective(**config.model_dump(exclude={"teacher_head", "teacher_cache"}))


def constants_of(program: Program, loaded: Loaded) -> causal.Constants:
    """What a step reads; the head is factorised once if the spectral term is on."""
    factor = None
    if needs_factor(program):
        table = "embed_tokens" if program.decoder.tie_word_embeddings else "lm_head"
        weights = loaded.frozen[f"{table}.embedding"]
        factor = factor_of(weights, program.mesh, center=program.objective.center_rows)
    return causal.Constants(loaded.frozen, loaded.origin, factor)


def factor_of(table: Float[Array, "V D"], mesh: Mesh, *, center: bool) -> Float[Array, "D D"]:
    """The head's factor on every device, from a head that may lie on many hosts.

    A host never has more of the head than the rows of one block. The factor is that of process 0
    everywhere, bit for bit, whatever the others' linear algebra makes of the same numbers.
    """
    whole = sharding.replicated(mesh)

    @partial(jax.jit, static_argnums=2, out_shardings=whole)
    def rows(table: Array, first: int, count: int) -> Array:
        return jax.lax.dynamic_slice_in_dim(table, first, count)

    def block(first: int, count: int) -> np.ndarray:
        return hosts.gathered(rows(table, first, count))

    factor = linalg.head_factor_of_rows(block, table.shape, center=center)
    if jax.process_count() > 1:
        factor = multihost_utils.broadcast_one_to_all(factor)
    return hosts.place(factor, whole)


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
    return parts_of(
        config, objective, loss, lambda batch: causal.counts_of(batch, objective.mask_alignment),
        total_steps,
    )  # fmt: skip


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


def head_plan(program: Program) -> causal.HeadPlan:
    """How the pass over the logits runs on the mesh."""
    training, mesh, vocabulary = program.config.training, program.mesh, program.decoder.vocab_size
    platform = mesh.devices.flat[0].platform
    memory = training.head_memory_mib or head.default_memory_mib(platform)
    columns = vocabulary // mesh.shape[VOCABULARY]
    chunk = training.head_chunk or head.chunk_rows(columns, memory * 2**20)
    return causal.HeadPlan(
        training.head,
        chunk,
        sharding.head_axes(mesh),
        sharding.across_devices(mesh),
        sharding.head_layout(mesh),
        sharding.flatten_tokens(mesh),
    )
