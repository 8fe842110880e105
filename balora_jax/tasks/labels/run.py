"""A checked run of an encoder on labels, and what ``balora eval`` does with one."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from balora_jax.array_types import Array
from balora_jax.config import DataConfig, RunConfig
from balora_jax.data.glue import LabelsTask
from balora_jax.data.labels import (
    LabelsBatches,
    LabelsExample,
    LabelsSet,
    describe_labels,
    encode_labels,
    padded_length,
)
from balora_jax.errors import InputError
from balora_jax.parallel import hosts, sharding
from balora_jax.pretrained.checkpoint import EncoderBase, head_parts, open_encoder
from balora_jax.pretrained.load import load_encoder
from balora_jax.tasks import teacher
from balora_jax.tasks.flops import encoder_flops
from balora_jax.tasks.labels import probe
from balora_jax.tasks.labels.loss import TEACHER, Constants
from balora_jax.tasks.labels.program import LabelsProgram, labels_objective, labels_program, remarks
from balora_jax.tasks.labels.score import (
    LabelsScorer,
    forward_rows,
    logits_forward,
    over_rows,
    rates_of,
    task_of,
    train_rows,
    validation_rows,
)
from balora_jax.tasks.labels.teacher_cache import TeacherCache
from balora_jax.tasks.labels.validate import LabelsValidator
from balora_jax.tasks.measured import check_measured
from balora_jax.tasks.settings import benchmark_of
from balora_jax.training.run import Loaded, Scored

Arrays = dict[str, Array]


@dataclass(frozen=True)
class LabelsRun(LabelsProgram):
    """A checked run: a program and its data, but no weights yet.

    Attributes:
        base: the pretrained checkpoint.
        tokenizer: its tokenizer.
        task: columns, labels and metrics.
        data: encoded training rows and what became of them.
        validation: title → encoded rows of the score; empty for none.
        length: most tokens of a row of a batch.
        held_out: the rows of the validation loss; None for none.
    """

    base: EncoderBase
    tokenizer: Any
    task: LabelsTask
    data: LabelsSet
    validation: Mapping[str, LabelsSet]
    length: int
    held_out: LabelsSet | None = None

    @cached_property
    def forward(self) -> Any:
        """The jitted forward of the model, of the score and of the validation loss."""
        return logits_forward(self.student.bind)

    @property
    def pad_id(self) -> int:
        """The token for empty places."""
        return self.base.padding_id(self.tokenizer)

    def batches(self) -> LabelsBatches:
        """The training batches, from the beginning."""
        training = self.config.training
        return LabelsBatches(
            self.data.examples,
            batch_size=training.batch_size // training.accumulation,
            accumulation=training.accumulation,
            length=self.length,
            seed=training.seed,
            pad_id=self.pad_id,
        )

    def step_flops(self, shape: Sequence[int], counted: float) -> float:
        """Operations of a step, counted as for decoders; padding is computed as well."""
        del counted  # the head is small, whatever it reads
        config = self.base.config
        linear = sum(v.size for path, v in self.plain.parameters.items() if "layers." in path)
        taught = self.objective.needs_teacher and not self.keeps_teacher
        layers, width = config.num_layers, config.hidden_size
        return encoder_flops(linear, layers, width, shape, taught=taught)

    def load(self) -> Loaded:
        """The frozen weights, and adapters and head at their start."""
        frozen = self.base.load_for(self.plain, self.mesh)
        trainable, origin = self.adapters.begin(
            frozen, self.config.model, self.layout, seed=self.config.training.seed
        )
        head = self.base.load_head(jax.random.key(self.config.training.seed))
        brought = head_parts(self.adapters.start.saved, self.base.head_rules)
        head |= {path: jnp.asarray(value) for path, value in brought.items()}
        if not brought and self.config.regularizers.teacher_head == "probe":
            begun = (origin, trainable) if self.taught_by_start else ()
            head = self._probed((frozen, *begun), head)
        return Loaded(frozen, origin, trainable | self.layout.placed(head))

    def _probed(self, parts: tuple[Arrays, ...], head: Arrays) -> Arrays:
        """A head fitted on the features of the training rows; ``parts`` are the teacher's."""
        bind = self.taught.bind
        forward = jax.jit(lambda parts, *arrays: bind(*parts).features(*arrays))
        features = self.over_training_rows(forward, (*parts, head), "probe")
        labels = np.asarray([example.label for example in self.data.examples])
        return probe.fit_head(self.plain.bind, parts[0], head, features, labels, self.outputs)

    def check_folders(self, folder: Path, shared: Path | None = None) -> None:
        """Logits of rows are few: there is room."""
        del folder, shared

    def teacher(
        self, constants: Constants, folder: Path, shared: Path | None = None
    ) -> np.ndarray | None:
        """The teacher's logits [rows, C] of the training set, computed once and kept in ``folder``.

        None where no term reads them, or where each step is to compute its own.
        """
        del shared  # it takes longer to say where they are than to compute them
        if not self.keeps_teacher:
            return None
        own = dict(constants.teacher_head)
        if constants.start is not None:
            own |= constants.start | constants.origin
        cache = TeacherCache(
            folder,
            base=self.base.fingerprint,
            own=hosts.gathered_all(own),
            examples=self.batches().get_state()["examples"],
            dtype=self.config.model.dtype + self.config.model.quantization,
            length=self.length,
        )
        found = cache.read()
        hosts.barrier("teacher cache read")  # nobody writes it before all have looked
        if found is None:
            forward = logits_forward(self.taught.bind)
            found = self.over_training_rows(forward, constants.of_teacher, "teacher")
            if hosts.is_first():
                cache.write(found)
        return found

    def prepare(self, batch: dict[str, Any], teacher: np.ndarray | None) -> dict[str, Any]:
        """A batch with its teacher's logits [micro-batches, B, C], where they are at hand."""
        return batch if teacher is None else {**batch, TEACHER: teacher[batch["row"]]}

    def over_training_rows(self, forward: Any, parts: Any, title: str) -> np.ndarray:
        """A function of every training row, in order."""
        return self._over_rows(forward, parts, self.data.examples, title)

    def _over_rows(
        self, forward: Any, parts: Any, examples: Sequence[LabelsExample], title: str
    ) -> np.ndarray:
        return over_rows(
            forward,
            parts,
            examples,
            batch_size=forward_rows(self.config.eval, self.mesh),
            length=padded_length(examples, longest(self.config.data, self.base)),
            pad_id=self.pad_id,
            mesh=self.mesh,
            title=title,
        )

    def validator(self) -> LabelsValidator | None:
        """What measures the loss of the held-out rows; None where that is not asked for."""
        if self.held_out is None:
            return None
        training = self.config.training
        return LabelsValidator(
            self.loss,
            self.forward,
            logits_forward(self.taught.bind),
            self.held_out.examples,
            micro_batch=training.batch_size // training.accumulation,
            over_rows=self._over_rows,
        )

    def scorer(self) -> LabelsScorer | None:
        """What scores the validation rows; None where there are none."""
        if not self.validation:
            return None
        return LabelsScorer(
            self.forward,
            self.validation,
            self.task,
            batch_size=forward_rows(self.config.eval, self.mesh),
            pad_id=self.pad_id,
            mesh=self.mesh,
            max_length=longest(self.config.data, self.base),
        )

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each training example, int."""
        return np.array([len(example.input_ids) for example in self.data.examples])

    @property
    def report(self) -> Any:
        """What became of the training rows: counts by name."""
        return self.data.report

    @property
    def left_out(self) -> list[dict[str, Any]]:
        """Training rows that cannot be read and were left out: ``set``, ``row``, ``reason``."""
        data = self.config.data
        name = data.train if isinstance(data.train, str) else data.glue
        return [{"set": name, "row": bad.row, "reason": bad.reason} for bad in self.data.bad]

    def describe(self) -> list[str]:
        """Lines about the data, for the start of a run."""
        first = describe_labels(self.data.examples[0], self.tokenizer, self.task)
        return [
            f"data: {self.data.report}; {self.batches().describe()}",
            *(f"{title}: {rows.report}" for title, rows in self.validation.items()),
            *self._of_held_out(),
            f"first example: {first}",
        ]

    def _of_held_out(self) -> list[str]:
        if self.held_out is None:
            return []
        return [
            f"loss of held-out rows: {self.held_out.report}, every {self.config.eval.every} steps"
        ]


def check(config: RunConfig) -> LabelsRun:
    """Open and check everything a run reads, short of loading the weights.

    To be called by all processes of a run; each reads all rows, of which there are few.

    Raises:
        InputError: whatever is wrong, as one sentence.
        RunStoppedError: it is wrong in another process.
    """
    return hosts.together(partial(_checked, config))


def _checked(config: RunConfig) -> LabelsRun:
    task = task_of(config.data)
    labels_objective(config.regularizers, task.outputs)  # before a checkpoint is looked for
    model = config.model
    base = open_encoder(model.name_or_path, model.revision, num_labels=task.outputs)
    program = labels_program(config, base)
    tokenizer = base.tokenizer()
    most = longest(config.data, base)
    rows = train_rows(config.data, task)
    data = encode_labels(rows, tokenizer, task, most, bad_rows=config.data.bad_rows)
    base.check_ids(data.examples)
    validation = encoded_validation(config, task, base, tokenizer)
    held_out = _held_out(config, task, base, tokenizer)
    rates = [name for title in validation for name in rates_of(task, title, len(validation))]
    check_measured(
        config.eval,
        config.training,
        rows=held_out is not None,
        losses=("loss", *(term.name for term in program.objective.term_set.terms)),
        scores=rates,
    )
    for line in remarks(program):
        print(line, file=sys.stderr, flush=True)
    brought = bool(head_parts(program.adapters.start.saved, base.head_rules))
    terms, adapters = config.regularizers, program.adapters
    hosts.warn(*teacher.remarks(terms, adapters, program.objective, trained_head=brought))
    return LabelsRun(
        **vars(program),
        base=base,
        tokenizer=tokenizer,
        task=task,
        data=data,
        validation=validation,
        length=padded_length(data.examples, most),
        held_out=held_out,
    )


def longest(config: DataConfig, base: EncoderBase) -> int:
    """Most tokens of a row: a position past the last has no embedding, not even under padding."""
    return min(config.max_length, base.config.max_length)


def encoded_validation(
    config: RunConfig, task: LabelsTask, base: EncoderBase, tokenizer: Any
) -> dict[str, LabelsSet]:
    """Title → encoded rows of the score; none where there is no score."""
    if benchmark_of(config.task, config.eval.task).task is None:
        return {}
    found = validation_rows(config.data, config.eval, task)
    most = longest(config.data, base)
    encoded = {title: encode_labels(rows, tokenizer, task, most) for title, rows in found.items()}
    for rows in encoded.values():
        base.check_ids(rows.examples)
    return encoded


def _held_out(
    config: RunConfig, task: LabelsTask, base: EncoderBase, tokenizer: Any
) -> LabelsSet | None:
    """The rows of the validation loss, of all sets together; None where none is asked for."""
    if not config.eval.every:
        return None
    whole = config.eval.model_copy(update={"limit": None})
    found = validation_rows(config.data, whole, task)
    rows = [row for part in found.values() for row in part]
    if not rows:
        return None
    encoded = encode_labels(rows, tokenizer, task, longest(config.data, base))
    base.check_ids(encoded.examples)
    return encoded


def evaluate(config: RunConfig, *, adapter: str | None) -> Scored:
    """Score a fine-tuned checkpoint, or an adapter on its base, on the validation rows.

    Raises:
        InputError: no validation rows, a head for another number of labels, or anything that a run
            would refuse.
    """
    task, settings = task_of(config.data), config.model
    model = load_encoder(
        settings.name_or_path,
        adapter=adapter,
        revision=settings.revision,
        dtype=settings.dtype,
        quantization=settings.quantization,
    )
    if model.config.num_labels != task.outputs:
        raise InputError(
            f"{adapter or settings.name_or_path}: expected a head with {task.outputs} outputs "
            f"for {task.name}, got {model.config.num_labels}. Name a model of this task."
        )
    validation = encoded_validation(config, task, model.base, model.tokenizer)
    if not validation:
        raise InputError(
            "data.validation: expected rows to score, got none. Name a file with --set "
            "data.validation=FILE."
        )
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_experts(0, mesh)
    scorer = LabelsScorer(
        logits_forward(model.bind),
        validation,
        task,
        batch_size=forward_rows(config.eval, mesh),
        pad_id=model.base.padding_id(model.tokenizer),
        mesh=mesh,
        max_length=longest(config.data, model.base),
    )
    return scorer.score(model.parts, "score")
