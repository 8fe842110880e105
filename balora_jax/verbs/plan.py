"""``balora plan``: memory and speed of a run before it starts."""

import argparse
from typing import TYPE_CHECKING

from balora_jax.verbs.verb import Verb, path_or_none, report

if TYPE_CHECKING:
    from balora_jax.config import RunConfig


def add_options(parser: argparse.ArgumentParser) -> None:
    """The devices, the search over layouts, and where the figures go."""
    devices = (
        "v5e:4x4, 2xv5e:4x4, gpu:8xH100, gpu:2x8xA100, gpu:8x48GB, cpu:8; auto: the devices here"
    )
    parser.add_argument("--topology", default="auto", help=devices)
    parser.add_argument("--mesh", help="auto to search, or sizes such as data=1,fsdp=16")
    parser.add_argument("--head", choices=("fused", "plain"), help="instead of training.head")
    parser.add_argument("--candidates", type=int, default=8, help="most compilations of a search")
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of the peak reached")
    parser.add_argument("--picture", help="draw the bytes of every plan to this PNG")
    parser.add_argument("--json", help="write the figures to this file")


def run(config: "RunConfig", options: argparse.Namespace) -> None:
    """Compile the step for the devices."""
    from balora_jax.plan.run import plan

    figures = plan(
        config,
        topology=options.topology,
        mesh=options.mesh,
        head=options.head,
        candidates=options.candidates,
        utilisation=options.utilisation,
        picture=path_or_none(options.picture),
    )
    if options.json:
        report(figures, options.json)


VERB = Verb("plan", "memory and speed of a run before it starts", add_options, run)
