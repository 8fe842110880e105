"""The computation of a step of an encoder on labels, from a config and the model's shape alone."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from balora_jax.config import RegularizersConfig, RunConfig
from balora_jax.models.starts.start import check_without_rows
from balora_jax.models.structure import Structure, size_of, structure
from balora_jax.numerics.objective import Objective, for_labels, label_remarks, objective_of
from balora_jax.parallel import sharding
from balora_jax.pretrained.checkpoint import EncoderBase, check_head
from balora_jax.tasks import assemble, teacher
from balora_jax.tasks.labels.loss import Constants, LabelsLoss, counts_of
from balora_jax.training import steps
from balora_jax.training.adapters import Adapters, adapters_of, check_base
from balora_jax.training.run import Loaded


@dataclass(frozen=True)
class LabelsProgram:
    """Computation of a step of an encoder on labels.

    Attributes:
        config: the whole run.
        plain: the model without adapters, which with the first head is the teacher, unless that is
            the start.
        student: the same structure with adapters.
        adapters: what trains, and where it begins.
        objective: weights, terms and schedules; terms that the outputs leave undefined are off.
        mesh: the devices.
        outputs: C; 1 for regression.
    """

    config: RunConfig
    plain: Structure
    student: Structure
    adapters: Adapters
    objective: Objective
    mesh: Mesh
    outputs: int

    @property
    def layout(self) -> sharding.Layout:
        """Where every array of a run lies."""
        return sharding.Layout(self.student.axes, self.mesh)

    @property
    def trainable(self) -> int:
        """Trainable parameters, the head among them."""
        head = size_of(self.plain.head)
        return head + self.adapters.trainable(self.plain)

    @property
    def total(self) -> int:
        """Parameters of the frozen encoder."""
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
        """Whether the teacher's logits are computed once, before the first step."""
        return self.objective.needs_teacher and self.config.regularizers.teacher_cache is not False

    @property
    def loss(self) -> LabelsLoss:
        """The objective on one micro-batch."""
        return LabelsLoss(self.student, self.taught, self.objective, self.outputs)

    def step_parts(self, total_steps: int) -> steps.StepParts:
        """The pure functions of a training step."""
        training, dropout = self.config.training, self.config.adapter.dropout > 0.0
        return assemble.parts_of(
            training, self.objective, self.loss, counts_of, total_steps, dropout=dropout
        )

    def constants(self, loaded: Loaded) -> Constants:
        """What a step reads; the teacher's head is a copy of the student's first one."""
        head = {
            path: jnp.array(value, copy=True)
            for path, value in loaded.trainable.items()
            if path.startswith("head.")
        }
        start = None
        if self.taught_by_start and self.objective.needs_teacher:
            rest = {k: value for k, value in loaded.trainable.items() if k not in head}
            start = self.layout.placed(teacher.kept(self.student, rest))
        return Constants(loaded.frozen, loaded.origin, head, start)


def labels_objective(config: RegularizersConfig, outputs: int) -> Objective:
    """The objective for labels: terms that the outputs leave undefined are off."""
    return for_labels(_asked(config), outputs)


def _asked(config: RegularizersConfig) -> Objective:
    return objective_of(config.of_the_terms(), labels=True)


def labels_program(config: RunConfig, base: EncoderBase) -> LabelsProgram:
    """The computation that a config asks for on an encoder.

    Raises:
        InputError: a setting that does not fit the model or the devices.
    """
    outputs = base.config.num_labels
    objective = labels_objective(config.regularizers, outputs)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_experts(0, mesh)
    assemble.check_mesh(config.model, config.training, mesh)
    check_base(config.adapter, config.model)
    options: Any = {
        "dtype": config.model.dtype,
        "remat": config.model.remat,
        "quantization": config.model.quantization,
    }
    plain = structure(base.config, **options)
    adapters = adapters_of(config.adapter, base.config, plain)
    check_without_rows(adapters.start)
    saved, teacher_head = adapters.start.saved, config.regularizers.teacher_head
    check_head(base, saved, config.adapter.start, teacher_head)
    sharding.Layout(plain.axes, mesh).attached(plain.frozen)  # raises where an axis does not divide
    student = structure(base.config, adapters=adapters.shapes, whole=adapters.whole, **options)
    return LabelsProgram(config, plain, student, adapters, objective, mesh, outputs)


def remarks(program: LabelsProgram) -> list[str]:
    """What a reader should know of the terms before they trust a comparison."""
    training = program.config.training
    rows = training.batch_size // training.accumulation
    return label_remarks(_asked(program.config.regularizers), rows, program.outputs)
