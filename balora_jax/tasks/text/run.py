"""A run of a decoder on text: its data, its weights and its score."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from balora_jax.array_types import Array, PRNGKeyArray
from balora_jax.config import DataConfig, RunConfig
from balora_jax.data.batches import TextBatches, common_length
from balora_jax.data.examples import EncodedSet, describe_example, encode_rows
from balora_jax.data.sources import Rows, load_rows
from balora_jax.errors import InputError
from balora_jax.parallel import hosts, sharding
from balora_jax.pretrained.checkpoint import Base, open_base
from balora_jax.pretrained.load import sampling_for
from balora_jax.tasks import assemble
from balora_jax.tasks.flops import model_flops
from balora_jax.tasks.text.loss import Constants
from balora_jax.tasks.text.moments import RowMoments
from balora_jax.tasks.text.program import TextProgram, text_program
from balora_jax.tasks.text.score import (
    Answerer,
    example_settings,
    questions,
    score_rows,
    validation_rows,
)
from balora_jax.training.run import Loaded


@dataclass(frozen=True)
class TextRun(TextProgram):
    """A checked run: a program and its data, but no weights yet.

    Attributes:
        base: the pretrained checkpoint.
        tokenizer: its tokenizer.
        data: encoded training rows and what became of them.
        validation: rows of the score, empty for none.
        length: tokens of every row of a batch.
    """

    base: Base
    tokenizer: Any
    data: EncodedSet
    validation: Sequence[Mapping[str, Any]]
    length: int

    def batches(self) -> TextBatches:
        """The training batches, from the beginning."""
        training = self.config.training
        return TextBatches(
            self.data.examples,
            batch_size=training.batch_size // training.accumulation,
            accumulation=training.accumulation,
            length=self.length,
            mode="packing" if self.config.data.packing else "padding",
            seed=training.seed,
            pad_id=sampling_for(self.tokenizer, 1).pad_id,
        )

    def step_flops(self, counted: float) -> float:
        """Operations of a step with so many tokens in the loss; padding is computed as well."""
        training = self.config.training
        rows = training.batch_size // training.accumulation
        return model_flops(self, (training.accumulation, rows, self.length), counted)

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

    def teacher(self, constants: Constants, folder: Path) -> None:
        """Nothing is computed ahead: hidden states of every token would fill the disk."""
        del constants, folder

    def prepare(self, batch: dict[str, Any], teacher: None) -> dict[str, Any]:
        """A batch as the step takes it."""
        del teacher
        return batch

    def scorer(self) -> "TextScorer | None":
        """What scores the validation rows; None where there are none."""
        return TextScorer(self) if self.validation else None

    def describe(self) -> list[str]:
        """Lines about the data, for the start of a run."""
        return [
            f"data: {self.data.report}; rows of {self.length} tokens",
            f"first example: {describe_example(self.data.examples[0], self.tokenizer)}",
        ]


class TextScorer:
    """Greedy answers to the validation rows, with one compiled decoder for the whole run."""

    def __init__(self, run: TextRun):
        self.run = run
        self.answerer = Answerer(run.student.bind, run.base, run.config.eval)

    def __call__(
        self,
        constants: Constants,
        trainable: dict[str, Array],
        key: PRNGKeyArray,
        title: str,
    ) -> dict[str, Any]:
        """The figures, printed as well."""
        parts = (constants.frozen, constants.origin, trainable)
        return score_rows(
            self.answerer, parts, self.run.validation, self.run.config, key=key, title=title
        )


class _Opened(NamedTuple):
    """What :class:`TextRun` says, and the training rows as they were read."""

    program: TextProgram
    base: Base
    tokenizer: Any
    rows: Rows
    validation: Sequence[Mapping[str, Any]]


def check(config: RunConfig) -> TextRun:
    """Open and check everything a run reads, short of loading the weights.

    To be called by all processes of a run; each tokenises its part of the training rows.

    Raises:
        InputError: whatever is wrong, as one sentence.
        RunStoppedError: it is wrong in another process.
    """
    opened = hosts.together(partial(_open, config))
    settings = example_settings(config.data)
    data = encode_rows(opened.rows, opened.tokenizer, settings, share_out=hosts.share_out)
    _check_vocabulary(data, opened.base)
    return TextRun(
        **vars(opened.program),
        base=opened.base,
        tokenizer=opened.tokenizer,
        data=data,
        validation=opened.validation,
        length=_row_length(config.data, data, opened.base, opened.program.mesh),
    )


def _open(config: RunConfig) -> _Opened:
    assemble.objective_of(config.regularizers)  # before a checkpoint is looked for
    base = open_base(config.model.name_or_path, config.model.revision)
    program = text_program(config, base.config)
    tokenizer = base.tokenizer()
    assert config.data.train is not None  # checked with the config
    rows = load_rows(config.data.train, split=config.data.split, limit=config.data.train_limit)
    validation = validation_rows(config)
    questions(validation, tokenizer, config)  # raises before anything is written
    return _Opened(program, base, tokenizer, rows, validation)


def _row_length(config: DataConfig, data: EncodedSet, base: Base, mesh: Mesh) -> int:
    length = config.max_length if config.packing else None
    length = length or common_length(data.examples, config.max_length)
    longest = max(len(example.input_ids) for example in data.examples)
    if longest > base.config.max_length:
        raise InputError(
            f"data.max_length: expected at most {base.config.max_length}, the positions that "
            f"{base.folder.name} was made for, got a row of {longest} tokens. Lower it."
        )
    return sharding.whole_length(length, config.max_length, mesh)


def _check_vocabulary(data: EncodedSet, base: Base) -> None:
    highest = max(int(example.input_ids.max()) for example in data.examples)
    if highest >= base.config.vocab_size:
        raise InputError(
            f"{base.folder}: expected token ids below vocab_size {base.config.vocab_size}, got "
            f"{highest} from its tokenizer. Use the tokenizer that belongs to the weights."
        )
