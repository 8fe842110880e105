"""The rows of ``metrics.jsonl``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from balora_jax.io.folders import write_atomically
from balora_jax.numerics.objective import TASK
from balora_jax.numerics.terms import TERMS


def columns() -> list[str]:
    """The columns of a row that come first, in order; what else a run measures follows them."""
    return [
        *("step", "loss", TASK),
        *TERMS,
        *(f"lambda{i}" for i, _ in enumerate(TERMS, start=1)),
        *("learning_rate", "grad_norm", "tokens", "tokens_per_second"),
    ]


class MetricsLog:
    """Append rows to a JSON-lines file; on resume, forget rows after the restored step."""

    def __init__(self, path: Path, *, keep_until: int):
        rows = [row for row in read_metrics(path) if row["step"] <= keep_until]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, float | None]) -> None:
        """Add one row, flushed: a killed run keeps every row it logged."""
        ordered = {name: row[name] for name in columns()} | dict(row)
        self._file.write(json.dumps(ordered) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            rows.append(json.loads(line))
    return rows
