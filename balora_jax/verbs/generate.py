"""``balora generate``: prompts and how the model continues them."""

import argparse
from typing import TYPE_CHECKING

from balora_jax.errors import InputError
from balora_jax.verbs.verb import Verb, report

if TYPE_CHECKING:
    from balora_jax.config import RunConfig


def add_options(parser: argparse.ArgumentParser) -> None:
    """The adapter, the prompts and the report."""
    parser.add_argument("--adapter", help="PEFT folder; the base alone without it")
    parser.add_argument("--prompt", action="append", required=True, help="may be repeated")
    parser.add_argument("--raw", action="store_true", help="do not apply data.template")
    parser.add_argument("--json", help="write prompts and texts to this file")


def run(config: "RunConfig", options: argparse.Namespace) -> None:
    """Continue each prompt."""
    from balora_jax.io.program_cache import kept
    from balora_jax.tasks.registry import TASKS

    generate = TASKS[config.task].generate
    if generate is None:
        raise InputError(f"generate: expected task text, got {config.task}. Use balora eval.")
    with kept(config.training.compilation_cache):
        texts = generate(config, options.prompt, adapter=options.adapter, raw=options.raw)
    pairs = list(zip(options.prompt, texts, strict=True))
    for prompt, text in pairs:
        print(f"> {prompt}\n{text}")
    if options.json:
        report([{"prompt": prompt, "text": text} for prompt, text in pairs], options.json)


VERB = Verb("generate", "continue prompts", add_options, run)
