"""The rows of ``metrics.jsonl``."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from balora_jax.io.folders import write_atomically
from balora_jax.numerics.objective import TASK
from balora_jax.numerics.terms import TERMS

ASIDE = "metrics.unread"
"""File beside the metrics that gets, on a resume, the lines that are no rows."""

VALIDATION, SCORE = "validation_", "score_"
"""Begin the names of the columns of held-out rows: of their loss and terms, and of their score."""

LOSS = f"{VALIDATION}loss"


def columns() -> list[str]:
    """The columns of a row that come first, in order; what else a run measures follows them."""
    return [
        *("step", "loss", TASK),
        *TERMS,
        *(f"lambda{i}" for i, _ in enumerate(TERMS, start=1)),
        *("learning_rate", "grad_norm", "tokens", "tokens_per_second"),
    ]


def is_count(figure: str) -> bool:
    """Whether a figure of a score is a number of rows (MNLI's two sets name theirs).

    >>> is_count("rows_matched"), is_count("answered"), is_count("exact_match")
    (True, True, False)
    """
    return figure in ("answered", "undecided") or figure.split("_")[0] == "rows"


class Lines(NamedTuple):
    """The content of a metrics file.

    Attributes:
        rows: its rows, in their order.
        unread: lines that are no rows: torn, empty, or not of this program.
    """

    rows: list[dict[str, Any]]
    unread: list[bytes]


class MetricsLog:
    """Append rows to a JSON-lines file; on resume, forget rows after the restored step.

    Lines that are no rows are moved to the file ``metrics.unread`` beside it.

    Attributes:
        unread: how many lines those were.
    """

    def __init__(self, path: Path, *, keep_until: int):
        rows, unread = read_lines(path)
        self.unread = len(unread)
        if unread:
            with path.with_name(ASIDE).open("ab") as aside:
                aside.writelines(line + b"\n" for line in unread)
                aside.flush()
                os.fsync(aside.fileno())
        kept = [row for row in rows if row["step"] <= keep_until]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, float | None]) -> None:
        """Add one row, flushed: a killed run keeps every row it logged."""
        ordered = {name: row[name] for name in columns()} | dict(row)
        self._file.write(json.dumps(ordered) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_lines(path: Path) -> Lines:
    """The rows of a metrics file, and its other lines but a last one that a kill cut short."""
    found = Lines([], [])
    if not path.exists():
        return found
    *lines, tail = path.read_bytes().split(b"\n")
    # Behind the last line break is nothing, or the beginning of a row that a kill cut short.
    for line in lines if not tail or tail.startswith(b'{"step"') else (*lines, tail):
        row = _row(line)
        if row is None:
            found.unread.append(line)
        else:
            found.rows.append(row)
    return found


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; none where there is no file."""
    return read_lines(path).rows


def _row(line: bytes) -> dict[str, Any] | None:
    """A line as a row of this program; None where it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # bytes that are no UTF-8 are a ValueError, too
        return None
    if not isinstance(row, dict) or not set(columns()) <= row.keys():
        return None
    return row if type(row["step"]) is int and all(map(_is_figure, row.values())) else None


def _is_figure(value: Any) -> bool:
    """Whether a value can stand in a row: nothing, or a number that a float holds."""
    if type(value) is int:
        return abs(value) < 2**1023
    return value is None or type(value) is float
