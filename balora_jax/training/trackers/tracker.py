"""Trackers: the protocol of one, and those of a run."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from balora_jax.errors import InputError
from balora_jax.io.folders import write_atomically
from balora_jax.io.metrics import read_metrics
from balora_jax.registry import Named
from balora_jax.untyped.json_text import read_object
from balora_jax.untyped.shown import shown

SEEN = "trackers.json"
"""File of a run that says which step's row the trackers got last."""

TRACKED = "trackers"
"""Folder of a run for what its trackers write there."""


@runtime_checkable
class Callback(Protocol):
    """Receiver of the rows of a run, one run at a time; all of it in the first process."""

    def start(self, workdir: Path, config: Mapping[str, Any]) -> None:
        """Begin, or go on with, the run in a folder; its config is nested plain values."""
        ...

    def log(self, row: Mapping[str, Any]) -> None:
        """Take one row of ``metrics.jsonl``; each step's comes once, whatever was resumed."""
        ...

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """End with the contents of ``summary.json``, or None where the run stopped early."""
        ...


@runtime_checkable
class Tracker(Callback, Named, Protocol):
    """Receiver with the name that ``training.trackers`` gives it."""


@runtime_checkable
class Checked(Protocol):
    """Receiver that can tell before a run whether it will work."""

    def check(self, workdir: Path) -> None:
        """Raises InputError where it will not: nothing is written yet, the folder too."""
        ...


@runtime_checkable
class Remembering(Protocol):
    """Receiver that writes rows later than it gets them, and knows which a kill left it.

    It then gets those that it lacks from the log.
    """

    def last_step(self) -> int:
        """Step of the last row that it has for certain, asked after ``start``; 0 for none."""
        ...


def check_receivers(receivers: Sequence[object], workdir: Path) -> None:
    """See that all of them will work, before anything is written.

    Raises:
        InputError: an object that is none, one that cannot work here, or a damaged record of the
            row that they got last.
    """
    for one in receivers:
        if not isinstance(one, Callback):
            raise InputError(
                "callbacks: expected objects with the methods start, log and finish, got "
                f"{shown(one)}. docs/library.md shows one."
            )
        if isinstance(one, Checked):
            one.check(workdir)
    last_seen(workdir)


def last_seen(workdir: Path) -> int:
    """The step whose row the trackers of a run got last; 0 for none.

    Raises:
        InputError: the file that says so was not written by a run.
    """
    file = workdir / SEEN
    if not file.exists():
        return 0
    found = read_object(file)
    if found.keys() != {"step"} or type(found["step"]) is not int:
        raise InputError(
            f"{file}: expected the step that the trackers got last, got {shown(found)}. Remove the "
            "file: they then get every row of this run again."
        )
    return found["step"]


class Trackers:
    """The trackers and callbacks of one run, which give each row once.

    A run that goes on from a checkpoint makes the steps after it anew. Their rows are the same
    again, and the trackers have them.

    Args:
        receivers: those that the config names, and those of the caller; none in a process that
            logs nothing.
        workdir: folder of the run.
        config: of the run.
        log: ``metrics.jsonl``, as far as the run goes on with it.
    """

    def __init__(
        self, receivers: Sequence[Callback], workdir: Path, config: Mapping[str, Any], log: Path
    ):
        self.file = workdir / SEEN
        self.summary: Mapping[str, Any] | None = None
        self.receivers: list[tuple[Callback, int]] = []
        self.ending = ExitStack()
        seen = last_seen(workdir) if receivers else 0
        with self.ending:  # one that fails to start ends those that have
            for one in receivers:
                one.start(workdir, config)
                self.ending.callback(self._finish, one)
                has = _caught_up(one, log) if isinstance(one, Remembering) else seen
                self.receivers.append((one, has))
            self.ending = self.ending.pop_all()

    def log(self, row: Mapping[str, Any]) -> None:
        """Give a row to every one that does not have that step's."""
        given = [one for one, seen in self.receivers if row["step"] > seen]
        for one in given:
            one.log(row)
        if given:
            write_atomically(self.file, json.dumps({"step": int(row["step"])}) + "\n")

    def _finish(self, one: Callback) -> None:
        one.finish(self.summary)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *error: Any) -> None:
        self.ending.__exit__(*error)


def _caught_up(one: Any, log: Path) -> int:
    """Give a receiver the rows of the log that it lacks; returns the step of the last it has."""
    has = one.last_step()
    for row in read_metrics(log):
        if row["step"] > has:
            one.log(row)
            has = row["step"]
    return has
