"""Trackio: its local database, or the Space or server that its environment variables name."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from balora_jax.errors import RunStoppedError
from balora_jax.training.trackers.packages import (
    PROJECT,
    begun,
    figures,
    kept,
    package,
    run_name,
)


class Trackio:
    """One run there for each run here, which goes on with it.

    ``TRACKIO_DIR``, ``TRACKIO_SPACE_ID`` and the rest are read as everywhere;
    ``TRACKIO_PROJECT`` names the project.
    """

    name = "trackio"

    def __init__(self) -> None:
        self.run: Any = None

    def check(self, workdir: Path) -> None:
        """Raises InputError where trackio is not installed."""
        package("trackio", self.name)
        kept(workdir, self.name)

    def start(self, workdir: Path, config: Mapping[str, Any]) -> None:
        """Begin the run there, or go on with it.

        Raises:
            RunStoppedError: it refuses the run.
        """
        trackio = package("trackio", self.name)
        identity = begun(workdir, self.name).run
        try:
            self.run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", PROJECT),
                name=f"{run_name(workdir)}-{identity}".replace("/", "-"),
                config=dict(config),
                resume="allow",
                embed=False,
            )
        except (ValueError, OSError, ImportError) as error:
            said = " ".join(str(error).split())
            raise RunStoppedError(
                f"training.trackers: expected trackio to take the run {identity}, got: {said}. "
                "Correct that, and go on with --resume."
            ) from error

    def last_step(self) -> int:
        """Step of the last row of the run there: its thread writes half a second later."""
        return self.run._next_step - 1

    def log(self, row: Mapping[str, Any]) -> None:
        """Hand a row to its thread."""
        self.run.log(figures(row), step=int(row["step"]))

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Wait until all is written."""
        del summary  # it has rows alone
        self.run.finish()


TRACKIO = Trackio()
