"""``balora bench``: time and memory of a training step."""

import argparse
from typing import TYPE_CHECKING

from balora_jax.verbs.verb import Verb, path_or_none, report

if TYPE_CHECKING:
    from balora_jax.config import RunConfig


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is measured, and where the figures go."""
    parser.add_argument("--rounds", type=int, default=5, help="counted steps of each case")
    parser.add_argument("--case", action="append", default=[], help="only this one; repeatable")
    parser.add_argument("--against", choices=("torch",), help="run the torch reference beside ours")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[], metavar="TOKENS", help="full rows of these"
    )
    parser.add_argument(
        "--tokenizer", help="folder of one for the rows of data.train, of a model without one"
    )
    devices = "compile for devices that are not here instead, such as v5e:4x4 or gpu:8xH100"
    parser.add_argument("--topology", help=devices)
    parser.add_argument("--picture", help="draw time and memory to this PNG")
    parser.add_argument("--json", help="write the figures to this file")


def run(config: "RunConfig", options: argparse.Namespace) -> None:
    """Measure the cases of the config."""
    from balora_jax.bench.run import bench

    figures = bench(
        config,
        rounds=options.rounds,
        cases=options.case,
        against_torch=options.against == "torch",
        lengths=options.lengths,
        tokenizer=options.tokenizer,
        topology=options.topology,
        picture=path_or_none(options.picture),
    )
    if options.json:
        report(figures, options.json)


VERB = Verb("bench", "time and memory of a training step", add_options, run)
