"""The folder of a run: what may lie in it before the run begins, and who writes there."""

import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from balora_jax.errors import InputError, RunStoppedError
from balora_jax.io import lock, metrics, seals
from balora_jax.io.beside import CARD
from balora_jax.io.folders import begins_with, drafts_of
from balora_jax.io.hf_export import is_merged
from balora_jax.io.hf_files import CONFIG_FILE
from balora_jax.io.peft_writer import is_adapter
from balora_jax.parallel import hosts
from balora_jax.pretrained.export import ADAPTER, BEST, MODEL
from balora_jax.training.trackers.tracker import SEEN, TRACKED
from balora_jax.untyped.yaml_text import read_yaml

CONFIG = "config.yaml"
HEADER = "# The resolved config of a run of balora_jax.\n"
"""First line of ``config.yaml`` in the folder of a run: it tells one of a run from a user's."""

METRICS, SUMMARY, CURVES = "metrics.jsonl", "summary.json", "curves.png"
CHECKPOINTS, PROFILE = "checkpoints", "profile"
TEACHER = "teacher_logits.safetensors"
TEACHER_ROWS = "teacher_hidden.safetensors"
SKIPPED = "skipped_rows.jsonl"
SAMPLES, PREDICTIONS = "samples.jsonl", "predictions"

PREDICTION = re.compile(r"(before|after|step_(\d+))\.jsonl")
"""Names of files in ``predictions/``; the second group is the step of a score on the way."""

FILES = (
    *(CONFIG, METRICS, metrics.ASIDE, SUMMARY, CURVES, SEEN, TEACHER, TEACHER_ROWS),
    *(SKIPPED, SAMPLES),
)
FOLDERS = (CHECKPOINTS, ADAPTER, MODEL, BEST, PROFILE, TRACKED, PREDICTIONS)
"""Everything that a run writes into its folder, and replaces there when it goes on."""

MOST_METRICS = 2 * 2**30
"""Bytes of metrics that are read; years of rows have less."""

_TOKEN = ".hosts_see_this"


def check_workdir(folder: Path, *, resume: bool) -> None:
    """Raises InputError unless a run may begin, or go on, in a folder; writes nothing.

    A run replaces only what a run has written: without the ``config.yaml`` of one, there must be
    nothing of a name that a run uses.
    """
    check_writable(folder)
    lock.check_not_held(folder)
    _check_content(folder, resume=resume)


@contextmanager
def held(folder: Path, *, resume: bool) -> Iterator[Callable[[], None]]:
    """Hold a checked folder for a run: nobody else begins or goes on with one there.

    Yields what raises RunStoppedError, in every process, where the folder is no longer the one that
    is held; to be called before the run writes there by name.

    Raises:
        InputError: another process was quicker.
    """
    with ExitStack() as stack:
        is_held: list[Callable[[], bool]] = []

        def take() -> None:
            try:
                is_held.append(stack.enter_context(lock.locked(folder)))
            except OSError as error:
                raise _unwritable(folder, error) from error
            _check_content(folder, resume=resume)

        def check() -> None:
            if not hosts.by_first(lambda: is_held[0]()):
                raise RunStoppedError(
                    f"--workdir {folder}: expected the folder that this run has locked, got "
                    "another or none: it was moved or removed meanwhile. Nothing more is written; "
                    "go on with --resume where it lies now."
                )

        hosts.by_first(take)
        yield check


def _check_content(folder: Path, *, resume: bool) -> None:
    seals.check_outside(folder, f"--workdir {folder}")
    there = [name for name in (*FILES, *FOLDERS) if os.path.lexists(folder / name)]
    if (folder / CONFIG_FILE).exists():
        raise InputError(
            f"--workdir {folder}: expected a folder for a run, got one that holds a model "
            f"({CONFIG_FILE}). Choose another folder."
        )
    if holds_run(folder):
        if not resume:
            raise InputError(
                f"--workdir {folder}: expected a new or empty folder, got one that holds a run. "
                "Add --resume to go on with it, or choose another folder."
            )
        _check_kinds(folder, there)
    elif there:
        raise InputError(
            f"--workdir {folder}: expected a new or empty folder, got one with {there[0]} that no "
            "run of this program wrote, and that a run would replace. Choose another folder."
        )


def holds_run(folder: Path) -> bool:
    """Whether a run has begun in a folder: its ``config.yaml`` is one that a run wrote."""
    return begins_with(folder / CONFIG, HEADER)


def recorded_day(folder: Path) -> str | None:
    """The day that the run in a folder tells its chat template; None where none is recorded."""
    if not holds_run(folder):
        return None
    tree = read_yaml(folder / CONFIG)
    data = tree.get("data") if isinstance(tree, dict) else None
    found = data.get("today") if isinstance(data, dict) else None
    return None if found is None else str(found)


def _check_kinds(folder: Path, there: list[str]) -> None:
    """Raises InputError where something of a user's has the name of something of the run's."""
    token = folder / _TOKEN
    for path, wants_folder in (
        *((folder / name, name in FOLDERS) for name in there),
        *((path, False) for path in predictions_of(folder)),
        *_leftovers(folder),
        *([(token, False)] if os.path.lexists(token) else []),
    ):
        # What is replaced may be no link; what is only written into may lie on another disk.
        mode = (os.stat if path.name in (CHECKPOINTS, PROFILE, TRACKED) else os.lstat)(path).st_mode
        if not (stat.S_ISDIR(mode) if wants_folder else stat.S_ISREG(mode)):
            wanted = "a folder" if wants_folder else "a file"
            raise InputError(
                f"--workdir {folder}: expected {path.name} to be {wanted} of the run, got "
                "something else. Move it elsewhere."
            )
    for name in (METRICS, SAMPLES):
        if name in there and (size := (folder / name).stat().st_size) > MOST_METRICS:
            raise InputError(
                f"{folder / name}: expected at most {MOST_METRICS >> 30} GiB of rows, got "
                f"{size / 2**30:.0f} GiB. Move the file elsewhere."
            )
    kinds = {ADAPTER: (is_adapter,), MODEL: (is_merged,), BEST: (is_adapter, is_merged)}
    for name, are_ours in kinds.items():
        written = folder / name
        filled = written.is_dir() and any(written.iterdir())
        if filled and not any(is_ours(written) for is_ours in are_ours):
            raise InputError(
                f"{written}: expected what the run wrote, which its end replaces, got a folder "
                "with other files in it. Move them elsewhere."
            )


def check_writable(folder: Path) -> None:
    """Raises InputError unless a folder, or the nearest that is there, can be written."""
    try:
        if os.path.lexists(folder) and not stat.S_ISDIR(os.stat(folder).st_mode):
            raise InputError(f"--workdir {folder}: expected a folder, got a file. Choose another.")
        existing = folder
        while not _is_there(existing):
            existing = existing.parent
        with tempfile.TemporaryFile(dir=existing):
            pass
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or error
    return InputError(
        f"--workdir {folder}: expected a folder that can be written, got {reason}. Choose another "
        "or change its permissions."
    )


def _is_there(path: Path) -> bool:
    """Whether something is there; other than ``Path.exists``, it raises where nobody can tell."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    return True


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed run left half-written, by names that only this program uses."""
    (folder / _TOKEN).unlink(missing_ok=True)
    for path, is_folder in _leftovers(folder):
        if is_folder:
            shutil.rmtree(path)
        else:
            path.unlink()


def _leftovers(folder: Path) -> list[tuple[Path, bool]]:
    """Drafts of a run's files and folders, and whether each is to be a folder."""
    files = drafts_of(folder, (*FILES, CARD))  # adapter/'s card
    if (folder / PREDICTIONS).is_dir():
        named = {name for child in (folder / PREDICTIONS).iterdir() if (name := _drafted(child))}
        files += drafts_of(folder / PREDICTIONS, named)
    folders = drafts_of(folder, (ADAPTER, MODEL, BEST))
    return [(path, False) for path in files] + [(path, True) for path in folders]


def _drafted(child: Path) -> str | None:
    """The name of the file of predictions that something may be a draft of."""
    found = PREDICTION.match(child.name, 1)
    return found and found[0]


def predictions_of(folder: Path) -> list[Path]:
    """The files of predictions of the run in a folder."""
    if not (folder / PREDICTIONS).is_dir():
        return []
    return [path for path in (folder / PREDICTIONS).iterdir() if PREDICTION.fullmatch(path.name)]


def agree_on_folder(folder: Path) -> None:
    """Check that every host sees the folder, which the first process has made.

    Raises:
        InputError: a host looks at another disk: its parts of the checkpoints would be lost.
    """
    token = folder / _TOKEN
    if hosts.is_first():
        token.touch()
    hosts.barrier("workdir made")

    def look() -> None:
        if not token.exists():
            raise InputError(
                f"--workdir {folder}: expected a folder that all hosts share, got one that this "
                "host does not see. Name a folder on NFS, Filestore or a mounted bucket."
            )

    hosts.together(look)
    if hosts.is_first():
        token.unlink()
