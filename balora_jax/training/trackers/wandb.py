"""Weights & Biases, online or offline as its own environment variables say."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from balora_jax.errors import InputError, RunStoppedError
from balora_jax.training.trackers.packages import (
    PROJECT,
    Kept,
    begun,
    figures,
    keep,
    kept,
    package,
    run_name,
)
from balora_jax.training.trackers.tracker import TRACKED


class WandB:
    """One run there for each run here, which goes on with it.

    ``WANDB_MODE``, ``WANDB_PROJECT``, ``WANDB_ENTITY`` and the rest are read as everywhere.
    """

    name = "wandb"

    def __init__(self) -> None:
        self.run: Any = None
        self.workdir, self.kept = Path(), Kept("")

    def check(self, workdir: Path) -> None:
        """Raises InputError where wandb is not installed, or nobody is logged in."""
        wandb = package("wandb", self.name)
        kept(workdir, self.name)
        online = os.environ.get("WANDB_MODE", "online") not in ("offline", "disabled", "dryrun")
        if online and not wandb.api.api_key:
            raise InputError(
                "training.trackers: expected a key of wandb, got none. Run wandb login, set "
                "WANDB_API_KEY, or set WANDB_MODE=offline and run wandb sync later."
            )

    def start(self, workdir: Path, config: Mapping[str, Any]) -> None:
        """Begin the run there, or go on with it.

        Raises:
            RunStoppedError: it does not answer, or refuses the run.
        """
        wandb = package("wandb", self.name)
        folder = workdir / TRACKED
        self.workdir, self.kept = workdir, begun(workdir, self.name)
        identity = self.kept.run
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                id=identity,
                name=os.environ.get("WANDB_NAME", run_name(workdir)),
                dir=str(folder),
                config=dict(config),
                resume="allow",
                settings=wandb.Settings(console="off"),  # our progress is its own log
            )
        except wandb.errors.Error as error:
            said = " ".join(str(error).split())
            raise RunStoppedError(
                f"training.trackers: expected wandb to take the run {identity}, got: {said}. Set "
                "WANDB_MODE=offline, or correct that, and go on with --resume."
            ) from error

    def last_step(self) -> int:
        """Step of the last row there, or offline of the last session that came to its end.

        Its process ends with ours, and what it has not written is then lost.
        """
        return max(self.kept.step, self.run.step - 1)

    def log(self, row: Mapping[str, Any]) -> None:
        """Send a row."""
        step = int(row["step"])
        self.run.log(figures(row), step=step, commit=True)
        self.kept = self.kept._replace(step=step)

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """End the run there, with the summary; one that stopped early counts as failed."""
        if summary is not None:
            self.run.summary.update(dict(summary))
        self.run.finish(exit_code=0 if summary is not None else RunStoppedError.exit_code)
        keep(self.workdir, self.name, self.kept)


WANDB = WandB()
