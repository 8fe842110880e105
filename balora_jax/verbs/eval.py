"""``balora eval``: the score of a base model or of an adapter."""

import argparse
from typing import TYPE_CHECKING

from balora_jax.verbs.verb import Verb, report

if TYPE_CHECKING:
    from balora_jax.config import RunConfig


def add_options(parser: argparse.ArgumentParser) -> None:
    """The adapter and the report."""
    parser.add_argument("--adapter", help="PEFT folder; the base alone without it")
    parser.add_argument("--json", help="write the figures and every prediction to this file")


def run(config: "RunConfig", options: argparse.Namespace) -> None:
    """Score the validation rows."""
    from balora_jax.io.program_cache import kept
    from balora_jax.tasks.registry import TASKS

    with kept(config.training.compilation_cache):
        found = TASKS[config.task].evaluate(config, adapter=options.adapter)
    kept = {"predictions": list(found.predictions)} if options.json else {}
    report(found.figures | kept, options.json)


VERB = Verb("eval", "score a base model or an adapter", add_options, run)
