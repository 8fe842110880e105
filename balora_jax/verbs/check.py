"""``balora check``: what a run would train on, before it starts."""

import argparse
from typing import TYPE_CHECKING

from balora_jax.verbs.verb import Verb, path_or_none, report

if TYPE_CHECKING:
    from balora_jax.config import RunConfig


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is left out, and where the figures go."""
    parser.add_argument("--no-memory", action="store_true", help="do not compile the step")
    parser.add_argument("--picture", help="draw the lengths to this PNG")
    parser.add_argument("--json", help="write the figures to this file")


def run(config: "RunConfig", options: argparse.Namespace) -> None:
    """Read and tokenise the rows, without loading weights."""
    from balora_jax.preview import preview

    picture = path_or_none(options.picture)
    figures = preview(config, memory=not options.no_memory, picture=picture)
    if options.json:
        report(figures, options.json)


VERB = Verb("check", "rows, lengths, examples, steps and memory of a run", add_options, run)
