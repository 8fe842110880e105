"""What a run writes for people: rows of ``metrics.jsonl``, ``summary.json`` and the curves."""

import json
import os
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

COLUMNS = (
    "step",
    "loss",
    "task_loss",
    "consistency",
    "diversity",
    "spectral",
    "lambda1",
    "lambda2",
    "lambda3",
    "learning_rate",
    "grad_norm",
    "tokens",
    "tokens_per_second",
)


class MetricsLog:
    """Append rows to a JSON-lines file; on resume, forget rows after the restored step."""

    def __init__(self, path: Path, *, keep_until: int):
        rows = [row for row in read_metrics(path) if row["step"] <= keep_until]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, float | None]) -> None:
        """Add one row, flushed: a killed run keeps every row it logged."""
        ordered = {name: row[name] for name in COLUMNS} | dict(row)
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


def write_atomically(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def peak_memory_bytes() -> int:
    """Most memory used so far: of the first device, or of this process where that is the CPU."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "peak_bytes_in_use" in statistics:
        return int(statistics["peak_bytes_in_use"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    names = ("balora_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")
    return {name: _version(name) for name in names} | {"python": platform.python_version()}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def device_description() -> str:
    """Kind and number of devices, as ``1 x cpu``."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def pyplot_or_none() -> Any:
    """Matplotlib's ``pyplot``, drawing to files; None where the extra ``viz`` is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_curves(rows: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Loss, terms, weights and gradient norm over the steps as a PNG.

    Returns:
        Whether it was drawn: matplotlib is an extra (``viz``).
    """
    pyplot = pyplot_or_none()
    if pyplot is None:
        return False

    panels = [
        ("task loss (nats per token)", ["task_loss", "loss"]),
        ("consistency: T² KL to the teacher", ["consistency"]),
        ("diversity: minus entropy (nats)", ["diversity"]),
        ("spectral: minus ratio of singular values", ["spectral"]),
        ("weights λ", ["lambda1", "lambda2", "lambda3"]),
        ("gradient norm", ["grad_norm"]),
    ]
    steps = [row["step"] for row in rows]
    figure, axes = pyplot.subplots(2, 3, figsize=(12, 6), constrained_layout=True)
    for axis, (title, names) in zip(axes.flat, panels, strict=True):
        for name in names:
            axis.plot(steps, [row[name] for row in rows], label=name, linewidth=1.2)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True
