"""Seals of checkpoints: a digest of every file, to find out whether a folder is as it was written.

A sealed folder holds ``SHA256SUMS``, which ``sha256sum --check SHA256SUMS`` reads as well: a line
for each file, then a comment that says the step, how many files there are and the digest of the
lines above it. So neither a line nor a file can be missing, and no folder passes for another step.
"""

import hashlib
import os
import re
from pathlib import Path

from balora_jax.errors import InputError

NAME = "SHA256SUMS"
ORBAX_MARK = "_CHECKPOINT_METADATA"
"""File that orbax writes into every checkpoint."""

_DRAFT = f"{NAME}.partial"
_MOST = 64 * 2**20  # bytes of a seal: some 300 000 files
_LAST = re.compile(r"# step (\d+), (\d+) files, sha256 ([0-9a-f]{64})\n")
_LINE = re.compile(r"([0-9a-f]{64})  ([^\n]+)\n")


def seal(folder: Path, step: int) -> None:
    """Write the digest of every file below ``folder``; the last thing that is written there."""
    names, _ = _listed(folder)
    lines = "".join(
        f"{_digest(folder / name)}  {name}\n" for name in names if name not in (NAME, _DRAFT)
    )
    with (folder / _DRAFT).open("xb") as file:
        file.write((lines + _last_line(step, lines)).encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(folder / _DRAFT, folder / NAME)


def is_sealed(folder: Path) -> bool:
    """Whether writing the folder came to its end."""
    return (folder / NAME).is_file()


def check_outside(path: Path, where: str) -> None:
    """Raises InputError for a place in a checkpoint: what is written there breaks its seal."""
    for parent in Path(os.path.realpath(path)).parents:
        if is_sealed(parent) and (parent / ORBAX_MARK).is_file():
            raise InputError(
                f"{where}: expected a place outside of a run's checkpoints, got one in {parent}. "
                "Choose another."
            )


def damage(folder: Path, step: int) -> str | None:
    """What is wrong with the sealed folder of a step, by the first name; None where nothing is."""
    try:
        return _damage(folder, step)
    except OSError as error:
        name = os.path.relpath(error.filename, folder) if error.filename else "a file"
        return f"{name} cannot be read ({error.strerror or error})"


def _damage(folder: Path, step: int) -> str | None:
    if (folder / NAME).stat().st_size > _MOST:
        return f"{NAME} is too large"
    text = (folder / NAME).read_bytes().decode(errors="replace")
    *lines, last = text.splitlines(keepends=True) or [""]
    if not last.endswith("\n"):
        return f"{NAME} is cut short"
    found = _LAST.fullmatch(last)
    if found is None:
        return f"{NAME} does not end with the line of its step: another version may have written it"
    if last != _last_line(int(found[1]), "".join(lines)):
        return f"{NAME} is not as it was written"
    if int(found[1]) != step:
        return f"it is the checkpoint of step {found[1]} under another name"
    return _damaged_file(folder, lines)


def _damaged_file(folder: Path, lines: list[str]) -> str | None:
    """The first file that is not what its line says, or that has no line."""
    written = {}
    for line in lines:
        found = _LINE.fullmatch(line)
        if found is None:  # only if whoever wrote the last line wrote this one as well
            return f"{NAME} has a line that is not of a file"
        written[found[2]] = found[1]
    names, strange = _listed(folder)
    if strange:
        return f"{strange[0]} is neither a file nor a folder"
    there = set(names) - {NAME}
    for name in sorted(written.keys() | there):
        if name not in there:
            return f"{name} is missing"
        if name not in written:
            return f"{name} was not there when it was written"
        if _digest(folder / name) != written[name]:
            return f"{name} does not have the checksum it was written with"
    return None


def _last_line(step: int, lines: str) -> str:
    count = lines.count("\n")
    return f"# step {step}, {count} files, sha256 {hashlib.sha256(lines.encode()).hexdigest()}\n"


def _listed(folder: Path) -> tuple[list[str], list[str]]:
    """Files below a folder, and what is neither a file nor a folder: links, which mislead."""
    files, strange = [], []
    for parent, folders, names in os.walk(folder, followlinks=False):
        for name in (*folders, *names):
            path = Path(parent, name)
            relative = path.relative_to(folder).as_posix()
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                strange.append(relative)
            elif path.is_file():
                files.append(relative)
    return sorted(files), sorted(strange)


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
