"""The right exit code of a process on several hosts, whatever befalls it.

When a host dies, the runtime of the others ends their processes by an abort, in the middle of a
computation. So each runs as the child of a process that asks for no device, hands on signals,
and says in one sentence what became of it. The child ends as well if that parent is killed.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

from balora_jax.errors import RunStoppedError

VARIABLE = "BALORA_JAX_PARENT"
"""Environment variable with the file descriptor whose end of file means that the parent is gone."""

EXPECTED = (0, 1, 2, 3)
"""Codes by which a child says itself what happened; 1 is a traceback."""


def is_child() -> bool:
    """Whether this process was started by :func:`run_child`."""
    return VARIABLE in os.environ


def run_child(command: Sequence[str]) -> int:
    """Run a command to its end and return its exit code; hand on SIGTERM and SIGINT.

    Raises:
        RunStoppedError: it was ended from outside.
    """
    read, write = os.pipe()
    environment = os.environ | {VARIABLE: str(read)}
    with subprocess.Popen(command, env=environment, pass_fds=(read,)) as child:
        os.close(read)

        def hand_on(number: int, _frame: object) -> None:
            child.send_signal(number)

        previous = {s: signal.signal(s, hand_on) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            code = child.wait()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            os.close(write)
    if code in EXPECTED:
        return code
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    raise RunStoppedError(
        f"this process was ended by {how}: another host is gone or does not answer, or the system "
        "ran out of memory. Start all processes again with --resume."
    )


def end_with_parent() -> None:
    """End this process as soon as its parent has ended, even if that was killed."""
    descriptor = int(os.environ[VARIABLE])

    def watch() -> None:
        os.read(descriptor, 1)  # nothing is ever written: it returns at the end of the file
        os._exit(RunStoppedError.exit_code)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def module_command(arguments: Sequence[str]) -> list[str]:
    """The command line of this package in this interpreter."""
    return [sys.executable, "-m", "balora_jax", *arguments]
