"""What trackers of other packages share: the package, and the name of a run there."""

import importlib
import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from balora_jax.errors import InputError
from balora_jax.io.folders import write_atomically
from balora_jax.training.trackers.tracker import TRACKED
from balora_jax.untyped.json_text import read_object
from balora_jax.untyped.shown import shown

PROJECT = "balora_jax"
"""What runs lie under where the environment names no project."""


def package(module: str, tracker: str) -> Any:
    """A package, imported when it is first needed.

    Args:
        module: its name.
        tracker: that of the tracker, and of the extra that installs it.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"training.trackers: expected the package {module.split('.')[0]} for {tracker!r}, "
            f"which is not installed. Run pip install 'balora-jax[{tracker}]'."
        ) from error


class Kept(NamedTuple):
    """What a folder knows of its run at a tracker.

    Attributes:
        run: id of the run there.
        step: of the last row that is there for certain, as far as the folder knows.
    """

    run: str
    step: int = 0


def kept(workdir: Path, tracker: str) -> Kept | None:
    """What a folder knows of its run at a tracker; None where it has begun none there.

    Raises:
        InputError: the file was not written by a run.
    """
    file = workdir / TRACKED / f"{tracker}.json"
    if not file.exists():
        return None
    found = read_object(file)
    run, step = found.get("run"), found.get("step")
    if len(found) != 2 or type(step) is not int or not isinstance(run, str) or not run.isalnum():
        raise InputError(
            f"{file}: expected the id of this run at {tracker}, got {shown(found)}. Remove the "
            "file: the run then is a new one there."
        )
    return Kept(run, step)


def keep(workdir: Path, tracker: str, what: Kept) -> None:
    """Write what a folder knows of its run at a tracker."""
    file = workdir / TRACKED / f"{tracker}.json"
    file.parent.mkdir(exist_ok=True)
    write_atomically(file, json.dumps(what._asdict()) + "\n")


def begun(workdir: Path, tracker: str) -> Kept:
    """A folder's run at a tracker: a new one at its start, the same when it goes on."""
    found = kept(workdir, tracker)
    if found is None:
        found = Kept(uuid.uuid4().hex[:8])
        keep(workdir, tracker, found)
    return found


def run_name(workdir: Path) -> str:
    """What a run is called at a tracker: the end of its path, as a study's folders say only there.

    >>> run_name(Path("runs/glue/rte/pissa/seed42")), run_name(Path("demo"))
    ('rte/pissa/seed42', 'demo')
    """
    return "/".join(workdir.parts[-3:]).lstrip("/")


def figures(row: Mapping[str, Any]) -> dict[str, float]:
    """The columns of a row but its step; what the log has as null is NaN."""
    values = {name: float("nan") if v is None else v for name, v in row.items()}
    del values["step"]
    return values
