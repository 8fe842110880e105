"""A checked run of a decoder on text, and what ``balora eval`` and ``generate`` do with one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from balora_jax.array_types import PRNGKeyArray
from balora_jax.config import DataConfig, RunConfig
from balora_jax.data.batches import Mode, TextBatches, common_length
from balora_jax.data.examples import (
    EncodedSet,
    describe_example,
    encode_prompt,
    encode_rows,
    text_ids,
)
from balora_jax.data.training_sets import TrainingData, TrainingSet, encode_sets, load_sets
from balora_jax.errors import InputError
from balora_jax.evals.benchmark import RATES, TextBenchmark
from balora_jax.parallel import hosts, sharding
from balora_jax.paths import named_folder
from balora_jax.pretrained.checkpoint import Base, open_base
from balora_jax.tasks import assemble, teacher
from balora_jax.tasks.flops import model_flops
from balora_jax.tasks.measured import check_measured
from balora_jax.tasks.settings import benchmark_of
from balora_jax.tasks.text.chat import Chat, opened
from balora_jax.tasks.text.loss import Constants
from balora_jax.tasks.text.moments import RowMoments
from balora_jax.tasks.text.program import TextProgram, text_program
from balora_jax.tasks.text.score import (
    Answerer,
    Exam,
    Samples,
    asked_of,
    exam_of,
    example_settings,
    opened_model,
    question_row,
    samples_of,
    training_sets,
)
from balora_jax.tasks.text.teacher_rows import Kept, TeacherRows, check_room, planned, said_size
from balora_jax.tasks.text.validate import HeldOutRows, TextValidator, held_out_rows
from balora_jax.training.run import Arrays, Loaded, Scored, Scorer

MODES: Mapping[str, Mode] = {"none": "padding", "batch": "batch", "rows": "packing"}
"""What ``data.packing`` asks for, in the words of checkpoints."""


@dataclass(frozen=True)
class TextRun(TextProgram):
    """A checked run: a program and its data, but no weights yet.

    Attributes:
        base: the pretrained checkpoint.
        tokenizer: its tokenizer.
        data: encoded training rows and what became of them.
        length: tokens of every row of a batch that is not packed by ``packing: batch``.
        exam: the rows of the score; None for no score.
        samples: prompts whose answers are kept at every score; None for none.
        held_out: the rows of the validation loss; None for none.
    """

    base: Base
    tokenizer: Any
    data: TrainingData
    length: int
    exam: Exam | None = None
    samples: Samples | None = None
    held_out: EncodedSet | None = None

    def batches(self, mode: Mode | None = None) -> TextBatches:
        """The training batches, from the beginning; ``mode`` instead of ``data.packing``'s."""
        training = self.config.training
        return TextBatches(
            self.data.examples,
            batch_size=training.batch_size // training.accumulation,
            accumulation=training.accumulation,
            length=self.length,
            mode=mode or MODES[self.config.data.packing],
            seed=training.seed,
            pad_id=self.base.padding_id(self.tokenizer),
            weighted=self.data.weighted,
            row_multiple=sharding.row_parts(self.mesh),
            length_multiple=sharding.token_parts(self.mesh),
            numbered=self.keeps_teacher,
        )

    def step_flops(self, shape: Sequence[int], counted: float) -> float:
        """Operations of a step with so many tokens in the loss; padding is computed as well."""
        return model_flops(self, shape, counted)

    def load(self) -> Loaded:
        """The frozen weights and the adapters' start."""
        frozen = self.base.load_for(self.plain, self.mesh)
        moments = RowMoments(self, frozen, self.data.examples, self.length)
        trainable, origin = self.adapters.begin(
            frozen,
            self.config.model,
            self.layout,
            seed=self.config.training.seed,
            moments=moments,
        )
        return Loaded(frozen, origin, trainable)

    def check_folders(self, folder: Path, shared: Path | None = None) -> None:
        """Raises InputError where what is kept of the teacher cannot be written, or has no room."""
        if self.keeps_teacher:
            key, place, _ = self._teacher_folder(folder, shared)
            check_room(self, self.data.examples, place, key)

    def _teacher_folder(self, folder: Path, shared: Path | None = None) -> tuple[str, Path, bool]:
        """What names the folder of the teacher's rows, the folder, and whether runs share it."""
        key, config = "regularizers.teacher_cache_folder", self.config
        if (name := config.regularizers.teacher_cache_folder) is not None:
            return key, named_folder(name, key), True
        return "--workdir", shared or folder, shared is not None

    def teacher(
        self, constants: Constants, folder: Path, shared: Path | None = None
    ) -> Kept | None:
        """The teacher's hidden states of the training set, computed once and kept on disk.

        None where no term reads them, or where each step is to compute its own.
        """
        if not self.keeps_teacher:
            return None
        rows = TeacherRows(
            self,
            self.data.examples,
            digest=self.batches().get_state()["examples"],
            base=self.base.fingerprint,
            length=self.length,
            pad_id=self.base.padding_id(self.tokenizer),
        )
        _, place, is_shared = self._teacher_folder(folder, shared)
        return rows.ready(constants.of_teacher, place, shared=is_shared)

    def prepare(self, batch: dict[str, Any], teacher: Kept | None) -> dict[str, Any]:
        """A batch as the step takes it, with its teacher's hidden states where they are at hand."""
        return batch if teacher is None else teacher.added(batch)

    def validator(self) -> TextValidator | None:
        """What measures the loss of the held-out rows; None where that is not asked for."""
        if self.held_out is None:
            return None
        training, data = self.config.training, self.config.data
        return TextValidator(
            self.whole_loss,
            self.held_out.examples,
            micro_batch=training.batch_size // training.accumulation,
            length=row_length(in_padded_rows(data), self.held_out, self.base, self.mesh),
            packed=data.packing != "none",
            pad_id=self.base.padding_id(self.tokenizer),
            mesh=self.mesh,
        )

    def scorer(self) -> Scorer | None:
        """What answers the validation rows, with one compiled decoder; None without rows."""
        if self.exam is None and self.samples is None:
            return None
        answerer = Answerer(self.student.bind, self.base, self.tokenizer, self.config.eval)
        return partial(self._score, answerer)

    def _score(
        self,
        answerer: Answerer,
        constants: Constants,
        trainable: Arrays,
        key: PRNGKeyArray,
        title: str,
    ) -> Scored:
        parts, found = (constants.frozen, constants.origin, trainable), Scored({})
        if self.exam is not None:
            found = self.exam.score(answerer, parts, key=key, title=title)
        if self.samples is None:
            return found
        known = found.predictions
        samples = self.samples.taken(answerer, parts, known, key=key, title=title)
        return found._replace(samples=samples)

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
        return [{"set": name, "row": bad.row, "reason": bad.reason} for name, bad in self.data.bad]

    def describe(self) -> list[str]:
        """Lines about the data, for the start of a run."""
        return [
            f"data: {self.data.report}; {self.batches().describe()}",
            *self.data.notes,
            *self._of_held_out(),
            *self._of_teacher(),
            f"first example: {describe_example(self.data.examples[0], self.tokenizer)}",
            *(f"first {name}: {text}" for name, text in self.data.others),
        ]

    def _of_held_out(self) -> list[str]:
        if self.held_out is None:
            return []
        first = describe_example(self.held_out.examples[0], self.tokenizer)
        return [
            f"validation: {self.held_out.report}, every {self.config.eval.every} steps",
            f"first validation example: {first}",
        ]

    def _of_teacher(self) -> list[str]:
        if not self.keeps_teacher:
            return []
        size = said_size(planned(self, self.data.examples))
        return [f"teacher: computed once; kept on disk are {size}"]


class _Opened(NamedTuple):
    """Inputs of a :class:`TextRun`, and the training sets as they were read."""

    program: TextProgram
    base: Base
    tokenizer: Any
    sets: list[TrainingSet]
    exam: Exam | None
    samples: Samples | None
    held_out: HeldOutRows | None


def check(config: RunConfig) -> TextRun:
    """Open and check everything a run reads, short of loading the weights.

    To be called by all processes of a run; each tokenises its part of the training rows.

    Raises:
        InputError: whatever is wrong, as one sentence.
        RunStoppedError: it is wrong in another process.
    """
    opened = hosts.together(partial(_open, config))
    data = encode_sets(opened.sets, opened.tokenizer, share_out=hosts.share_out)
    opened.base.check_ids(data.examples)
    held_out = None if opened.held_out is None else encoded(opened.held_out, opened)
    terms, program = config.regularizers, opened.program
    hosts.warn(*teacher.remarks(terms, program.adapters, program.objective, trained_head=False))
    run = TextRun(
        **vars(opened.program),
        base=opened.base,
        tokenizer=opened.tokenizer,
        data=data,
        exam=opened.exam,
        samples=opened.samples,
        length=row_length(config.data, data, opened.base, opened.program.mesh),
        held_out=held_out,
    )
    hosts.warn(*_of_the_share(run))
    return run


def _open(config: RunConfig) -> _Opened:
    # Before a checkpoint is looked for.
    terms = assemble.objective_of(config.regularizers).term_set.terms
    benchmark = benchmark_of(config.task, config.eval.task)
    asked = asked_of(config.data, config.eval, benchmark)
    source = benchmark.source if isinstance(benchmark, TextBenchmark) else None
    check_measured(
        config.eval,
        config.training,
        rows=config.data.validation is not None or source is not None,
        losses=("loss", "perplexity", *(term.name for term in terms)),
        scores=() if asked is None else RATES,
        shown=bool(config.eval.samples or config.eval.prompts),
    )
    held_out = None
    if config.eval.every:
        held_out = held_out_rows(config.data, config.eval, benchmark)
    base = open_base(config.model.name_or_path, config.model.revision)
    program = text_program(config, base.config)
    base = replace(base, config=program.decoder)
    tokenizer = base.tokenizer()
    sets = load_sets(training_sets(config.data))
    exam = exam_of(tokenizer, config.data, config.eval, asked)
    samples = samples_of(tokenizer, config.data, config.eval, exam)
    for asks in (exam, samples):
        if asks is not None:  # what is wrong is said before a weight is read
            base.stop_ids()
            base.check_prompts(asks.prompts, config.eval.max_new_tokens)
    return _Opened(program, base, tokenizer, sets, exam, samples, held_out)


def encoded(held_out: HeldOutRows, opened: _Opened) -> EncodedSet:
    """Validation rows as examples, each of which the model has positions for."""
    share_out, tokenizer = hosts.share_out, opened.tokenizer
    try:
        found = encode_rows(held_out.rows, tokenizer, held_out.settings, share_out=share_out)
        opened.base.check_ids(found.examples)
        data = in_padded_rows(opened.program.config.data)
        row_length(data, found, opened.base, opened.program.mesh)
    except InputError as error:
        raise InputError(f"data.validation with eval.every: {error}") from error
    return found


def in_padded_rows(data: DataConfig) -> DataConfig:
    """The section of a run whose rows hold one example each."""
    return data.model_copy(update={"packing": "none"})


def _of_the_share(run: TextRun) -> list[str]:
    """A note where ``regularizers.teacher_fraction`` leaves no row out."""
    if run.share is None or any(run.share.of(shape.rows) for shape in run.batches().shapes):
        return []
    return [
        f"note: regularizers.teacher_fraction {run.share.fraction} leaves out no row: it is a "
        "share of the rows of a micro-batch on each device, rounded up. Use more rows in each."
    ]


def row_length(config: DataConfig, data: TrainingData | EncodedSet, base: Base, mesh: Mesh) -> int:
    """Tokens of a row that holds one example, or with ``packing: rows`` as many as fit."""
    length = config.max_length if config.packing == "rows" else None
    length = length or common_length(data.examples, config.max_length)
    longest = max(len(example.input_ids) for example in data.examples)
    if longest > base.config.max_length:
        raise InputError(
            f"data.max_length: expected at most {base.config.max_length}, the positions that "
            f"{base.folder.name} was made for, got a row of {longest} tokens. Lower it."
        )
    return sharding.round_up_length(length, config.max_length, mesh)


def evaluate(config: RunConfig, *, adapter: str | None) -> Scored:
    """Score a base model, or an adapter on it, on the validation rows.

    Raises:
        InputError: no validation rows are configured, or anything a run would refuse.
    """
    benchmark = benchmark_of(config.task, config.eval.task)
    if not isinstance(benchmark, TextBenchmark):
        raise InputError(
            f"eval.task: expected a task to score, got {benchmark.name!r}. Set it, as with --set "
            "eval.task=exact_match."
        )
    if config.data.validation is None and benchmark.source is None:
        raise InputError(
            "data.validation: expected rows to score, got none. Name a file with --set "
            "data.validation=FILE."
        )
    asked = asked_of(config.data, config.eval, benchmark)
    model = opened_model(config.model, adapter)
    exam = exam_of(model.tokenizer, config.data, config.eval, asked)
    assert exam is not None  # load_rows raises where there is no row
    model.base.check_prompts(exam.prompts, config.eval.max_new_tokens)
    answerer = Answerer(model.bind, model.base, model.tokenizer, config.eval)
    key = jax.random.key(config.training.seed)
    return exam.score(answerer, model.parts, key=key, title="score")


def generate(
    config: RunConfig, prompts: Sequence[str], *, adapter: str | None, raw: bool
) -> list[str]:
    """Texts after prompts; each is put in ``data.template`` first unless ``raw``."""
    model = opened_model(config.model, adapter)
    settings = example_settings(config.data)
    if raw:
        ids = text_ids(list(prompts), model.tokenizer)
    else:
        rows = [question_row(prompt, settings) for prompt in prompts]
        named = [(row, f"prompt {i}") for i, row in enumerate(rows, start=1)]
        ids = [encode_prompt(row, model.tokenizer, settings, at) for row, at in named]
    model.base.check_prompts(ids, config.eval.max_new_tokens)
    answerer = Answerer(model.bind, model.base, model.tokenizer, config.eval)
    return answerer(model.parts, ids, jax.random.key(config.training.seed), "generate")


def chat(config: RunConfig, *, adapter: str | None, compare: bool, system: str | None) -> Chat:
    """A conversation under the settings of a config; the rest is as in :func:`opened`."""
    return opened(
        config.model,
        config.data,
        config.eval,
        seed=config.training.seed,
        adapter=adapter,
        compare=compare,
        system=system,
    )
