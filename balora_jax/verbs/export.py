"""``balora export``: the adapter of a run as other tools read it, here or on the hub."""

import argparse
from typing import TYPE_CHECKING

from balora_jax.errors import InputError
from balora_jax.verbs.verb import Verb, report

if TYPE_CHECKING:
    from balora_jax.config import RunConfig


def add_options(parser: argparse.ArgumentParser) -> None:
    """The run, the format and the new folder."""
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--format", choices=("peft", "merged", "gguf"), default="peft")
    parser.add_argument("--out", required=True, help="new folder")
    parser.add_argument("--rank", type=int, help="recompress to this rank (peft, gguf)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the tensors (merged: that of the base; gguf: float32)",
    )
    parser.add_argument(
        "--push-to-hub", metavar="OWNER/NAME", help="send the new folder to this repository as well"
    )
    parser.add_argument("--private", action="store_true", help="make that repository a private one")
    parser.add_argument("--json", help="write the figures to this file")


def run(config: "RunConfig", options: argparse.Namespace) -> None:
    """Write the newest adapter of the run, and send it to the hub where that is asked for."""
    from balora_jax.io.hub_push import check_push, push
    from balora_jax.paths import named_folder
    from balora_jax.pretrained.export import MARKERS, export_run

    name = options.push_to_hub
    if name is not None:
        check_push(name)
    elif options.private:
        raise InputError("--private: expected --push-to-hub with it, got none. Name a repository.")
    out = named_folder(options.out, "--out")
    workdir = named_folder(options.workdir, "--workdir")
    figures = export_run(
        config, workdir, out, format=options.format, rank=options.rank, dtype=options.dtype
    )
    if name is not None:
        marker = MARKERS[options.format]
        figures["pushed"] = push(out, name, marker=marker, private=options.private)
    report(figures, options.json)


VERB = Verb("export", "write a trained adapter for other tools", add_options, run)
