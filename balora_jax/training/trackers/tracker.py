"""Trackers: the protocol of one, and those of a run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from balora_jax.errors import InputError
from balora_jax.io.folders import write_atomically
from balora_jax.untyped.json_text import read_object
from balora_jax.untyped.shown import shown

SEEN = "trackers.json"
"""File of a run that says which step's row the trackers got last."""


@runtime_checkable
class Tracker(Protocol):
    """Receiver of the rows of a run, one run at a time."""

    @property
    def name(self) -> str:
        """What ``training.trackers`` calls it."""
        ...

    def start(self, workdir: Path, config: Mapping[str, Any]) -> None:
        """Begin, or go on with, the run in a folder; its config is nested plain values."""
        ...

    def log(self, row: Mapping[str, Any]) -> None:
        """Take one row of ``metrics.jsonl``; each step's comes once, whatever was resumed."""
        ...

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """End with the contents of ``summary.json``, or None where the run stopped early."""
        ...


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
    """The trackers of one run, which give each row once.

    A run that goes on from a checkpoint makes the steps after it anew. Their rows are the same
    again, and the trackers have them.

    Args:
        trackers: those that the config names; none in a process that logs nothing.
        workdir: folder of the run.
        config: of the run.
    """

    def __init__(self, trackers: Sequence[Tracker], workdir: Path, config: Mapping[str, Any]):
        self.trackers, self.file = tuple(trackers), workdir / SEEN
        self.summary: Mapping[str, Any] | None = None
        self.seen = 0
        if self.trackers:
            self.seen = last_seen(workdir)
        for tracker in self.trackers:
            tracker.start(workdir, config)

    def log(self, row: Mapping[str, Any]) -> None:
        """Give a row to every tracker, unless they have that step's."""
        if not self.trackers or row["step"] <= self.seen:
            return
        for tracker in self.trackers:
            tracker.log(row)
        self.seen = int(row["step"])
        write_atomically(self.file, json.dumps({"step": self.seen}) + "\n")

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *_: object) -> None:
        for tracker in self.trackers:
            tracker.finish(self.summary)
