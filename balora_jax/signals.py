"""SIGTERM and SIGINT: a run that takes steps finishes the step, everything else ends at once.

A handler of Python runs only between two instructions of Python. A compilation, or a forward pass
of a large model, is one instruction that may take minutes; so the command line has a thread as
well, which the system wakes at once and which ends the process where nothing else does.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, NoReturn

from balora_jax.errors import RunStoppedError
from balora_jax.parallel import child
from balora_jax.untyped.native import is_stderr, silenced_stderr
from balora_jax.untyped.shown import one_line

WANTED = (signal.SIGTERM, signal.SIGINT)
PATIENCE = 5.0
"""Seconds after which a command that was told to stop, and did not, is ended."""

_SOON = 0.05


class Interrupted(KeyboardInterrupt):
    """A signal came where nothing waits to be finished: raised wherever the program is."""


class Signals:
    """The signals that came, and what becomes of them.

    Attributes:
        received: their names, in the order in which they came; one that had to be delivered
            again stands twice.
        outcome: says what is saved, and how to go on.
        several: other processes belong to this one. In a parent :mod:`parallel.supervise` takes
            the signals; in its child the runtime takes SIGTERM, and lets all processes agree on
            the step to stop after.
    """

    def __init__(self) -> None:
        self.received: list[str] = []
        self.outcome: Callable[[], str] = lambda: "nothing was written."
        self.several = False
        self._polite = self._raised = False
        self._stderr: int | None = None
        self._again: threading.Timer | None = None
        self._ended = threading.Event()

    @contextmanager
    def polite(self) -> Iterator[None]:
        """While steps are taken: a first signal is recorded, for the loop to end after a step."""
        self._polite = True
        child.tell(steady=True)
        try:
            yield
        finally:
            self._polite = False
            child.tell(steady=False)
        if self.received and not self.several:
            raise Interrupted  # it came after the last look

    def sentence(self) -> str:
        """What is said of a command that a signal ended."""
        return f"interrupted by {(self.received or ['SIGINT'])[0]}; {self.outcome()}"

    def record(self, number: int, _frame: object) -> None:
        """The handler of Python, in the main thread."""
        if self.several:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        if self._ended.is_set() or self._raised:
            return  # the command ends already; what cleans up is not disturbed
        self.received.append(signal.Signals(number).name)
        if not self._polite or len(self.received) > 1:
            self._raised = True
            self._hush()
            raise Interrupted

    @contextmanager
    def interruption(self) -> Iterator[None]:
        """What was raised by a signal, whatever native code has made of it on the way.

        Raises:
            Interrupted: a signal was raised, and another error came out of the block.
        """
        try:
            yield
        except (KeyboardInterrupt, RunStoppedError):
            raise
        except BaseException as error:
            if self._raised:
                raise Interrupted from error
            raise

    def _hush(self) -> None:
        """Let nobody else speak: what libraries say of an interruption is not the user's affair."""
        if self._stderr is None and is_stderr(sys.stderr):
            self._stderr = silenced_stderr()

    def say(self, sentence: str) -> None:
        """Print the last line of a command to standard error."""
        line = f"balora: {one_line(sentence)}\n"
        with suppress(OSError, ValueError):  # a full disk, a closed file: the exit code still tells
            if self._stderr is None:
                print(line, end="", file=sys.stderr, flush=True)
            else:
                os.write(self._stderr, self._below_bar(line))

    def _below_bar(self, line: str) -> bytes:
        """A line for a terminal where a bar may still stand: on a line of its own."""
        held = 2 if self._stderr is None else self._stderr
        return (f"\n{line}" if os.isatty(held) else line).encode()

    def swallowed(self, before: Callable[[Any], Any], found: Any) -> None:
        """Deliver a signal again that came in a callback, out of which Python raises nothing."""
        if not isinstance(found.exc_value, Interrupted):
            before(found)
            return
        number = signal.Signals[self.received[-1]]
        if self._again is not None:
            self._again.cancel()
        # To the main thread by name: its sleep, or its read, must end.
        main = threading.main_thread().ident
        assert main is not None  # it runs
        self._again = threading.Timer(_SOON, signal.pthread_kill, (main, number))
        self._again.daemon = True
        self._again.start()
        self._raised = False  # the last instruction: this is a callback as well

    def settle(self) -> None:
        """Deliver nothing again from here on: a caller's handlers come back."""
        if self._again is not None:
            self._again.cancel()
            self._again.join()

    def unhush(self) -> None:
        """Give standard error back."""
        if self._stderr is not None:
            os.dup2(self._stderr, 2)
            os.close(self._stderr)
            self._stderr = None

    def watch(self, reader: int) -> None:
        """Wait for the bytes of signals, and end the process that does not end by itself."""
        seen = 0
        while number := os.read(reader, 1):
            if number[0] not in WANTED or self.several:
                continue
            seen += 1
            if self._polite and seen == 1:
                continue
            if not self._ended.wait(PATIENCE):
                if not self.received:  # the main thread has not come to its handler
                    self.received.append(signal.Signals(number[0]).name)
                line = f"balora: {one_line(self.sentence())}\n"
                os.write(2 if self._stderr is None else self._stderr, self._below_bar(line))
                os._exit(RunStoppedError.exit_code)

    def end(self) -> None:
        """Note that the command ends by itself, and says why."""
        self._ended.set()


_CURRENT: list[Signals] = []


def current() -> Signals | None:
    """What takes the signals now; None where the embedding program does."""
    return _CURRENT[-1] if _CURRENT else None


@contextmanager
def taken(*, for_good: bool = False) -> Iterator[Signals]:
    """Take SIGTERM and SIGINT, unless a caller has taken them: then as that one does.

    Outside of the main thread the embedding program handles signals: none is seen here.

    Args:
        for_good: this is all that the process does: after it signals are ignored, so that one in
            the last milliseconds changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield Signals()
        return
    if _CURRENT:
        yield _CURRENT[-1]
        return
    signals = Signals()
    with ExitStack() as undo:
        for number in WANTED:
            before = signal.signal(number, signals.record) or signal.SIG_DFL
            undo.callback(signal.signal, number, signal.SIG_IGN if for_good else before)
        if not for_good:
            undo.callback(signals.unhush)
        undo.callback(setattr, sys, "unraisablehook", sys.unraisablehook)
        sys.unraisablehook = partial(signals.swallowed, sys.unraisablehook)
        _CURRENT.append(signals)
        undo.callback(_CURRENT.remove, signals)
        undo.callback(signals.settle)
        yield signals


def leave(code: int) -> NoReturn:
    """End this process, which is all that there is left to do.

    Python waits for the threads of libraries, some of which wait for what does not come any more
    where a run did not end by itself.
    """
    if code:
        with suppress(AttributeError, OSError, ValueError):  # none, a full disk, a closed file
            sys.stdout.flush()
        timer = threading.Timer(PATIENCE, os._exit, (code,))
        timer.daemon = True
        timer.start()
    sys.exit(code)


@contextmanager
def watched(signals: Signals) -> Iterator[None]:
    """End this process where a signal does not, while the block runs; for the command line."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=signals.watch, args=(reader,), name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signals.end()
        signal.set_wakeup_fd(before)
        os.close(writer)  # the thread's next read is the end of the file
        thread.join()
        os.close(reader)
