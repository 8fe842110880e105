"""What several processes of one run share: a start, one voice, one opinion.

Everything here is also right, and does nothing, in a run of one process.
"""

import contextlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed  # the keys that processes share have no public name
from jax.experimental import multihost_utils

from balora_jax.errors import InputError, RunStoppedError
from balora_jax.parallel import child
from balora_jax.parallel.launch import Start
from balora_jax.untyped.shown import for_a_log

Result = TypeVar("Result")

ENDED = "balora_jax/ended/"
"""Where processes that end before the run does leave the reason for the others."""

_PIECE = 2**20
"""Numbers of each process that all of them exchange at a time: they pass through the devices."""


_ADVICE = (
    ": check that every host runs the same command and can reach that address, or raise "
    "--start-timeout"
)
_POLL, _LINGER = 1.0, 3.0  # seconds between two looks for a reason, and of leaving one there

_barriers = itertools.count()  # each has a name of its own, the same in all processes

_member = threading.Event()
"""Set once this process has joined the others."""


def connect(start: Start) -> None:
    """Join the other processes; to be called before anything asks for a device.

    From then on this process ends when another one has said why all must.

    Raises:
        InputError: the environment does not tell who the others are, or forbids to stop together.
        RunStoppedError: they do not appear, or go before all have begun.
    """
    _check_settings()
    seconds = start.timeouts.start
    whom = "the other processes" + (f" at {start.coordinator}" if start.coordinator else "")
    if start.processes is not None:
        child.tell(name=f"process {start.process} of {start.processes}")
    try:
        with _waiting(whom, limit=seconds, advice=_ADVICE):
            jax.distributed.initialize(
                start.coordinator,
                start.processes,
                start.process,
                initialization_timeout=seconds + 60,  # the parent says it before
                heartbeat_timeout_seconds=start.timeouts.host,
            )
        with _waiting("the devices of the other processes", limit=seconds, advice=_ADVICE):
            jax.devices()  # all processes tell each other here what they have
    except (ValueError, LookupError, TypeError, RuntimeError) as error:
        kind = RunStoppedError if isinstance(error, RuntimeError) else InputError
        line = " ".join(str(error).split())[:300]
        raise kind(
            f"start of {start.processes or 'several'} processes: expected all of them to find "
            f"{start.coordinator or 'each other'}, got: {line} Check that every host runs the same "
            "command and can reach that address, or give --coordinator, --processes and --process."
        ) from error
    child.tell(name=f"process {jax.process_index()} of {jax.process_count()}")
    _member.set()
    threading.Thread(target=_listen, name="others", daemon=True).start()


def _check_settings() -> None:
    """Raises InputError for settings of JAX under which the processes would not end together."""
    for name, wanted, reason in (
        ("jax_enable_preemption_service", True, "at a signal all of them stop after one step"),
        ("jax_enable_recoverability", False, "where one has died the others must not go on"),
    ):
        found = jax.config.values.get(name, wanted)
        if found is not wanted:
            raise InputError(
                f"{name.upper()}: expected {str(wanted).lower()} with several processes, as "
                f"{reason}, got {str(found).lower()}. Unset it."
            )


@contextmanager
def _waiting(what: str, **more: Any) -> Iterator[None]:
    """Let the parent say what this process waits for, and end it after too long."""
    child.tell(wait=what, **more)
    try:
        yield
    finally:
        child.tell(wait=None)


def announce(reason: str) -> None:
    """Tell the other processes that this one ends and why, so that they end as well."""
    if not _member.is_set():
        return
    client: Any = distributed.global_state.client
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the first process has gone before
        client.key_value_set(f"{ENDED}{jax.process_index()}", reason)
        time.sleep(_LINGER)


def _listen() -> None:
    """End this process once another one has left a reason."""
    client: Any = distributed.global_state.client
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the run is over, or soon is
        while not (reasons := client.key_value_dir_get(ENDED)):
            time.sleep(_POLL)
        child.end(reasons[0][1])


def is_first() -> bool:
    """Whether this process speaks and writes for all."""
    return jax.process_index() == 0


def say(*lines: object) -> None:
    """Print lines, once for all processes; no control character of the data gets into a log."""
    if lines and is_first():
        print(*(for_a_log(str(line)) for line in lines), sep="\n", flush=True)


def warn(*lines: object) -> None:
    """As :func:`say`, on standard error: what a command prints as its result stays alone."""
    if lines and is_first():
        text = "\n".join(for_a_log(str(line)) for line in lines)
        print(text, file=sys.stderr, flush=True)


def barrier(name: str) -> None:
    """Wait for all processes; ``name`` must be the same everywhere."""
    if jax.process_count() > 1:
        with _waiting(f"the other processes ({name})"):
            multihost_utils.sync_global_devices(name)


def from_first(value: Any) -> Any:
    """The first process's value (anything JSON can hold) in all of them."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8) if is_first() else np.zeros(0)
    with _waiting("the other processes"):
        size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(text), np.int32)))
        padded = text.astype(np.uint8) if is_first() else np.zeros(size, np.uint8)
        return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())


def by_first(action: Callable[[], Result], *, seconds: int = 0) -> Result:
    """What the first process's ``action`` returns (anything JSON can hold), in all processes.

    Args:
        action: is called in the first process.
        seconds: that it may take, where that is longer than devices wait for each other.

    Raises:
        InputError: in all of them, where the action raised one.
    """
    if jax.process_count() == 1:
        return action()
    outcome = None
    if is_first():
        try:
            outcome = [True, action()]
        except InputError as error:
            outcome = [False, str(error)]
    if seconds:
        client: Any = distributed.global_state.client
        with _waiting("the first process"):
            client.wait_at_barrier(f"balora_jax/by_first/{next(_barriers)}", 1000 * seconds)
    good, value = from_first(outcome)
    if not good:
        raise InputError(value)
    return value


def together(action: Callable[[], Result]) -> Result:
    """``action()`` of every process, or an error in all of them where one has failed.

    Raises:
        InputError: where this process's own action raised it.
        RunStoppedError: where only another's did.
    """
    if jax.process_count() == 1:
        return action()
    failure, result = None, None
    try:
        result = action()
    except InputError as error:
        failure = error
    with _waiting("the other processes"):
        failures = multihost_utils.process_allgather(np.asarray(failure is not None))
    failed = np.flatnonzero(failures)
    if failure is not None:
        raise failure
    if failed.size:
        raise RunStoppedError(
            f"process {failed[0]} of {jax.process_count()} could not start; its own output says "
            "why. Correct that and start all processes again."
        )
    return result  # type: ignore[return-value]


def share_out(count: int, work: Callable[[int, int], np.ndarray]) -> np.ndarray:
    """``work(0, count)``, int32 [N], made in parts: each process does ``work(start, stop)`` of one.

    The parts, which may be empty, are joined in order; every process then has the whole.

    Raises:
        InputError, RunStoppedError: as :func:`together`.
    """
    processes, me = jax.process_count(), jax.process_index()
    if processes == 1:
        return work(0, count)
    ends = [count * i // processes for i in range(processes + 1)]
    mine = together(lambda: work(ends[me], ends[me + 1]))
    sizes = np.ravel(multihost_utils.process_allgather(np.asarray(mine.size, np.int32)))
    whole = [np.empty(size, np.int32) for size in sizes]
    piece = min(int(sizes.max()), _PIECE)
    for start in range(0, int(sizes.max()), piece or 1):
        part = np.zeros(piece, np.int32)
        own = mine[start : start + piece]
        part[: own.size] = own
        for target, found in zip(whole, multihost_utils.process_allgather(part), strict=True):
            size = max(0, min(piece, target.size - start))
            target[start : start + size] = found[:size]
    return np.concatenate(whole)


def place(value: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array that every process holds whole, or that lies on devices, laid out anew.

    A process sends only the parts of its own devices.
    """
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return jax.jit(lambda x: x, out_shardings=sharding)(value)
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def gathered(value: Any) -> np.ndarray:
    """The whole of an array on this host, wherever its parts lie; all processes must ask."""
    if not isinstance(value, jax.Array) or value.is_fully_addressable:
        return np.asarray(value)
    with _waiting("the other hosts' part of a computation"):  # one may have stopped in it
        if value.is_fully_replicated:
            return np.asarray(value.addressable_data(0))
        return np.asarray(multihost_utils.process_allgather(value, tiled=True))


def gathered_all(values: Mapping[str, Any]) -> dict[str, Any]:
    """:func:`gathered` for each array of a dict, in the order of its keys."""
    return {name: gathered(values[name]) for name in sorted(values)}


def preempted(step: int) -> bool:
    """Whether all processes are to save and stop after this step; asked at every step.

    Any process's SIGTERM makes it true, in all of them at the same step. To be asked is progress,
    which the parent watches.
    """
    child.tell(step=step)
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


def moved() -> None:
    """Tell the parent that what is done between two steps, such as a score, goes on."""
    child.tell(moved=True)


def leave(code: int) -> None:
    """End this process with a code at once where others may not answer any more.

    An ordinary exit would wait for all of them first. The first process gives the others a moment
    to end by themselves: they take its end for a failure.
    """
    if jax.process_count() > 1:
        if is_first():
            time.sleep(1.0)
        os._exit(code)
