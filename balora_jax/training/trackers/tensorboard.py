"""TensorBoard: event files in the folder of the run, by tensorboardX, without TensorFlow."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from balora_jax.training.trackers.packages import figures, package
from balora_jax.training.trackers.tracker import TRACKED


class TensorBoard:
    """Scalars by step; every row is on disk before the next step.

    A run that goes on adds a file, which begins by taking back what the files before it have of
    its first row or later: after a kill that may be one row.
    """

    name = "tensorboard"

    def __init__(self) -> None:
        self.file: Any = None
        self.proto: Any = None
        self.summary: Any = None
        self.takes_back = False

    def check(self, workdir: Path) -> None:
        """Raises InputError where tensorboardX is not installed."""
        del workdir
        package("tensorboardX", self.name)

    def start(self, workdir: Path, config: Mapping[str, Any]) -> None:
        """Open a new file, with the config as a text."""
        files = package("tensorboardX.event_file_writer", self.name)
        self.proto = package("tensorboardX.proto.event_pb2", self.name)
        self.summary = package("tensorboardX.summary", self.name)
        folder = workdir / TRACKED / self.name
        folder.mkdir(parents=True, exist_ok=True)
        goes_on = any(folder.iterdir())
        # The name has the time in seconds: two files of one second must be two.
        self.file = files.EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        self.takes_back = goes_on
        self._text("config", config)

    def log(self, row: Mapping[str, Any]) -> None:
        """Write a row."""
        step = int(row["step"])
        if self.takes_back:
            mark = self.proto.SessionLog(status=self.proto.SessionLog.START)
            self._write(step=step, session_log=mark)
            self.takes_back = False
        for name, value in figures(row).items():
            self._write(step=step, summary=self.summary.scalar(name, value))
        self.file.flush()

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Close the file, with the summary as a text."""
        if summary is not None:
            self._text("summary", summary)
        self.file.close()

    def _text(self, name: str, tree: Mapping[str, Any]) -> None:
        lines = json.dumps(tree, indent=2, ensure_ascii=False).splitlines()
        shown = "\n".join(f"    {line}" for line in lines)  # Markdown: as it stands
        self._write(summary=self.summary.text(name, shown))

    def _write(self, **content: Any) -> None:
        self.file.write_event(self.proto.Event(wall_time=time.time(), **content))


TENSORBOARD = TensorBoard()
