"""Seals of folders: a digest of every file, to find out whether it is as it was written.

A sealed folder holds ``SHA256SUMS``, which ``sha256sum --check SHA256SUMS`` reads as well.
"""

import hashlib
import os
from pathlib import Path

NAME = "SHA256SUMS"


def seal(folder: Path) -> None:
    """Write the digest of every file below ``folder``; the last thing that is written there."""
    lines = [f"{_digest(folder / name)}  {name}\n" for name in _files(folder)]
    draft = folder / f"{NAME}.partial"
    with draft.open("w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, folder / NAME)


def is_sealed(folder: Path) -> bool:
    """Whether writing the folder came to its end."""
    return (folder / NAME).is_file()


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder, by the name of the first file; None where nothing is."""
    text = (folder / NAME).read_bytes().decode(errors="replace")
    if not text.endswith("\n"):
        return f"{NAME} is cut short"
    for line in text.splitlines():
        digest, _, name = line.partition("  ")
        if len(digest) != 64 or not name:
            return f"{NAME} has the line {line[:80]!r}"
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if _digest(file) != digest:
            return f"{name} does not have the checksum it was written with"
    return None


def _files(folder: Path) -> list[str]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in found if path.name != NAME)


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
