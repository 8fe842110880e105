"""Algebra in a process of its own, which the system ends where it takes too long."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

from balora_jax.evals.equality import fractions_for_decimals

_PROGRAM = Path(__file__).with_name("judge_program.py")
_READY = "ready"
MOST_UNDECIDED = 60
"""Pairs without a verdict after which a judge gives none any more: five minutes are lost."""


def has_math_verify() -> bool:
    """Whether math-verify is installed (the extra ``eval``)."""
    return importlib.util.find_spec("math_verify") is not None


class Judge:
    """Says whether two expressions are the same, by math-verify.

    Expressions go to a child, one pair at a time. The system ends a child after ``seconds`` of one
    pair, whatever it is computing; such a pair has no verdict, which counts as not the same, and
    the next pair gets a new child. Nothing in this process is interrupted, so a judge may be asked
    in any thread, and takes no signal.

    Attributes:
        undecided: pairs without a verdict so far.
        failed: whether no child started; no pair is decided then.
    """

    def __init__(self, seconds: int = 5):
        self.seconds, self.undecided, self.failed = seconds, 0, False
        self._known: dict[tuple[str, str], bool] = {}
        self._child: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Judge":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def start(self) -> bool:
        """Start the child now; whether it runs."""
        return self._child is not None or self._start() is not None

    def __call__(self, prediction: str, gold: str) -> bool:
        """Whether two expressions, as LaTeX, are the same; never raises."""
        pair = fractions_for_decimals(prediction), fractions_for_decimals(gold)
        if pair not in self._known:
            verdict = self._ask(pair)
            self.undecided += verdict is None and not self.failed
            self._known[pair] = bool(verdict)
        return self._known[pair]

    def _ask(self, pair: tuple[str, str]) -> bool | None:
        if self.failed or self.undecided >= MOST_UNDECIDED:
            return None
        child = self._child or self._start()
        if child is None:
            return None
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(json.dumps(pair) + "\n")
            child.stdin.flush()
            line = child.stdout.readline()
        except OSError:
            line = ""
        if line in ("true\n", "false\n"):
            return line == "true\n"
        self._end()
        return None

    def _start(self) -> "subprocess.Popen[str] | None":
        """A child that has loaded math-verify; None where it does not start."""
        child = subprocess.Popen(
            # -P: the folder of the program holds modules with the names of others.
            [sys.executable, "-P", str(_PROGRAM), str(self.seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # Ctrl-C is for this process
        )
        self._child = child
        assert child.stdout is not None
        if child.stdout.readline().strip() == _READY:
            return child
        self._end()
        self.failed = True
        return None

    def _end(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        for stream in (child.stdin, child.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        child.wait()
