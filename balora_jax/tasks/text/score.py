"""From prompts to texts to a score, for training, ``balora eval`` and ``balora generate``."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
from tqdm import tqdm

from balora_jax.array_types import Array, PRNGKeyArray
from balora_jax.config import DataConfig, EvalConfig, RunConfig
from balora_jax.data.examples import encode_prompt
from balora_jax.data.sources import load_rows
from balora_jax.data.templates import ExampleSettings
from balora_jax.errors import InputError
from balora_jax.evals.score import gold_answer, score_answers
from balora_jax.models.decoder import Decoder
from balora_jax.models.generation import Sampling, generate, make_decoder
from balora_jax.parallel import hosts
from balora_jax.pretrained.checkpoint import Base
from balora_jax.pretrained.load import load_decoder, sampling_for

Rows = Sequence[Mapping[str, Any]]


class Answerer:
    """Prompts in, texts out, with one compiled decoder for all batches and all adapters."""

    def __init__(self, bind: Callable[..., Decoder], base: Base, config: EvalConfig):
        self.tokenizer = tokenizer = base.tokenizer()
        self.batch_size = config.batch_size
        self.sampling: Sampling = sampling_for(
            tokenizer,
            config.max_new_tokens,
            config.temperature,
            config.top_p,
            stop_ids=base.stop_ids(),
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
        with tqdm(total=len(prompts), desc=title, unit="row", disable=quiet) as bar:
            tokens = generate(
                self._decoder,
                parts,
                prompts,
                self.sampling,
                batch_size=min(self.batch_size, len(prompts)),
                key=key,
                progress=bar.update,
            )
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)


def example_settings(config: DataConfig) -> ExampleSettings:
    """How rows become examples, from the config's section."""
    return ExampleSettings(
        template=config.template,
        prompt_column=config.prompt_column,
        response_column=config.response_column,
        messages_column=config.messages_column,
        max_length=config.max_length,
        overlong=config.overlong,
    )


def validation_rows(config: RunConfig) -> Rows:
    """The rows that a run is scored on; none where there is no score."""
    if config.data.validation is None or config.eval.task == "none":
        return ()
    limits = [n for n in (config.eval.limit, config.data.validation_limit) if n is not None]
    rows = load_rows(
        config.data.validation,
        split=config.data.validation_split,
        limit=min(limits) if limits else None,
    )
    return [dict(row) for row in rows]


def questions(rows: Rows, tokenizer: Any, config: RunConfig) -> tuple[list[list[int]], list[str]]:
    """The prompt (token ids) and the right answer of every row.

    Raises:
        InputError: a row without a named column.
    """
    settings = replace(
        example_settings(config.data),
        prompt_column=config.eval.prompt_column or config.data.prompt_column,
    )
    column = config.eval.gold_column or config.data.response_column
    golds = [gold_answer(row, column, config.eval.marker) for row in rows]
    return [encode_prompt(dict(row), tokenizer, settings) for row in rows], golds


def score_rows(
    answerer: Answerer,
    parts: Sequence[dict[str, Array]],
    rows: Rows,
    config: RunConfig,
    *,
    key: PRNGKeyArray,
    title: str,
) -> dict[str, Any]:
    """Answer every row, print the score and the first answer, return the figures."""
    prompts, golds = questions(rows, answerer.tokenizer, config)
    texts = answerer(parts, prompts, key, title)
    figures = score_answers(texts, golds, config.eval.marker)
    shown = " ".join(texts[0].split())[:160]
    hosts.say(
        f"{title}: exact match {figures['exact_match']:.3f} on {len(rows)} rows; "
        f"first answer: {shown!r} (right: {golds[0]})"
    )
    return figures


def evaluate(config: RunConfig, *, adapter: str | None) -> dict[str, Any]:
    """Score a base model, or an adapter on it, on ``data.validation``.

    Raises:
        InputError: no validation rows are configured, or anything a run would refuse.
    """
    if config.eval.task == "none":
        raise InputError(
            "eval.task: expected a task to score, got 'none'. Set it, as with --set "
            "eval.task=exact_match."
        )
    rows = validation_rows(config)
    if not rows:
        raise InputError(
            "data.validation: expected rows to score, got none. Name a file with --set "
            "data.validation=FILE."
        )
    model = load_decoder(config.model.name_or_path, adapter=adapter, dtype=config.model.dtype)
    answerer = Answerer(model.bind, model.base, config.eval)
    key = jax.random.key(config.training.seed)
    return score_rows(answerer, model.parts, rows, config, key=key, title="score")


def continue_prompts(
    config: RunConfig, prompts: Sequence[str], *, adapter: str | None, raw: bool
) -> list[str]:
    """Texts after prompts; each is put in ``data.template`` first unless ``raw``."""
    model = load_decoder(config.model.name_or_path, adapter=adapter, dtype=config.model.dtype)
    settings = example_settings(config.data)
    if raw:
        ids = [model.tokenizer(prompt)["input_ids"] for prompt in prompts]
    else:
        rows = [{config.data.prompt_column: prompt} for prompt in prompts]
        ids = [encode_prompt(row, model.tokenizer, settings) for row in rows]
    answerer = Answerer(model.bind, model.base, config.eval)
    return answerer(model.parts, ids, jax.random.key(config.training.seed), "generate")
