"""A process that another one watches: what it tells that one, and how it ends with it."""

import contextlib
import io
import json
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

from balora_jax.errors import RunStoppedError

VARIABLE = "BALORA_JAX_PARENT"
"""Environment variable with the file descriptor of the socket to the parent."""

LOG_VARIABLE = "BALORA_JAX_NATIVE_LOG"
"""Environment variable with the file descriptor of the file for what the runtime prints."""

PING = b"?"
"""The parent's question whether this process lives."""

END = b"!"
"""The parent's order to end; all that follows is the reason."""

_parent: list[socket.socket] = []


def is_child() -> bool:
    """Whether this process was started by :func:`balora_jax.parallel.supervise.run_child`."""
    return VARIABLE in os.environ


def divert_native_log() -> None:
    """Keep stderr for Python: what libraries print past it goes to the parent's file.

    To be called before other modules are imported: some keep the ``sys.stderr`` that they find.
    """
    if LOG_VARIABLE not in os.environ:
        return
    sys.stderr.flush()
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    os.dup2(int(os.environ[LOG_VARIABLE]), 2)


def join(announce: Callable[[str], None]) -> None:
    """Answer the parent from now on, and end as soon as it says so or has ended itself.

    Args:
        announce: tells the other processes of the run why this one ends, before it does.
    """
    parent = socket.socket(fileno=int(os.environ[VARIABLE]))
    _parent[:] = [parent]
    tell(alive=True)

    def listen() -> None:
        while heard := _received(parent):
            if END in heard:
                _be_silent()
                announce(heard.partition(END)[2].decode())
                break
            tell(alive=True)
        os._exit(RunStoppedError.exit_code)

    def fail(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        traceback.print_exception(kind, error, trace)
        announce(f"a process failed with {kind.__name__}; its own output says more")
        os._exit(1)

    threading.Thread(target=listen, name="parent", daemon=True).start()
    sys.excepthook = fail  # an ordinary exit would first wait minutes for the other processes


def _be_silent() -> None:
    """Leave the last word to the parent, whatever other threads have to say."""
    sys.stderr = io.StringIO()


def _received(parent: socket.socket) -> bytes:
    """The next bytes from the parent; none when it has ended."""
    try:
        return parent.recv(4096)
    except ConnectionError:
        return b""


def tell(**fact: Any) -> None:
    """Tell the parent a fact; :class:`balora_jax.parallel.patience.Patience` lists them."""
    for parent in _parent:
        # One that was stopped or has ended reads nothing: it is not waited for.
        with contextlib.suppress(BlockingIOError, ConnectionError):
            parent.send(json.dumps(fact).encode() + b"\n", socket.MSG_DONTWAIT)


def end(reason: str) -> None:
    """End this process; the parent says why."""
    _be_silent()
    tell(end=reason)
    os._exit(RunStoppedError.exit_code)
