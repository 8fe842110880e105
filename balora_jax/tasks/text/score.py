"""From prompts to texts, and from the validation rows to a score."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from balora_jax.array_types import Array, PRNGKeyArray
from balora_jax.config import DataConfig, EvalConfig, ModelConfig
from balora_jax.config_data import TrainSet
from balora_jax.data.conversations import answered, last_turn
from balora_jax.data.examples import encode_prompt
from balora_jax.data.sources import load_rows
from balora_jax.data.template_files import read_template, template_of
from balora_jax.data.templates import ExampleSettings, prompt_text
from balora_jax.data.training_sets import TrainingSet
from balora_jax.errors import InputError
from balora_jax.evals.benchmark import Benchmark, TextBenchmark, golds_of, place
from balora_jax.models.decoder import Decoder
from balora_jax.models.generation import Sampling, generate, make_decoder
from balora_jax.parallel import hosts
from balora_jax.pretrained.checkpoint import Base
from balora_jax.pretrained.load import PretrainedModel, continuations, load_decoder, sampling_for
from balora_jax.progress import progress_bar
from balora_jax.training.run import Scored

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
        questions: as people read them.
        prompts: token ids of every question.
        golds: the right answers.
        marker: text before a stated answer.
        grader: who judges, as ``eval.grader`` names it.
    """

    benchmark: TextBenchmark
    questions: list[str]
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
    ) -> Scored:
        """Answer every row, print the score and the first answer; with each row's prediction."""
        texts = answerer(parts, self.prompts, key, title)
        figures, verdicts = self.benchmark.judged(texts, self.golds, self.marker, self.grader)
        name, value = next(iter(figures.items()))
        shown = " ".join(texts[0].split())[:160]
        hosts.say(
            f"{title}: {name.replace('_', ' ')} {value:.3f} on {len(texts)} rows, by the grader "
            f"{figures['grader']}; "
            f"first answer: {shown!r} (right: {self.golds[0]})"
        )
        rows = zip(self.questions, self.golds, texts, strict=True)
        predictions: list[dict[str, Any]] = [
            {"row": number, "question": question, "gold": gold, "text": text}
            for number, (question, gold, text) in enumerate(rows, start=1)
        ]
        for row, verdict in zip(predictions, verdicts, strict=False):
            row |= verdict._asdict()
        return Scored(figures, predictions)


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
    prompts = encoded(asked.rows, tokenizer, settings)
    questions = [question_of(row, settings) for row in asked.rows]
    return Exam(asked.benchmark, questions, prompts, asked.golds, config.marker, config.grader)


def encoded(rows: Rows, tokenizer: Any, settings: ExampleSettings) -> list[list[int]]:
    """The token ids that ask the questions of validation rows.

    Raises:
        InputError: a row without a named column.
    """
    named = ((row, place(i)) for i, row in enumerate(rows, start=1))
    return [encode_prompt(row, tokenizer, settings, at) for row, at in named]


def question_of(row: Row, settings: ExampleSettings) -> str:
    """The question of a row, for people: of a conversation the last turn of the user."""
    cell = row.get(settings.messages_column or settings.prompt_column)
    if cell is None:
        return prompt_text(row, settings, "row")
    return last_turn(cell, "user") if isinstance(cell, list) else str(cell)


@dataclass(frozen=True)
class Samples:
    """Prompts whose answers are kept and shown at every score.

    Attributes:
        questions: as people read them.
        prompts: their token ids.
        golds: the right answers of those that have one.
        scored: how many more there are at the head of the exam, which are answered there.
    """

    questions: list[str]
    prompts: list[list[int]]
    golds: list[str | None]
    scored: int

    def taken(
        self,
        answerer: Callable[..., list[str]],
        parts: Sequence[dict[str, Array]],
        exam: Sequence[dict[str, Any]],
        *,
        key: PRNGKeyArray,
        title: str,
    ) -> list[dict[str, Any]]:
        """Prompt and answer of each, those of ``eval.prompts`` first.

        Args:
            answerer: writes the answers.
            parts: of the model.
            exam: predictions of the exam; empty where there is none.
            key: of the draws.
            title: of the progress bar.
        """
        texts = answerer(parts, self.prompts, key, f"{title} samples") if self.prompts else []
        own = zip(self.questions, texts, self.golds, strict=True)
        known = [(row["question"], row["text"], row["gold"]) for row in exam[: self.scored]]
        return [
            {"prompt": question, "answer": text} | ({} if gold is None else {"gold": gold})
            for question, text, gold in (*own, *known)
        ]


def samples_of(
    tokenizer: Any, data: DataConfig, config: EvalConfig, exam: Exam | None
) -> Samples | None:
    """The prompts of ``eval.prompts``, and of the first ``eval.samples`` validation rows.

    None where none is asked for.

    Raises:
        InputError: there are no validation rows, or one cannot be asked.
    """
    settings = example_settings(data)
    rows = [question_row(prompt, settings) for prompt in config.prompts]
    golds: list[str | None] = [None] * len(rows)
    named = ((row, f"eval.prompts, {i}") for i, row in enumerate(rows, start=1))
    prompts = [encode_prompt(row, tokenizer, settings, at) for row, at in named]
    if config.samples and exam is None:
        if data.validation is None:
            raise InputError(
                f"eval.samples: expected 0 without data.validation, got {config.samples}: there "
                "are no rows to ask. Name a file of rows, or write questions into eval.prompts."
            )
        limits = [n for n in (config.limit, data.validation_limit) if n is not None]
        limit = min([config.samples, *limits])
        found = load_rows(data.validation, split=data.validation_split, limit=limit)
        found = list(map(dict, found))
        prompts += encoded(found, tokenizer, settings)
        rows += found
        golds += [answer_of(row, settings) for row in found]
    if not rows and not config.samples:
        return None
    questions = [question_of(row, settings) for row in rows]
    return Samples(questions, prompts, golds, config.samples if exam else 0)


def answer_of(row: Row, settings: ExampleSettings) -> str | None:
    """The answer that stands in a row that is not scored; None where there is none."""
    cell = row.get(settings.messages_column or settings.response_column)
    return (
        last_turn(cell, "assistant")
        if isinstance(cell, list)
        else None
        if cell is None
        else str(cell)
    )


def opened_model(config: ModelConfig, adapter: str | None) -> PretrainedModel:
    """The base as training opens it, with an adapter on it if one is named."""
    return load_decoder(
        config.name_or_path,
        adapter=adapter,
        revision=config.revision,
        dtype=config.dtype,
        attention=config.attention,
        quantization=config.quantization,
    )
