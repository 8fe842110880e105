"""From prompts to texts, and from the validation rows to a score."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from balora_jax.array_types import Array, PRNGKeyArray
from balora_jax.config import DataConfig, EvalConfig
from balora_jax.config_data import TrainSet
from balora_jax.data.conversations import answered
from balora_jax.data.examples import encode_prompt
from balora_jax.data.sources import load_rows
from balora_jax.data.template_files import read_template, template_of
from balora_jax.data.templates import ExampleSettings
from balora_jax.data.training_sets import TrainingSet
from balora_jax.evals.benchmark import Benchmark, TextBenchmark, golds_of, place
from balora_jax.models.decoder import Decoder
from balora_jax.models.generation import Sampling, generate, make_decoder
from balora_jax.parallel import hosts
from balora_jax.pretrained.checkpoint import Base
from balora_jax.pretrained.load import continuations, sampling_for
from balora_jax.progress import progress_bar

Row = Mapping[str, Any]
Rows = Sequence[Row]


class Answerer:
    """Prompts in, texts out, with one compiled decoder for all batches and all adapters."""

    def __init__(
        self, bind: Callable[..., Decoder], base: Base, tokenizer: Any, config: EvalConfig
    ):
        self.tokenizer = tokenizer
        self.batch_size = config.batch_size
        self.sampling: Sampling = sampling_for(
            base, tokenizer, config.max_new_tokens, config.temperature, config.top_p
        )
        self._decoder = make_decoder(bind, self.sampling)

    def __call__(
        self,
        parts: Sequence[dict[str, Array]],
        prompts: Sequence[Sequence[int]],
        key: PRNGKeyArray,
        title: str,
    ) -> list[str]:
        """Texts after each prompt (token ids), with a progress bar called ``title``."""
        quiet = not hosts.is_first()
        with progress_bar(total=len(prompts), desc=title, unit="row", disable=quiet) as bar:

            def progress(rows: int) -> None:
                bar.update(rows)
                hosts.moved()

            tokens = generate(
                self._decoder,
                parts,
                prompts,
                self.sampling,
                batch_size=min(self.batch_size, len(prompts)),
                key=key,
                progress=progress,
            )
        return continuations(self.tokenizer, prompts, tokens)


def example_settings(config: DataConfig, part: TrainSet | None = None) -> ExampleSettings:
    """How rows become examples, from the config's section; of one of several sets, with its own.

    Raises:
        InputError: a template that cannot be read, or settings that do not fit each other.
    """
    chat = config.chat_template
    shared = ExampleSettings(
        template=template_of(config.template),
        prompt_column=config.prompt_column,
        response_column=config.response_column,
        input_column=config.input_column,
        messages_column=config.messages_column,
        tools_column=config.tools_column,
        assistant_turns=config.assistant_turns,
        conversation=config.conversation,
        chat_template=None if chat is None else read_template(chat, "data.chat_template"),
        chat_template_kwargs=config.chat_template_kwargs,
        today=config.today,
        max_length=config.max_length,
        overlong=config.overlong,
        bad_rows=config.bad_rows,
    )
    if part is None:
        return shared
    own = part.model_dump(exclude_none=True, exclude={"path", "weight", "split", "limit"})
    if part.template is not None:
        own["template"] = template_of(part.template)
    return replace(shared, **own)


def training_sets(data: DataConfig) -> list[TrainingSet]:
    """The sets that ``data.train`` names, not read yet."""
    assert data.train is not None  # checked with the config
    named = (TrainSet(path=data.train),) if isinstance(data.train, str) else data.train
    return [
        TrainingSet(
            one.path,
            one.split or data.split,
            one.limit or data.train_limit,
            example_settings(data, one),
            one.weight,
        )
        for one in named
    ]


def question_row(question: str, settings: ExampleSettings) -> Row:
    """A row that asks a question alone."""
    if settings.messages_column is None:
        return {settings.prompt_column: question}
    return {settings.messages_column: [{"role": "user", "content": question}]}


@dataclass(frozen=True)
class Exam:
    """The rows of a score, ready to be asked.

    Attributes:
        benchmark: how answers are read and judged.
        prompts: token ids of every question.
        golds: the right answers.
        marker: text before a stated answer.
        grader: who judges, as ``eval.grader`` names it.
    """

    benchmark: TextBenchmark
    prompts: list[list[int]]
    golds: list[str]
    marker: str
    grader: str

    def score(
        self,
        answerer: Callable[..., list[str]],
        parts: Sequence[dict[str, Array]],
        *,
        key: PRNGKeyArray,
        title: str,
    ) -> dict[str, Any]:
        """Answer every row, print the score and the first answer, return the figures."""
        texts = answerer(parts, self.prompts, key, title)
        figures = self.benchmark.score(texts, self.golds, self.marker, self.grader)
        name, value = next(iter(figures.items()))
        shown = " ".join(texts[0].split())[:160]
        hosts.say(
            f"{title}: {name.replace('_', ' ')} {value:.3f} on {len(texts)} rows, by the grader "
            f"{figures['grader']}; "
            f"first answer: {shown!r} (right: {self.golds[0]})"
        )
        return figures


def validation_rows(data: DataConfig, config: EvalConfig, benchmark: Benchmark) -> Rows:
    """The rows that a run is scored on; none where there is no score."""
    if not isinstance(benchmark, TextBenchmark):
        return ()
    source, split = data.validation, data.validation_split
    if source is None:
        source, split = benchmark.source, benchmark.split
    if source is None:
        return ()
    limits = [n for n in (config.limit, data.validation_limit) if n is not None]
    return list(map(dict, load_rows(source, split=split, limit=min(limits) if limits else None)))


@dataclass(frozen=True)
class Asked:
    """The questions and right answers of the validation rows, before any model is known.

    Attributes:
        benchmark: that asks.
        rows: the rows, each with its question in the column ``prompt``.
        prompt: name of that column.
        golds: the right answers.
    """

    benchmark: TextBenchmark
    rows: Rows
    prompt: str
    golds: list[str]


def asked_of(data: DataConfig, config: EvalConfig, benchmark: Benchmark) -> Asked | None:
    """What the validation rows ask; None where there is no score.

    Raises:
        InputError: a row without a named column, or without a right answer.
    """
    rows = validation_rows(data, config, benchmark)
    if not rows or not isinstance(benchmark, TextBenchmark):
        return None
    prompt = config.prompt_column or benchmark.prompt_column or data.prompt_column
    gold = config.gold_column or benchmark.gold_column or data.response_column
    if data.messages_column is not None and gold not in rows[0]:
        # The last answer of a conversation is the right one.
        settings = example_settings(data)
        named = ((row, place(i)) for i, row in enumerate(rows, start=1))
        rows = [answered(row, settings, gold, at) for row, at in named]
    golds = golds_of(benchmark, rows, gold, config.marker)
    if benchmark.question is not None:
        rows = [{**row, prompt: benchmark.question(row)} for row in rows]
    return Asked(benchmark, rows, prompt, golds)


def exam_of(
    tokenizer: Any, data: DataConfig, config: EvalConfig, asked: Asked | None
) -> Exam | None:
    """What is asked as tokens; None where nothing is.

    Raises:
        InputError: a row without a named column.
    """
    if asked is None:
        return None
    settings = replace(example_settings(data), prompt_column=asked.prompt)
    named = ((row, place(i)) for i, row in enumerate(asked.rows, start=1))
    prompts = [encode_prompt(row, tokenizer, settings, at) for row, at in named]
    return Exam(asked.benchmark, prompts, asked.golds, config.marker, config.grader)
