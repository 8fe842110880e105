"""Files of rows about single examples, one JSON object per line, always whole."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from balora_jax.io.folders import replaced_file

Row = Mapping[str, Any]


def write(file: Path, rows: Iterable[Row]) -> None:
    """Write a whole file of rows, or nothing."""
    _write(file, map(_line, rows))


def read(file: Path) -> list[dict[str, Any]]:
    """The rows of a file that have a ``step``; none where there is no file."""
    return [json.loads(line) for line in _lines(file) if _step_of(line) is not None]


def replace(file: Path, goes: Callable[[int], bool], rows: Sequence[Row]) -> None:
    """Write rows of one step into a file, by their step, without the lines whose step ``goes``.

    Lines that are no rows stay.
    """
    lines = _lines(file)
    steps = [_step_of(line) for line in lines]
    kept = [(of, line) for of, line in zip(steps, lines, strict=True) if of is None or not goes(of)]
    if not rows and len(kept) == len(lines):
        return
    place = len(kept)
    if rows:
        later = (i for i, (of, _) in enumerate(kept) if of is not None and of > rows[0]["step"])
        place = next(later, place)
    whole = [line for _, line in kept]
    whole[place:place] = map(_line, rows)
    _write(file, whole)


def _lines(file: Path) -> list[bytes]:
    return file.read_bytes().splitlines() if file.exists() else []


def _line(row: Row) -> bytes:
    # Half of a pair of surrogates, which a row may hold, is written as JSON escapes it.
    return json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace")


def _write(file: Path, lines: Iterable[bytes]) -> None:
    with replaced_file(file) as draft:
        draft.write_bytes(b"".join(line + b"\n" for line in lines))


def _step_of(line: bytes) -> int | None:
    """The step of a row of samples; None of a line that is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # bytes that are no UTF-8 are a ValueError, too
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if type(step) is int else None
