"""The curves of a run: what its rows say over the steps, one panel for each kind of figure."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from balora_jax.io.metrics import LOSS, SCORE, VALIDATION, is_count
from balora_jax.numerics.objective import TASK
from balora_jax.numerics.terms import TERMS

Rows = Sequence[Mapping[str, Any]]
"""Rows of ``metrics.jsonl``: numbers by name; None is what was not finite."""

ACROSS = 3
"""Panels beside each other."""

MOST_POINTS = 1500
"""Points of a curve: of more rows, the smallest and the largest of each group are shown."""

FEW = 12
"""Rows that are shown by marks, without a smoothed line."""

WIDE = 8.0
"""Largest over smallest value from which on a panel of positive values has a logarithmic axis."""

STYLES = ("-", (0, (5, 4)), (0, (1.5, 3)), (0, (6, 3, 1.5, 3)))
"""Styles of lines that may lie on each other."""


class Panel(NamedTuple):
    """One picture among the curves.

    Attributes:
        title: above it.
        columns: of the rows, each a line; those that no row has are left out.
        noisy: whether a smoothed line leads through pale points.
        scale: of the axis: ``far`` may be logarithmic or cut, ``cut`` be cut.
        top: end of an axis that begins at 0; None for one by the values.
        named: whether a single line is named, as the title does not say which it is.
    """

    title: str
    columns: tuple[str, ...]
    noisy: bool = True
    scale: Literal["far", "cut", "plain"] = "far"
    top: float | None = None
    named: bool = False


def panels(rows: Rows) -> list[Panel]:
    """The panels that rows have something to show in, in their order."""
    names = dict.fromkeys(name for row in rows for name in row)
    held_out = tuple(name for name in names if name.startswith(VALIDATION))
    scores = tuple(
        name for name in names if name.startswith(SCORE) and not is_count(name.removeprefix(SCORE))
    )
    shares = tuple(f"gradient_share_{name}" for name in (TASK, *TERMS))
    weights = tuple(f"lambda{i}" for i, _ in enumerate(TERMS, start=1))
    found = [
        Panel("loss (nats per token)", (TASK, "loss", LOSS)),
        *(Panel(term.title, (term.name, VALIDATION + term.name)) for term in TERMS.values()),
        Panel("score", scores, noisy=False, scale="plain", named=True),
        Panel("weights λ", weights, noisy=False, scale="plain"),
        Panel("learning rate", ("learning_rate",), noisy=False, scale="plain"),
        Panel("gradient norm", ("grad_norm",)),
        Panel("share of the gradient", shares, scale="plain", top=1.02),
        Panel("tokens per second", ("tokens_per_second",), scale="cut"),
        Panel("fill: places with a token", ("fill",), scale="plain", top=1.02),
    ]
    shown = {name for panel in found for name in panel.columns}
    rest = tuple(name for name in held_out if name not in shown and "perplexity" not in name)
    found.insert(len(TERMS) + 1, Panel("held-out rows", rest, noisy=False, named=True))
    return [panel for panel in found if any(says(rows, name) for name in panel.columns)]


def says(rows: Rows, name: str) -> bool:
    """Whether a column has anything but 0, which a term has that is left out."""
    return any(row.get(name, 0) != 0 for row in rows if row["step"] or row.get(name))


def paint(rows: Rows, subplots: Callable[..., Any]) -> Any:
    """A figure of the curves.

    Args:
        rows: at least one.
        subplots: makes a figure and its axes.
    """
    shown = panels(rows)
    down = max(-(-len(shown) // ACROSS), 1)
    figure, axes = subplots(down, ACROSS, figsize=(4.2 * ACROSS, 2.9 * down), squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    steps = column(rows, "step")
    for axis, panel in zip(axes.flat, shown, strict=False):
        _paint(axis, panel, rows, steps)
    for axis in axes.flat[max(len(shown) - ACROSS, 0) : len(shown)]:
        axis.set_xlabel("optimizer step")
    return figure


def _paint(axis: Any, panel: Panel, rows: Rows, steps: np.ndarray) -> None:
    lines = {name: column(rows, name) for name in panel.columns if says(rows, name)}
    if "loss" in lines and TASK in lines and np.array_equal(lines["loss"], lines[TASK], True):
        del lines["loss"]  # no term is in it
    for number, (name, values) in enumerate(lines.items()):
        # A line below another is wider, and seen beside it.
        wide = 1.8 if len(lines) == 1 else 3.6 - 0.9 * min(number, 3)
        look = {"color": f"C{number}", "linestyle": STYLES[number % len(STYLES)]}
        if name.startswith(VALIDATION) or np.isfinite(values).sum() <= FEW:
            _marks(axis, steps, values, name, look | {"linewidth": 0.5 * wide})
        elif panel.noisy:
            _noisy(axis, steps, values, name, look)
        else:
            places = thinned(values)
            axis.plot(steps[places], values[places], label=name, linewidth=wide, **look)
    if panel.scale != "plain" and lines:
        _scale(axis, np.concatenate(list(lines.values())), may_be_log=panel.scale == "far")
    _mark_gaps(axis, steps, rows, lines)
    axis.set_title(panel.title, fontsize=10)
    axis.grid(alpha=0.3)
    axis.tick_params(labelsize=8, which="both")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.spines[["top", "right"]].set_visible(False)
    if panel.top is not None:
        axis.set_ylim(0, panel.top)
    if len(axis.get_legend_handles_labels()[0]) > 1 or panel.named:
        axis.legend(fontsize=7)


def _marks(
    axis: Any, steps: np.ndarray, values: np.ndarray, name: str, look: dict[str, Any]
) -> None:
    there = np.isfinite(values)
    look |= {"marker": "o", "markersize": 2 + 3 * look["linewidth"]}
    if name.startswith(VALIDATION):
        look |= {"color": "black", "linestyle": "-", "linewidth": 1, "marker": "D", "markersize": 4}
    axis.plot(steps[there], values[there], label=name, zorder=5, **look)


def _noisy(
    axis: Any, steps: np.ndarray, values: np.ndarray, name: str, look: Mapping[str, Any]
) -> None:
    """Pale points, or the band that very many of them fill, and a line through them."""
    places = thinned(values)
    pale = {"color": look["color"], "alpha": 0.25}
    if len(places) == len(values):
        axis.plot(steps, values, ".", markersize=2.5, **pale)
    else:
        axis.plot(steps[places], values[places], linewidth=0.6, **pale)
    soft = np.where(steps > 0, smoothed(values), math.nan)  # a row of step 0 is of no step
    places = thinned(soft)
    axis.plot(steps[places], soft[places], label=name, linewidth=1.8, **look)


def _scale(axis: Any, values: np.ndarray, *, may_be_log: bool) -> None:
    """A logarithmic axis where values are positive and far apart; else one without outliers."""
    values = values[np.isfinite(values)]
    if len(values) < 3 or np.ptp(values) <= 1e-6 * np.abs(values).max():
        return  # one value
    if may_be_log and values.min() > 0:
        if values.max() / values.min() >= WIDE:
            axis.set_yscale("log")
        return
    low, high = np.quantile(values, (0.25, 0.75))
    reach = 6 * max(high - low, 1e-12)
    low, high = max(values.min(), low - reach), min(values.max(), high + reach)
    outside = int(np.sum((values < low) | (values > high)))
    if outside and np.ptp(values) > 2 * (high - low) > 0:
        room = 0.05 * (high - low)
        axis.set_ylim(low - room, high + room)
        said = f"{outside} outside"
        axis.text(0.99, 0.02, said, transform=axis.transAxes, fontsize=7, ha="right", color="red")


def _mark_gaps(axis: Any, steps: np.ndarray, rows: Rows, names: Iterable[str]) -> None:
    """Crosses at the bottom where a figure was not finite."""
    lost = (row["step"] and any(row.get(name, 0) is None for name in names) for row in rows)
    places = [i for i, is_lost in enumerate(lost) if is_lost]  # no step was made before the first
    if not places:
        return
    places = places[:: -(-len(places) // MOST_POINTS)]
    axis.plot(
        steps[places],
        np.full(len(places), 0.015),
        "x",
        transform=axis.get_xaxis_transform(),
        color="red",
        markersize=4,
        label="not finite",
        clip_on=False,
    )


def column(rows: Rows, name: str) -> np.ndarray:
    """The values of a column, float64 [rows]; NaN where a row has none.

    >>> column([{"loss": 2}, {"loss": None}, {}], "loss")
    array([ 2., nan, nan])
    """
    found = (row.get(name) for row in rows)
    return np.array([math.nan if value is None else value for value in found], np.float64)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Means over a window of a twentieth of the values around each, float64 [rows].

    At the ends the window is what there is of it; values that are not finite are left out, and the
    mean of none is NaN.

    >>> smoothed(np.array([0.0, 3.0, 6.0]))
    array([1.5, 3. , 4.5])
    """
    reach = max(len(values) // 40, 1)
    there = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(there, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(there)])
    places = np.arange(len(values))
    low, high = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(values))
    count = counts[high] - counts[low]
    means = (sums[high] - sums[low]) / np.maximum(count, 1)
    return np.where(count > 0, means, math.nan)


def thinned(values: np.ndarray) -> np.ndarray:
    """Places of at most :data:`MOST_POINTS` values: all, or the extremes of each group of them.

    >>> thinned(np.array([1.0, 5.0, 2.0]))
    array([0, 1, 2])
    """
    if len(values) <= MOST_POINTS:
        return np.arange(len(values))
    size = -(-2 * len(values) // MOST_POINTS)
    places = []
    for begin in range(0, len(values), size):
        group = values[begin : begin + size]
        if np.isfinite(group).any():
            places += sorted({begin + int(np.nanargmin(group)), begin + int(np.nanargmax(group))})
        else:
            places.append(begin)
    return np.array(places)
