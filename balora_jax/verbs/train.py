"""``balora train``: one run, on one host or as one of several processes."""

import argparse
import os
from typing import TYPE_CHECKING

from balora_jax.parallel import launch, supervise
from balora_jax.verbs.verb import Verb

if TYPE_CHECKING:
    from balora_jax.config import RunConfig


def add_options(parser: argparse.ArgumentParser) -> None:
    """The folder, and how the processes of a run on several hosts find each other."""
    parser.add_argument("--workdir", required=True, help="folder that gets everything of the run")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    several = parser.add_argument_group(
        "several processes",
        "one on each host, on each GPU under SLURM and Open MPI; there, and on the hosts of a TPU "
        "slice, they find each other without the options",
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    several.add_argument("--processes", type=int, help="how many there are")
    several.add_argument("--process", type=int, help="number of this one, from 0")
    several.add_argument(
        "--host-timeout",
        type=int,
        default=60,
        metavar="SECONDS",
        help="how long a host may be silent before the others stop",
    )


def run(config: "RunConfig", options: argparse.Namespace) -> int | None:
    """Train; with several processes, as the child of a process that watches it."""
    from balora_jax import fit
    from balora_jax.parallel import hosts

    start = launch.start_of(
        *(options.coordinator, options.processes, options.process, options.host_timeout),
        os.environ,
    )
    if start is not None:
        if not supervise.is_child():
            return supervise.run_child(supervise.module_command(options.arguments))
        supervise.end_with_parent()
        hosts.connect(start)
    fit(config, workdir=options.workdir, resume=options.resume)
    return None


VERB = Verb("train", "fine-tune as a config says", add_options, run)
