"""The figures of a study as a table and as a picture."""

import datetime
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from balora_jax import hardware
from balora_jax.io.drawing import save_picture
from balora_jax.io.tables import markdown
from balora_jax.study.grid import StudyRun

COUNTS = (
    "rows",
    "answered",
    "grader",
    "undecided",
)  # of a score: what it was taken on, not how good it is

Figures = dict[str, Any]


def figures_of(runs: Sequence[StudyRun], records: Mapping[str, Figures]) -> Figures:
    """What ``study.json`` holds: the runs that ended, in their order, and what they ran on."""
    rows = [
        {"dataset": run.dataset, "variant": run.variant, "seed": run.seed, **records[run.name]}
        for run in runs
        if run.name in records
    ]
    return {
        "datasets": list(dict.fromkeys(run.dataset for run in runs)),
        "variants": list(dict.fromkeys(run.variant for run in runs)),
        "runs": rows,
        "wall_seconds": round(_wall_seconds(rows), 3),
        "versions": hardware.versions(),
        "device": hardware.device_description(),
    }


def _wall_seconds(rows: Sequence[Mapping[str, Any]]) -> float:
    return sum(row.get("wall_seconds") or 0.0 for row in rows)


def diverged(figures: Mapping[str, Any]) -> list[str]:
    """The names of the runs that failed."""
    return [
        f"{row['dataset']}/{row['variant']}/seed{row['seed']}"
        for row in figures["runs"]
        if "failed" in row
    ]


def main_metric(after: Mapping[str, Any] | None) -> str | None:
    """The first name of a score that is a metric; None where nothing was scored.

    >>> main_metric({"rows": 408, "accuracy": 0.9, "f1": 0.93})
    'accuracy'
    """
    return next((name for name in after or {} if name not in COUNTS), None)


def _points(figures: Mapping[str, Any], variant: str, dataset: str) -> list[float]:
    """100 x the main metric of every run of a cell."""
    rows = [r for r in figures["runs"] if (r["variant"], r["dataset"]) == (variant, dataset)]
    scores = [row.get("after") or {} for row in rows]
    return [100 * s[name] for s in scores if (name := main_metric(s)) is not None]


def _deviation(points: Sequence[float]) -> float | None:
    return statistics.stdev(points) if len(points) > 1 else None


def table(figures: Mapping[str, Any]) -> str:
    """Mean ± sample standard deviation (runs) of each cell, in points, as Markdown.

    The average of a variant is the mean of its cells; there is none while a cell is empty.
    """
    datasets, runs = figures["datasets"], figures["runs"]
    header = ["variant", *(_title(figures, name) for name in datasets), "average", "wall time"]
    lines = []
    for variant in figures["variants"]:
        cells = [_points(figures, variant, dataset) for dataset in datasets]
        average = f"{statistics.mean(map(statistics.mean, cells)):.2f}" if all(cells) else "–"
        took = _wall_seconds([row for row in runs if row["variant"] == variant])
        lines.append([variant, *map(_cell, cells), average, _clock(took)])
    ended = [row for row in runs if "failed" not in row]
    below = (
        f"points: mean ± sample standard deviation (runs); {len(ended)} runs took "
        f"{_clock(figures['wall_seconds'])} in all; {figures['device']}, "
        f"jax {figures['versions']['jax']}"
    )
    failed = diverged(figures)
    last = [f"diverged: {', '.join(failed)}"] if failed else []
    return "\n".join([*markdown(header, lines), "", below, *last])


def _title(figures: Mapping[str, Any], dataset: str) -> str:
    """A data set with its main metric, where a run of it was scored."""
    scores = (row.get("after") for row in figures["runs"] if row["dataset"] == dataset)
    name = next(filter(None, map(main_metric, scores)), None)
    return dataset if name is None else f"{dataset} ({name.replace('_', ' ')})"


def _cell(points: Sequence[float]) -> str:
    if not points:
        return "–"
    deviation = _deviation(points)
    spread = "" if deviation is None else f" ± {deviation:.2f}"
    return f"{statistics.mean(points):.2f}{spread} ({len(points)})"


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def draw(figures: Mapping[str, Any], path: Path) -> bool:
    """Mean and deviation of each cell as bars, by data set, in a PNG; whether it was drawn."""

    def paint(subplots: Any) -> Any:
        datasets, variants = figures["datasets"], figures["variants"]
        width = 0.8 / len(variants)
        size = (2.5 + 0.45 * len(datasets) * (len(variants) + 1), 4)
        figure, axis = subplots(figsize=size)
        for place, variant in enumerate(variants):
            cells = [_points(figures, variant, dataset) for dataset in datasets]
            axis.bar(
                [i + (place - (len(variants) - 1) / 2) * width for i in range(len(datasets))],
                [statistics.mean(points) if points else math.nan for points in cells],
                width,
                yerr=[_deviation(points) or 0.0 for points in cells],
                capsize=3,
                label=variant,
            )
        axis.set_xticks(range(len(datasets)), [_title(figures, name) for name in datasets])
        axis.set_ylabel("points: mean, sample standard deviation")
        axis.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper center", ncols=len(variants), fontsize=8)
        return figure

    return save_picture(path, paint)
