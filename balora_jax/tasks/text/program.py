"""The computation of a step of a decoder on text, from a config and the model's shape alone."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import numpy as np
from jax.experimental import multihost_utils

from balora_jax.array_types import Array, Float, Int
from balora_jax.config import ModelConfig, RegularizersConfig, RunConfig, TrainingConfig
from balora_jax.errors import InputError
from balora_jax.models.adapters import AdapterShape
from balora_jax.models.decoder_config import DecoderConfig
from balora_jax.models.options import kernel_on
from balora_jax.models.structure import Structure, size_of, structure
from balora_jax.models.whole import NOTHING, Whole
from balora_jax.numerics import head, linalg
from balora_jax.numerics.objective import Objective
from balora_jax.parallel import hosts, sharding
from balora_jax.parallel.axes import EXPERTS, TOKENS, VOCABULARY
from balora_jax.tasks import assemble, teacher
from balora_jax.tasks.text.loss import Constants, HeadPlan, TextLoss, counts_of
from balora_jax.tasks.text.sample import Share
from balora_jax.training.adapters import Adapters, adapters_of, check_base
from balora_jax.training.run import Loaded
from balora_jax.training.steps import StepParts


@dataclass(frozen=True)
class TextProgram:
    """Computation of a step of a decoder on text.

    Attributes:
        config: the whole run.
        decoder: the pretrained model's shape, with its experts in groups as the mesh has them.
        plain: the model without adapters, which is the teacher unless that is the start.
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
    mesh: sharding.AnyMesh

    @property
    def layout(self) -> sharding.Layout:
        """Where every array of a run lies."""
        return sharding.Layout(self.student.axes, self.mesh)

    @property
    def trainable(self) -> int:
        """Trainable parameters; padding of stacks is not counted."""
        return self.adapters.trainable(self.plain)

    @property
    def total(self) -> int:
        """Parameters of the frozen model."""
        return size_of(self.plain.parameters)

    @property
    def taught_by_start(self) -> bool:
        """Whether the teacher is the model as it starts, and that is another than the base."""
        return teacher.is_the_start(self.config.regularizers, self.adapters)

    @property
    def taught(self) -> Structure:
        """The structure of the teacher."""
        return self.student if self.taught_by_start else self.plain

    @property
    def keeps_teacher(self) -> bool:
        """Whether the teacher's hidden states are computed once, before the first step."""
        return self.objective.needs_teacher and self.config.regularizers.teacher_cache is True

    @property
    def share(self) -> Share | None:
        """Of the rows that the teacher is asked about; None for all of them."""
        fraction = self.config.regularizers.teacher_fraction
        if fraction == 1.0 or not self.objective.needs_teacher:
            return None
        return Share(fraction, sharding.row_parts(self.mesh), sharding.across_rows(self.mesh))

    @property
    def needs_factor(self) -> bool:
        """Whether a term reads the factor of the head."""
        fused = self.config.training.head == "fused"
        linear = self.decoder.logit_map.soft_cap is None
        frozen = not self.adapters.trains_head(self.decoder)
        return self.objective.term_set.needs_factor and fused and linear and frozen

    @property
    def head_plan(self) -> HeadPlan:
        """How the pass over the logits runs on the mesh."""
        training, mesh = self.config.training, self.mesh
        memory = training.head_memory_mib or head.default_memory_mib(sharding.platform_of(mesh))
        columns = self.decoder.vocab_size // mesh.shape[VOCABULARY]
        return HeadPlan(
            training.head,
            training.head_chunk or head.chunk_rows(columns, memory * 2**20),
            sharding.head_axes(mesh),
            sharding.across_devices(mesh),
            sharding.head_layout(mesh),
            sharding.flatten_tokens(mesh),
        )

    @property
    def whole_loss(self) -> TextLoss:
        """The loss on all rows of the teacher, without dropout where it is given no key."""
        trains_head = self.adapters.trains_head(self.decoder)
        return TextLoss(self.student, self.taught, self.objective, self.head_plan, trains_head)

    def step_parts(self, total_steps: int) -> StepParts:
        """The pure functions of a training step."""
        drops, share = self.config.adapter.dropout > 0.0, self.share
        loss = replace(self.whole_loss, share=share, drops=drops)
        counts = partial(counts_of, mask_alignment=self.objective.mask_alignment)
        training, draws = self.config.training, drops or share is not None
        return assemble.parts_of(training, self.objective, loss, counts, total_steps, dropout=draws)

    def constants(self, loaded: Loaded) -> Constants:
        """What a step reads; the head is factorised once if a term reads its factor."""
        factor = None
        if self.needs_factor:
            weights = loaded.frozen[self.decoder.head_path]
            factor = factor_of(weights, self.mesh, center=self.objective.term_set.centers_factor)
        start = None
        if self.taught_by_start and self.objective.needs_teacher:
            start = self.layout.placed(teacher.kept(self.student, loaded.trainable))
        return Constants(loaded.frozen, loaded.origin, factor, start)


def text_program(
    config: RunConfig, decoder: DecoderConfig, mesh: sharding.AnyMesh | None = None
) -> TextProgram:
    """The computation that a config asks for on a model.

    Args:
        config: the whole run.
        decoder: the pretrained model's shape.
        mesh: the devices; those of this machine as the config lays them out where not given.

    Raises:
        InputError: a setting that does not fit the model or the devices.
    """
    objective = assemble.objective_of(config.regularizers)
    mesh = sharding.make_mesh(config.mesh) if mesh is None else mesh
    sharding.check_experts(decoder.experts, mesh)
    decoder = replace(decoder, expert_groups=mesh.shape[EXPERTS])
    plain = model_structure(decoder, config.model, mesh, {})
    adapters = adapters_of(config.adapter, decoder, plain)
    assemble.check_mesh(config.model, config.training, mesh)
    check_rows_whole(config.model, mesh)
    sharding.Layout(plain.axes, mesh).attached(plain.frozen)  # raises where an axis does not divide
    check_base(config.adapter, config.model)
    _check_head(config.training, objective, decoder, adapters)
    check_teacher(config.regularizers, objective, decoder, config.data.max_length)
    student = model_structure(decoder, config.model, mesh, adapters.shapes, adapters.whole)
    return TextProgram(config, decoder, plain, student, adapters, objective, mesh)


def model_structure(
    decoder: DecoderConfig,
    config: ModelConfig,
    mesh: sharding.AnyMesh,
    adapters: dict[str, AdapterShape],
    whole: Whole = NOTHING,
) -> Structure:
    """The model's shapes with the options of the config's section, for the devices of a mesh."""
    return structure(
        decoder,
        adapters=adapters,
        dtype=config.dtype,
        remat=config.remat,
        kernel=kernel_on(sharding.platform_of(mesh), config.attention, "model.attention"),
        quantization=config.quantization,
        whole=whole,
    )


def check_rows_whole(config: ModelConfig, mesh: sharding.AnyMesh) -> None:
    """Raises InputError where rows are split over devices by a kernel that cannot."""
    parts = mesh.shape[TOKENS]
    if parts > 1 and config.attention in ("blocks", "cudnn"):
        raise InputError(
            f"model.attention: expected auto or xla with mesh.{TOKENS} {parts}, got "
            f"{config.attention}, which takes whole rows only. Choose another."
        )


def _check_head(
    config: TrainingConfig, objective: Objective, decoder: DecoderConfig, adapters: Adapters
) -> None:
    """Raises InputError where a term does not suit the head: before a weight is read."""
    logit_map = decoder.logit_map if config.head == "fused" else None
    trains = adapters.trains_head(decoder)
    for term in objective.term_set.terms:
        where = f"regularizers.{term.name}"
        term.check_head(where, decoder.vocab_size, logit_map, trains=trains)


def check_teacher(
    config: RegularizersConfig, objective: Objective, decoder: DecoderConfig, longest: int
) -> None:
    """Raises InputError for a teacher kept or sampled where that would change what it says.

    Args:
        config: the section ``regularizers``.
        objective: what it computes.
        decoder: the model's shape.
        longest: tokens of the longest row.
    """
    if config.teacher_cache_folder is not None and config.teacher_cache is not True:
        raise InputError(
            "regularizers.teacher_cache_folder: expected regularizers.teacher_cache true beside "
            "it, got it off: nothing is kept there. Set it to true, or leave the folder out."
        )
    if not objective.needs_teacher:
        return
    asked = {"teacher_cache": config.teacher_cache is True}
    asked["teacher_fraction"] = config.teacher_fraction < 1.0
    for key in (key for key, is_asked in asked.items() if is_asked):
        plain = "1" if key == "teacher_fraction" else "false"
        for rope in filter(None, (decoder.rope, decoder.local_rope)):
            if rope.kind in ("dynamic", "longrope") and longest > rope.original_length:
                raise InputError(
                    f"regularizers.{key}: expected {plain} with rope {rope.kind} and "
                    f"data.max_length {longest} above {rope.original_length}: a row's positions "
                    "then depend on the longest of its batch. Leave it out, or lower max_length."
                )
    if asked["teacher_fraction"]:
        _check_sampled(config, objective)


def _check_sampled(config: RegularizersConfig, objective: Objective) -> None:
    """Raises InputError where a sample of rows does not give a term on average."""
    share = config.teacher_fraction
    for one in (one for one in objective.active if one.term.needs_teacher):
        name = one.term.name
        if one.schedule.by_confidence is not None:
            raise InputError(
                f"regularizers.teacher_fraction: expected 1 with {name}_schedule "
                f"{one.schedule.name}, got {share}: that weight follows the teacher on all rows. "
                "Leave it out, or choose another schedule."
            )
        if one.term.couples_rows:
            raise InputError(
                f"regularizers.teacher_fraction: expected 1 with {name}, got {share}: the term "
                "couples rows, and a sample of them is another term. Leave it out."
            )


def factor_of(
    table: Float[Array, "V D"], mesh: sharding.AnyMesh, *, center: bool
) -> Float[Array, "D D"]:
    """The head's factor on every device, from a head that may lie on many hosts.

    A host never has more of the head than the rows of one block. The factor is that of process 0
    everywhere, bit for bit, whatever the others' linear algebra makes of the same numbers.
    """
    whole = sharding.replicated(mesh)

    @partial(jax.jit, static_argnums=2, out_shardings=whole)
    def rows(table: Array, first: Int[Array, ""], count: int) -> Array:
        return jax.lax.dynamic_slice_in_dim(table, first, count)

    def block(first: int, count: int) -> np.ndarray:
        return hosts.gathered(rows(table, first, count))

    factor = linalg.head_factor_of_rows(block, table.shape, center=center)
    if jax.process_count() > 1:
        factor = multihost_utils.broadcast_one_to_all(factor)
    return hosts.place(factor, whole)
