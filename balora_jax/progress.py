"""Progress of long work: a bar on a terminal or in a notebook, plain lines everywhere else."""

import sys
import time
from typing import Any

from tqdm import tqdm

from balora_jax.untyped.shown import one_line

Bar = tqdm
"""What shows progress; its methods are those of :class:`tqdm.tqdm`."""

EVERY = 30.0
"""Seconds between two lines, at least."""

_BEGUN = "{desc}: {n_fmt} of {total_fmt}"
_GOING = _BEGUN + ", {elapsed} elapsed, {remaining} left, {rate_fmt}{postfix}"


def progress_bar(**options: Any) -> Bar:
    """A bar on standard error, to be used as a context manager.

    Args:
        **options: those of :class:`tqdm.tqdm`.
    """
    return (tqdm if is_live(sys.stderr) else Lines)(**options)


class Lines(tqdm):
    """Progress for a log: a line at the start, one at the end, and one now and then between.

    Each has the date and time, what is done of how much, how long it took and will take, and the
    figures beside it; none has a carriage return or another control character.
    """

    monitor_interval = 0  # no thread: a line comes only when the work moves on

    def __init__(self, **options: Any):
        # `gui` is for bars that draw by themselves: tqdm then writes nothing.
        super().__init__(gui=True, miniters=1, **options)
        self._said: float | None = None
        self._line = ""
        if not self.disable and not self.delay:
            self.display()

    def display(self, *_: Any, **__: Any) -> bool:
        """Write a line if the one before is old enough; True if so."""
        due = self._said is None or self.format_dict["elapsed"] - self._said >= EVERY
        if due:
            self._say()
        return due

    def close(self) -> None:
        """Write the last line, unless the work took less than the delay or it stands there."""
        shown = not self.disable and self.format_dict["elapsed"] >= self.delay
        super().close()
        if shown:
            self._say()

    def clear(self, *_: Any, **__: Any) -> None:
        """Do nothing: what is in a log stays there."""

    def _say(self) -> None:
        now = self.format_dict
        form = self.bar_format or (_BEGUN if self.n == self.initial else _GOING)
        # Without a rate it is that of all the time, not of the last few steps.
        shown = {"bar_format": form, "rate": None, "prefix": now["prefix"].removesuffix(": ")}
        line = " ".join(self.format_meter(**{**now, **shown}).split())
        if line != self._line:
            now_and_what = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {one_line(line)}"
            # One write: a signal may come after any, and its sentence is a line of its own.
            print(f"{now_and_what}\n", end="", file=self.fp, flush=True)
        self._said, self._line = now["elapsed"], line


def is_live(stream: Any) -> bool:
    """Whether a line of a stream can be written over: on a terminal and in a notebook."""
    return stream.isatty() or type(stream).__module__.startswith("ipykernel")
