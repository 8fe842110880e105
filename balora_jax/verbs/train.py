"""``balora train``: one run, on one host or as one of several processes."""

import argparse
import os
from typing import TYPE_CHECKING

from balora_jax.parallel import child, launch, supervise
from balora_jax.verbs.verb import Verb

if TYPE_CHECKING:
    from balora_jax.config import RunConfig


def add_options(parser: argparse.ArgumentParser) -> None:
    """The folder, and how the processes of a run on several hosts find each other."""
    parser.add_argument(
        "--workdir",
        required=True,
        help="folder that gets everything of the run; also gs://BUCKET/FOLDER",
    )
    parser.set_defaults(takes_store=True)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    several = parser.add_argument_group(
        "several processes",
        "one on each host, on each GPU under SLURM and Open MPI; there, and on the hosts of a TPU "
        "slice, they find each other without the options",
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    several.add_argument("--processes", type=int, help="how many there are")
    several.add_argument("--process", type=int, help="number of this one, from 0")
    for name, seconds, text in (
        ("start", launch.Timeouts.start, "how long a host waits for all others at the start"),
        ("host", launch.Timeouts.host, "how long a host may be silent before the others stop"),
        ("stall", launch.Timeouts.stall, "how long a host may make no progress before all stop"),
    ):
        several.add_argument(
            f"--{name}-timeout", type=int, default=seconds, metavar="SECONDS", help=text
        )


def run(config: "RunConfig", options: argparse.Namespace) -> int | None:
    """Train; with several processes, as the child of a process that watches it."""
    timeouts = launch.Timeouts(options.start_timeout, options.host_timeout, options.stall_timeout)
    given = (options.coordinator, options.processes, options.process)
    start = launch.start_of(*given, timeouts, os.environ)
    if start is not None and not child.is_child():
        from balora_jax.training.endings import saved_at

        return supervise.run_child(
            supervise.module_command(options.arguments),
            stall=timeouts.stall,
            saved=lambda: saved_at(options.workdir),
        )
    from balora_jax import fit
    from balora_jax.parallel import hosts

    if start is not None:
        child.join(hosts.announce)
        hosts.connect(start)
    fit(config, workdir=options.workdir, resume=options.resume)
    return None


VERB = Verb("train", "fine-tune as a config says", add_options, run)
