"""``balora export``: the adapter of a run as other tools read it."""

import argparse
from typing import TYPE_CHECKING

from balora_jax.verbs.verb import Verb, report

if TYPE_CHECKING:
    from balora_jax.config import RunConfig


def add_options(parser: argparse.ArgumentParser) -> None:
    """The run, the format and the new folder."""
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--format", choices=("peft", "merged"), default="peft")
    parser.add_argument("--out", required=True, help="new folder")
    parser.add_argument("--rank", type=int, help="recompress to this rank (peft only)")
    parser.add_argument("--json", help="write the figures to this file")


def run(config: "RunConfig", options: argparse.Namespace) -> None:
    """Write the newest adapter of the run."""
    from balora_jax.paths import named_folder
    from balora_jax.pretrained.export import export_run

    figures = export_run(
        config,
        named_folder(options.workdir, "--workdir"),
        named_folder(options.out, "--out"),
        format=options.format,
        rank=options.rank,
    )
    report(figures, options.json)


VERB = Verb("export", "write a trained adapter for other tools", add_options, run)
