"""Rows of a source as a list, and what every reader of files shares."""

import bisect
import csv
import itertools
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from balora_jax.errors import InputError
from balora_jax.untyped.shown import one_line

Row = Mapping[str, Any]

FAULTS = (OSError, EOFError, zlib.error, ValueError, csv.Error)
"""What the readers of the standard library raise at a broken file."""


@runtime_checkable
class Rows(Protocol):
    """A list-like of rows: a list of dicts, rows of files, or a `datasets.Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...

    def __iter__(self) -> Iterator[Any]: ...


@runtime_checkable
class FileRows(Rows, Protocol):
    """Rows that stay in their file until they are asked for."""

    def close(self) -> None:
        """Close the file; the next row opens it again."""


class Joined:
    """Rows of several files, one after another; one file is open at a time."""

    def __init__(self, parts: Sequence[FileRows]):
        self._parts = parts
        self._ends = list(itertools.accumulate(map(len, parts)))
        self._open = 0

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Row:
        index = range(len(self))[index]
        place = bisect.bisect_right(self._ends, index)
        if place != self._open:
            self._parts[self._open].close()
            self._open = place
        return self._parts[place][index - self._ends[place]]  # counted from the part's end

    def __iter__(self) -> Iterator[Row]:
        return itertools.chain.from_iterable(self._parts)


def state_of(handle: int) -> tuple[int, ...]:
    """What changes when an open file is written to, or another takes its place.

    Numbers of files do not tell: some mounted buckets give a file another one when it is opened
    again.
    """
    found = os.fstat(handle)
    return found.st_size, found.st_mtime_ns


def changed(file: str) -> InputError:
    """The refusal of a file that is not what was read before."""
    return InputError(
        f"{file}: expected a data file that stays as it is while it is read, got another size or "
        "time of change. Start again once nothing writes to it."
    )


def unreadable(file: str, error: Exception) -> InputError:
    """One sentence for a file that its reader refused; an InputError as it is."""
    if isinstance(error, InputError):
        return error
    reason = one_line(" ".join(str(error).split()), most=300) or type(error).__name__
    if isinstance(error, OSError | EOFError | zlib.error) and file.lower().endswith(".gz"):
        what = f"a whole gzip file, got a damaged one ({reason})"
        return InputError(f"{file}: expected {what}. Copy or pack the file again.")
    return InputError(
        f"{file}: expected a readable data file, got an error ({reason}). Fix the file."
    )


def class_name(names: Sequence[str], number: Any, where: str) -> Any:
    """The name of a `ClassLabel`'s id; -1 and null, which name no class, as they are.

    Raises:
        InputError: an id that has no name.

    >>> class_name(["no", "yes"], 1, "row 1"), class_name(["no", "yes"], -1, "row 1")
    ('yes', -1)
    """
    if number is None or number == -1:
        return number
    if not 0 <= number < len(names):
        raise InputError(
            f"{where}: expected an id of the {len(names)} classes that the data set names, got "
            f"{number}. Fix the data set."
        )
    return names[number]
