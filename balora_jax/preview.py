"""``balora check``: everything up to the first step of a run, without its weights."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from balora_jax.config import RunConfig
from balora_jax.config_file import parse_config
from balora_jax.data.layout import Shape, in_words
from balora_jax.finetune import describe
from balora_jax.io.drawing import check_picture, save_picture
from balora_jax.parallel import hosts
from balora_jax.plan.run import plan
from balora_jax.tasks.registry import TASKS
from balora_jax.training.endings import reading
from balora_jax.training.loop import total_steps
from balora_jax.training.run import Run

MOST_BINS = 16
"""Lines of the histogram of lengths."""


def preview(
    config: RunConfig, *, memory: bool = True, picture: Path | None = None
) -> dict[str, Any]:
    """Read the rows as training reads them; print what would be trained, and return the figures.

    Args:
        config: of a run.
        memory: compile the step for the devices here, and say what it needs (``task: text``).
        picture: PNG of the lengths.

    Returns:
        ``rows`` (what became of them), ``lengths`` (least, median, mean, 95th percentile, most),
        ``histogram`` (``edges``, ``counts``), ``row_length`` of a row with one example, ``fill``
        (share of the computed places that hold a token), ``shapes`` (rows and length of the
        micro-batches of an epoch), ``steps_per_epoch``, ``steps``, ``epochs``, ``trainable`` and
        ``total`` parameters; with ``memory`` the figures of ``balora plan`` for the largest shape.

    Raises:
        InputError: whatever a run would refuse before its first step.
    """
    check_picture(picture)
    with reading():
        run = TASKS[config.task].check(config)
    figures = figures_of(run)
    describe(run)
    hosts.say(*lines(figures))
    if picture is not None and _draw(figures, picture):
        hosts.say(f"picture: {picture}")
    if memory and TASKS[config.task].model == "decoder":
        hosts.say("", "memory and speed of a step:")
        figures["plan"] = plan(_with_shape(config, Shape(*figures["shapes"][-1])))
    return figures


def _with_shape(config: RunConfig, shape: Shape) -> RunConfig:
    """The config whose micro-batches are as large as those of the run: most are below the limit."""
    tree = config.model_dump(mode="json")
    tree["data"]["max_length"] = shape.length
    tree["training"]["batch_size"] = shape.rows * config.training.accumulation
    return parse_config(tree, "check")


def figures_of(run: Run) -> dict[str, Any]:
    """Counts and lengths of a checked run; see :func:`preview`."""
    training, lengths = run.config.training, run.lengths
    epoch = run.batches().epoch()
    steps = total_steps(training, lambda: epoch.batches)
    edges = bin_edges(int(lengths.min()), int(lengths.max()))
    counts, _ = np.histogram(lengths, edges)
    return {
        "rows": vars(run.report),
        "lengths": {
            "least": int(lengths.min()),
            "median": float(np.median(lengths)),
            "mean": float(lengths.mean()),
            "p95": float(np.quantile(lengths, 0.95)),
            "most": int(lengths.max()),
        },
        "histogram": {"edges": edges, "counts": counts.tolist()},
        "row_length": run.length,
        "fill": epoch.fill,
        "shapes": [list(shape) for shape in epoch.shapes],
        "steps_per_epoch": epoch.batches,
        "steps": steps,
        "epochs": steps / epoch.batches,
        "trainable": run.trainable,
        "total": run.total,
    }


def bin_edges(shortest: int, longest: int) -> list[int]:
    """Edges of equal bins, of a round width, that hold the lengths between two.

    >>> bin_edges(41, 78)
    [40, 45, 50, 55, 60, 65, 70, 75, 80]
    """
    widths = (factor * 10**power for power in range(9) for factor in (1, 2, 5))
    width = next(one for one in widths if longest // one - shortest // one < MOST_BINS)
    return list(range(shortest // width * width, longest + width + 1, width))


def lines(figures: dict[str, Any]) -> list[str]:
    """The figures for people, with the histogram."""
    lengths, edges = figures["lengths"], figures["histogram"]["edges"]
    return [
        f"lengths: {lengths['least']} to {lengths['most']} tokens, median {lengths['median']:g}, "
        f"mean {lengths['mean']:.1f}, 95 % at most {lengths['p95']:g}",
        *bars(edges, figures["histogram"]["counts"]),
        f"fill: {100 * figures['fill']:.1f} % of the places of an epoch hold a token "
        f"({in_words([Shape(*shape) for shape in figures['shapes']])})",
        f"steps: {figures['steps']}, {figures['steps_per_epoch']} an epoch, "
        f"{figures['epochs']:.2f} epochs",
    ]


def bars(edges: Sequence[int], counts: Sequence[int]) -> list[str]:
    """A histogram of text, as wide as the terminal.

    >>> bars([0, 10, 20], [4, 0])[1].split()
    ['10', 'to', '19', '0']
    """
    widest = max(shutil.get_terminal_size((72, 24)).columns - 28, 10)
    scale = min(widest, 40) / max(counts)
    return [
        f"{first:>7} to {after - 1:<6} {count:>9} {'#' * math.ceil(count * scale)}"
        for first, after, count in zip(edges, edges[1:], counts, strict=False)
    ]


def _draw(figures: dict[str, Any], picture: Path) -> bool:
    edges, counts = figures["histogram"]["edges"], figures["histogram"]["counts"]

    def paint(subplots: Any) -> Any:
        figure, axis = subplots(figsize=(6, 3.5))
        axis.bar(edges[:-1], counts, width=np.diff(edges), align="edge", edgecolor="white")
        axis.axvline(figures["row_length"], color="black", linewidth=1, linestyle="--")
        axis.set_xlabel("tokens of an example (dashed: a row)")
        axis.set_ylabel("examples")
        return figure

    return save_picture(picture, paint)
