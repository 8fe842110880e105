"""What lies in the folder of a run's checkpoints: which are whole, and what a kill has left."""

import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from balora_jax.errors import InputError
from balora_jax.io import seals
from balora_jax.io.folders import drafts_of

WRITING = "writing"
"""File beside the checkpoints that says which step's is being written."""

REMOVED = ".removed-"
"""Begins the name of a checkpoint that is being removed."""


class Found(NamedTuple):
    """What lies in the folder of a run's checkpoints.

    Attributes:
        step: of the newest whole checkpoint; None where there is none.
        said: a line about each that is not whole.
        damaged: those to be put aside, each with its new name.
        cut_short: what a kill left of those that were being written or removed.
    """

    step: int | None
    said: list[str]
    damaged: list[tuple[Path, str]]
    cut_short: list[Path]


def sealed_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that were written to their end, the oldest first."""
    there = ((step, path) for step, path in _numbered(folder) if not path.is_symlink())
    return sorted(step for step, path in there if seals.is_sealed(path))


def look(folder: Path) -> Found:
    """The newest checkpoint whose every file is as it was written; changes nothing.

    Raises:
        InputError: there are checkpoints but all of them are damaged, or a folder has the name of
            a checkpoint and is none.
    """
    found = Found(None, [], [], [])
    _check_marks(folder)
    writing = _being_written(folder)
    for step, path in sorted(_numbered(folder), reverse=True):
        if path.is_symlink() or not path.is_dir():
            raise InputError(
                f"{path}: expected a folder of this run, got a link or a file. Move it elsewhere."
            )
        if seals.is_sealed(path):
            damage = seals.damage(path, step)
            if damage is None:
                found = found._replace(step=step)
                break
            aside = _free_name(path, f"damaged-{step}")
            found.said.append(f"{path}: damaged, as {damage}; put aside as {aside}")
            found.damaged.append((path, aside))
        elif step == writing:
            found.said.append(f"{path}: writing it was cut short; removed")
        elif (path / seals.ORBAX_MARK).is_file():
            aside = _free_name(path, f"unsealed-{step}")
            found.said.append(f"{path}: it has no {seals.NAME}; put aside as {aside}")
            found.damaged.append((path, aside))
        else:
            raise InputError(
                f"{path}: expected a checkpoint of this run, got another folder. Move it elsewhere."
            )
    if found.step is None and any("damaged, as " in line for line in found.said):
        raise InputError(
            f"{folder}: expected a whole checkpoint, got only damaged ones "
            f"({'; '.join(found.said[:2])}). Bring one back from a copy, or use a new --workdir."
        )
    found.cut_short.extend(_cut_short(folder, writing))
    return found


def tidy(folder: Path, found: Found) -> None:
    """Put aside what is damaged, and remove what a kill left half-written."""
    for path, aside in found.damaged:
        path.rename(path.with_name(aside))
    for path in found.cut_short:
        shutil.rmtree(path)
    for path in _marks(folder):
        path.unlink()


def _marks(folder: Path) -> list[Path]:
    """The file that says which step's checkpoint is being written, and drafts of it."""
    if not folder.is_dir():
        return []
    mark = folder / WRITING
    return [*([mark] if os.path.lexists(mark) else []), *drafts_of(folder, (WRITING,))]


def _check_marks(folder: Path) -> None:
    """Raises InputError where something of a user's has a name that a run clears away."""
    doomed = [path for path in _marks(folder) if path.is_symlink() or not path.is_file()]
    doomed += [path for path in _removed(folder) if path.is_symlink() or not path.is_dir()]
    if doomed:
        raise InputError(
            f"{doomed[0]}: expected what a run leaves while it writes checkpoints, got something "
            "else. Move it elsewhere."
        )


def _removed(folder: Path) -> list[Path]:
    """Checkpoints whose removal was begun."""
    name = re.compile(rf"{re.escape(REMOVED)}[0-9]+")
    there = folder.iterdir() if folder.is_dir() else ()
    return [child for child in there if name.fullmatch(child.name)]


def _being_written(folder: Path) -> int | None:
    """The step whose checkpoint was begun and not sealed."""
    file = folder / WRITING
    text = file.read_bytes() if file.is_file() else b""
    return int(text) if re.fullmatch(rb"[0-9]{1,18}\n", text) else None


def _cut_short(folder: Path, writing: int | None) -> list[Path]:
    """Folders that only this program makes: of a checkpoint half-written or half-removed."""
    if not folder.is_dir():
        return []
    half = re.compile(rf"{writing}(\.orbax-checkpoint-tmp.*)?" if writing is not None else r"(?!)")
    there = [child for child in folder.iterdir() if half.fullmatch(child.name)]
    return _removed(folder) + [child for child in there if not seals.is_sealed(child)]


def _free_name(path: Path, name: str) -> str:
    """The name, or the first of it with a number that nothing has."""
    names = (name, *(f"{name}-{i}" for i in range(2, 10**6)))
    return next(n for n in names if not os.path.lexists(path.with_name(n)))


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """What has the name of a step."""
    if not folder.is_dir():
        return []
    return [
        (int(child.name), child)
        for child in folder.iterdir()
        if re.fullmatch(r"0|[1-9][0-9]{0,17}", child.name)
    ]
