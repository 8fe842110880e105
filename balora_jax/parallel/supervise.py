"""The right exit code of a process on several hosts, whatever befalls it.

When a host dies, the runtime of the others ends their processes by an abort, in the middle of a
computation; a process that hangs says nothing at all. So each runs as the child of a process that
asks for no device, takes the signals, looks whether the child goes on, and says in one sentence
what became of it. The child ends as well if that parent is killed.
"""

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO

from balora_jax import signals
from balora_jax.errors import RunStoppedError
from balora_jax.parallel import child
from balora_jax.parallel.patience import Patience

EXPECTED = (0, 1, 2, 3)
"""Codes by which a child says itself what happened; 1 is a traceback."""

GRACE = 6.0
"""Seconds in which a child that is to end may tell the other processes."""

_TICK, _PING_EVERY, _MOST_LOG = 0.25, 5.0, 2**20
_FATAL = re.compile(r"^F\d{4} .*?\] (.*?)(?=^\*\*\* |^[IWEF]\d{4} |\Z)", re.MULTILINE | re.DOTALL)


def run_child(command: Sequence[str], *, stall: float, saved: Callable[[], str]) -> int:
    """Run a command to its end and return its exit code.

    SIGTERM and SIGINT reach the child as SIGTERM while it takes steps: it then saves and ends.
    At any other time, and at a second signal, it is ended at once.

    Args:
        command: runs :func:`balora_jax.parallel.child.join` soon.
        stall: seconds without progress after which the child is ended.
        saved: says what is saved, and how to go on.

    Raises:
        RunStoppedError: it was ended, by this process or from outside.
    """
    ours, theirs = socket.socketpair()
    with ours, _native_log() as log, _caught() as names:
        with theirs:
            environment = os.environ | {child.VARIABLE: str(theirs.fileno())}
            passed = [theirs.fileno()]
            if log is not None:
                environment[child.LOG_VARIABLE] = str(log.fileno())
                passed.append(log.fileno())
            # In a group of its own: what a terminal or launcher signals is this process's to judge.
            process = subprocess.Popen(command, env=environment, pass_fds=passed, process_group=0)
        with process:
            try:
                code, reason = _Watch(process, ours, log, stall, names).to_the_end()
            finally:
                process.kill()  # of one that has ended it does nothing
        if reason is None and code in EXPECTED:
            return code
        reason = reason or _ended_from_outside(code, log)
    raise RunStoppedError(f"{reason}. Start all processes again: {saved()}")


class _Watch:
    """The child's life, seen from its parent."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        line: socket.socket,
        log: IO[bytes] | None,
        stall: float,
        names: list[str],
    ):
        self.process, self.line, self.log, self.names = process, line, log, names
        self.patience = Patience(stall, time.monotonic())
        self.handed_on = 0
        self.asked: float | None = None
        self.reason: str | None = None
        self.rest = b""
        self.pinged = time.monotonic()

    def to_the_end(self) -> tuple[int, str | None]:
        """The child's exit code, and why it was ended if it was."""
        while self.process.poll() is None:
            self.hear(_TICK)
            self.take_signals()
            now = time.monotonic()
            if text := self.patience.line(now, time.time()):
                print(f"balora: {text}", file=sys.stderr, flush=True)
            if why := self.patience.over(now):
                self.end(why)
            if now - self.pinged >= _PING_EVERY:
                self.pinged = now
                self.send(child.PING)
                if self.log is not None and os.fstat(self.log.fileno()).st_size > _MOST_LOG:
                    os.ftruncate(self.log.fileno(), 0)
        self.hear(0.0)
        return self.process.returncode, self.reason

    def hear(self, seconds: float) -> None:
        """Take in what the child tells, for so long at most."""
        if not select.select([self.line], [], [], seconds)[0]:
            return
        with contextlib.suppress(ConnectionError):
            self.rest += self.line.recv(2**16)
        *lines, self.rest = self.rest.split(b"\n")
        for text in lines:
            fact = json.loads(text)
            self.reason = self.reason or fact.get("end")
            self.patience.hear(fact, time.monotonic())

    def take_signals(self) -> None:
        """Hand a signal on to a child that can save; end any other, and one that does not end."""
        now, patience = time.monotonic(), self.patience
        if len(self.names) > self.handed_on:
            name = self.names[-1]
            self.handed_on = len(self.names)
            if patience.steady and self.handed_on == 1:
                self.process.send_signal(signal.SIGTERM)
                return
            self.end(f"{patience.name} was ended by {name}")
        elif self.handed_on and not patience.steady:
            # Its last step was over before it could see the signal.
            self.asked = self.asked or now
            if now - self.asked >= GRACE:
                self.end(f"{patience.name} was ended by {self.names[0]}")

    def end(self, reason: str) -> None:
        """Let the child tell the others and end; end it where it does not."""
        self.reason = self.reason or reason
        self.send(child.END + reason.encode())
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE)
        self.process.kill()

    def send(self, text: bytes) -> None:
        with contextlib.suppress(ConnectionError, BlockingIOError):
            self.line.send(text, socket.MSG_DONTWAIT)


@contextlib.contextmanager
def _caught() -> Iterator[list[str]]:
    """Names of the SIGTERM and SIGINT that this process gets."""
    names: list[str] = []

    def take(number: int, _frame: object) -> None:
        names.append(signal.Signals(number).name)

    caught = signals.current() or signals.Signals()
    caught.several = True
    previous = {number: signal.signal(number, take) for number in signals.WANTED}
    try:
        yield names
    finally:
        caught.several = False
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _native_log() -> Iterator[IO[bytes] | None]:
    """A file for what the runtime's own log would print; None where the user asks for all of it."""
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "0":
        yield None
        return
    with tempfile.TemporaryFile("a+b", buffering=0) as file:
        yield file


def _ended_from_outside(code: int, log: IO[bytes] | None) -> str:
    """What is known of an end that the child did not choose."""
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return (
        f"this process was ended by {how}{_last_words(log)}: another host is gone or does not "
        "answer, or the system ran out of memory"
    )


def _last_words(log: IO[bytes] | None) -> str:
    """Why the runtime gave up, in brackets, as far as its log says."""
    if log is None:
        return ""
    log.seek(0)
    found = _FATAL.search(log.read().decode(errors="replace"))
    if found is None:
        return ""
    text = " ".join(found[1].rpartition("absl::Status: ")[2].split())
    return f" ({text.partition('. ')[0][:200]})"


def module_command(arguments: Sequence[str]) -> list[str]:
    """The command line of this package in this interpreter."""
    return [sys.executable, "-m", "balora_jax", *arguments]
