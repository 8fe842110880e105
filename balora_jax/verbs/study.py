"""``balora study``: variants compared over data sets and seeds."""

import argparse
from typing import TYPE_CHECKING

from balora_jax.verbs.verb import Verb, path_or_none, report

if TYPE_CHECKING:
    from balora_jax.config import RunConfig


def add_options(parser: argparse.ArgumentParser) -> None:
    """The folder, the runs to do, and where the figures go."""
    parser.add_argument("--workdir", required=True, help="folder that gets every run and the table")
    parser.add_argument(
        "--only", action="append", default=[], metavar="DATASET/VARIANT", help="repeatable"
    )
    parser.add_argument("--picture", help="draw the bars to this PNG, not to study.png")
    parser.add_argument("--json", help="write the figures to this file")


def run(config: "RunConfig", options: argparse.Namespace) -> None:
    """Do the runs that are not done yet."""
    from balora_jax.study.run import conduct, raise_failures

    figures = conduct(
        config,
        workdir=options.workdir,
        only=options.only,
        picture=path_or_none(options.picture),
    )
    if options.json:
        report(figures, options.json)
    raise_failures(figures)


VERB = Verb("study", "compare variants over data sets and seeds", add_options, run)
