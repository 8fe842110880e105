"""Membership in a job of several processes, and how a process finds the others."""

import dataclasses
import re
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from balora_jax.errors import InputError

CLUSTERS = {
    "SLURM_NTASKS": "SLURM",
    "OMPI_COMM_WORLD_SIZE": "Open MPI",
    "MEGASCALE_NUM_SLICES": "Cloud TPU",
}
"""Environment variables that count the processes of a job, and who sets them."""

_LEAST_SECONDS = 5


@dataclass(frozen=True)
class Timeouts:
    """Seconds that the processes of a run wait for each other.

    Attributes:
        start: for all of them to appear.
        host: for a sign of a silent one, which then counts as dead.
        stall: for progress of any of them.
    """

    start: int = 300
    host: int = 60
    stall: int = 1800


@dataclass(frozen=True)
class Start:
    """Address of the other processes; all None where the environment tells.

    Attributes:
        coordinator: ``HOST:PORT`` of process 0.
        processes: how many there are.
        process: number of this one, from 0.
        timeouts: how long it waits for them.
    """

    coordinator: str | None
    processes: int | None
    process: int | None
    timeouts: Timeouts


def start_of(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    timeouts: Timeouts,
    environment: Mapping[str, str],
) -> Start | None:
    """How to start with these options in this environment; None for a run of one process.

    Raises:
        InputError: options that do not belong together, or a variable that is no number.

    Example:
        >>> found = start_of(
        ...     None, None, None, Timeouts(), {"SLURM_NTASKS": "4", "SLURM_PROCID": "1"}
        ... )
        >>> found == Start(None, None, None, Timeouts())
        True
        >>> start_of(None, None, None, Timeouts(), {}) is None
        True
    """
    for name, seconds in dataclasses.asdict(timeouts).items():
        if seconds < _LEAST_SECONDS:
            raise InputError(
                f"--{name}-timeout: expected at least {_LEAST_SECONDS} seconds, got {seconds}. "
                "Raise it: a slow network would look like a dead host."
            )
    given = (coordinator, processes, process)
    if all(value is None for value in given):
        return Start(None, None, None, timeouts) if _in_cluster(environment) else None
    if coordinator is None or processes is None or process is None:
        raise InputError(
            "--coordinator, --processes, --process: expected all three or none, got "
            f"{coordinator}, {processes} and {process}. Give the address of process 0, their "
            "number, and the number of this one."
        )
    host, colon, port = coordinator.rpartition(":")
    number = int(port) if re.fullmatch("[0-9]{1,5}", port) else 0
    if not (colon and host and 0 < number < 2**16):
        raise InputError(
            f"--coordinator: expected HOST:PORT, got {coordinator!r}. Write it so, as "
            "10.0.0.1:8476."
        )
    if not 0 <= process < processes:
        raise InputError(
            f"--process: expected a number from 0 to {processes - 1}, got {process}. Number the "
            "processes from 0."
        )
    return Start(coordinator, processes, process, timeouts)


def _in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether a launcher started several processes, or this is a host of a TPU slice of several."""
    for name, launcher in CLUSTERS.items():
        text = environment.get(name) or "1"
        if not (text.isascii() and text.isdigit()):
            raise InputError(
                f"{name}: expected the number of processes that {launcher} started, got {text!r}. "
                "Unset it, or start through the launcher."
            )
        if int(text) > 1:
            return True
    if "TPU_SKIP_MDS_QUERY" in environment:
        return False
    workers = environment.get("TPU_WORKER_HOSTNAMES")
    if workers is None and _has_tpu():
        workers = _endpoints(environment.get("GCE_METADATA_IP", "metadata.google.internal"))
    return "," in (workers or "")


def _has_tpu() -> bool:
    """Whether this machine has a TPU, by its device files; nothing is opened."""
    return any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))


def _endpoints(server: str) -> str:
    """The hosts of this TPU slice, as a TPU VM's metadata server lists them; empty without one."""
    address = f"http://{server}/computeMetadata/v1/instance/attributes/worker-network-endpoints"
    request = urllib.request.Request(address, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=3) as answer:
            return answer.read().decode()
    except OSError:  # not one of Google's machines: Colab's TPU has no such server
        return ""
