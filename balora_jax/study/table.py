"""The figures of a study as a table and as a picture."""

import datetime
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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


class Shown(NamedTuple):
    """What a table shows of a run.

    Attributes:
        name: of the figure.
        value: of it: a score in points, or a loss.
        digits: behind the point.
    """

    name: str
    value: float
    digits: int

    @property
    def said(self) -> str:
        """The value for a person."""
        return f"{self.value:.{self.digits}f}"


def figure_of(row: Mapping[str, Any]) -> Shown | None:
    """The score of a run, or the loss of its held-out rows where nothing was scored; or None.

    >>> figure_of({"after": {"accuracy": 0.5}})
    Shown(name='accuracy', value=50.0, digits=2)
    >>> figure_of({"after": {}, "validation": {"after": {"validation_loss": 1.5}}}).said
    '1.5000'
    """
    score = row.get("after") or {}
    if (name := main_metric(score)) is not None:
        return Shown(name, 100 * score[name], 2)
    loss = ((row.get("validation") or {}).get("after") or {}).get("validation_loss")
    return None if loss is None else Shown("validation_loss", loss, 4)


def main_metric(after: Mapping[str, Any] | None) -> str | None:
    """The first name of a score that is a metric; None where nothing was scored.

    >>> main_metric({"rows": 408, "accuracy": 0.9, "f1": 0.93})
    'accuracy'
    """
    return next((name for name in after or {} if name not in COUNTS), None)


def _shown(figures: Mapping[str, Any], variant: str, dataset: str) -> list[Shown]:
    """What is shown of every run of a cell."""
    rows = [r for r in figures["runs"] if (r["variant"], r["dataset"]) == (variant, dataset)]
    return [found for row in rows if (found := figure_of(row)) is not None]


def _points(figures: Mapping[str, Any], variant: str, dataset: str) -> list[float]:
    """100 x the main metric of every run of a cell, or their losses."""
    return [shown.value for shown in _shown(figures, variant, dataset)]


def _deviation(points: Sequence[float]) -> float | None:
    return statistics.stdev(points) if len(points) > 1 else None


def table(figures: Mapping[str, Any]) -> str:
    """Mean ± sample standard deviation (runs) of each cell, in points, as Markdown.

    Where nothing was scored a cell has the loss of the held-out rows. The average of a variant is
    the mean of its cells; there is none while a cell is empty, or of scores and losses together.
    """
    datasets, runs = figures["datasets"], figures["runs"]
    header = ["variant", *(_title(figures, name) for name in datasets), "average", "wall time"]
    lines = []
    for variant in figures["variants"]:
        cells = [_shown(figures, variant, dataset) for dataset in datasets]
        took = _wall_seconds([row for row in runs if row["variant"] == variant])
        lines.append([variant, *map(_cell, cells), _average(cells), _clock(took)])
    ended = [row for row in runs if "failed" not in row]
    below = (
        f"{_unit(figures)}: mean ± sample standard deviation (runs); {len(ended)} runs took "
        f"{_clock(figures['wall_seconds'])} in all; {figures['device']}, "
        f"jax {figures['versions']['jax']}"
    )
    failed = diverged(figures)
    last = [f"diverged: {', '.join(failed)}"] if failed else []
    return "\n".join([*markdown(header, lines), "", below, *last])


def _unit(figures: Mapping[str, Any]) -> str:
    """What the numbers of a table are."""
    words = {2: "points", 4: "validation loss"}
    digits = {found.digits for row in figures["runs"] if (found := figure_of(row)) is not None}
    return " or ".join(words[one] for one in sorted(digits)) or words[2]


def _title(figures: Mapping[str, Any], dataset: str) -> str:
    """A data set with its main figure, where a run of it has one."""
    found = (figure_of(row) for row in figures["runs"] if row["dataset"] == dataset)
    shown = next(filter(None, found), None)
    return dataset if shown is None else f"{dataset} ({shown.name.replace('_', ' ')})"


def _cell(cell: Sequence[Shown]) -> str:
    if not cell:
        return "–"
    points, digits = [shown.value for shown in cell], cell[0].digits
    deviation = _deviation(points)
    spread = "" if deviation is None else f" ± {deviation:.{digits}f}"
    return f"{statistics.mean(points):.{digits}f}{spread} ({len(points)})"


def _average(cells: Sequence[Sequence[Shown]]) -> str:
    """The mean of the cells of a variant."""
    digits = {cell[0].digits for cell in cells if cell}
    if not all(cells) or len(digits) > 1:
        return "–"
    means = [statistics.mean(shown.value for shown in cell) for cell in cells]
    return f"{statistics.mean(means):.{digits.pop()}f}"


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
        axis.set_ylabel(f"{_unit(figures)}: mean, sample standard deviation")
        axis.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper center", ncols=len(variants), fontsize=8)
        return figure

    return save_picture(path, paint)
