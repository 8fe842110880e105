"""A plan as tables of bytes, times and collectives, and as a picture."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from balora_jax.config import RunConfig
from balora_jax.io.drawing import save_picture
from balora_jax.io.tables import markdown
from balora_jax.tasks import assemble

KINDS = {
    "frozen": "frozen weights",
    "adapters": "adapters",
    "origin": "origin",
    "optimizer": "optimizer",
    "batch": "batch",
    "head_factor": "head factor",
    "teacher": "teacher (the start)",
    "padding": "padding",
    "head": "head (estimate)",
    "activations": "activations and other temporaries",
    "output": "outputs",
}
"""Kinds of bytes in the order of the tables, with their titles."""


def text(figures: Mapping[str, Any], config: RunConfig) -> str:
    """Everything that ``balora plan`` prints."""
    rows = figures["rows"]
    parts = [_title(figures), *_numbered(rows), "", *_bytes_table(rows), "", *_speed_table(rows)]
    if rows[0]["collectives"]:
        parts += ["", "collectives of plan 1, per step and device:", ""]
        parts += _collectives_table(rows[0], figures["target"])
    return "\n".join([*parts, "", *_remarks(figures, config)])


def _title(figures: Mapping[str, Any]) -> str:
    target, first = figures["target"], figures["rows"][0]
    memory = "memory unknown" if target["memory"] is None else f"{_size(target['memory'])} each"
    hosts = "" if target["hosts"] is None else f", {target['hosts']} host(s)"
    hosts += f", {target['slices']} slices" if target["slices"] > 1 else ""
    lines = [
        f"{figures['model']}: {first['parameters']:,} parameters, {first['trainable']:,} trainable "
        f"(r = {figures['rank']}), {figures['dtype']}",
        f"{target['name']}: {target['devices']} x {target['kind']}, {memory}{hosts}; jax "
        f"{figures['versions']['jax']}",
    ]
    lines += [f"note: {note}." for note in target["notes"]]
    return "\n".join([*lines, ""])


def _numbered(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    length = rows[0]["batch"][2]
    names = (f"plan {i}: {row['case']}" for i, row in enumerate(rows, start=1))
    return [f"{name}, {length} tokens a row" for name in names]


def _bytes_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Bytes of one device: kinds down, plans across."""
    header = ["bytes per device", *(f"plan {i}" for i in range(1, len(rows) + 1))]
    cells = []
    for kind, title in KINDS.items():
        found = [row["bytes_by_kind"].get(kind) for row in rows]
        if any(size is not None for size in found):
            cells.append([title, *("–" if size is None else _size(size) for size in found)])
    totals = [row["bytes_per_device"] for row in rows]
    cells.append(["total", *("–" if size is None else _size(size["total"]) for size in totals)])
    cells.append(["fits", *(_verdict(row) for row in rows)])
    return markdown(header, cells)


def _verdict(row: Mapping[str, Any]) -> str:
    if row["does_not_fit"] is not None:
        return f"no: {row['does_not_fit']}"
    if row["fits"] is None:
        return "not known"
    return f"yes, {_size(row['spare'])} left" if row["fits"] else f"no, {_size(-row['spare'])} over"


_SPEED = (
    "plan", "model TFLOP", "per device", "recomputed", "memory GB", "links GB", "compute ms",
    "memory ms", "links ms", "bound ms", "apart ms", "tokens/s", "compile s",
)  # fmt: skip


def _speed_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return markdown(_SPEED, [_speed_cells(i, row) for i, row in enumerate(rows, start=1)])


def _speed_cells(number: int, row: Mapping[str, Any]) -> list[str]:
    devices, seconds = row["devices"], row["seconds"]
    moved = [None, None]
    if row["sent"] is not None:
        moved = [row["traffic"], row["sent"]["bytes"]]
    times = ["–"] * 5
    if seconds is not None:
        names = ("compute", "memory", "links", "bound", "apart")
        times = [f"{1e3 * seconds[name]:.1f}" for name in names]
    speed = row["tokens_per_second"]
    return [
        str(number),
        f"{row['model_flops'] / 1e12:.4g}",
        f"{row['flops_per_device'] / 1e12:.4g}",
        f"{row['recomputed_flops'] / devices / 1e12:.4g}",
        *("–" if size is None else f"{size / 1e9:.4g}" for size in moved),
        *times,
        "–" if speed is None else f"{speed:,.0f}",
        f"{row['compile_seconds']:.0f}",
    ]


def _collectives_table(row: Mapping[str, Any], target: Mapping[str, Any]) -> list[str]:
    """What is exchanged; the bytes between hosts, or slices, where there are some."""
    found = row["collectives"]
    sizes = {"bytes": "MB"}
    if any(one["between_hosts"] for one in found):
        sizes["between_hosts"] = f"MB to other {'slices' if target['slices'] > 1 else 'hosts'}"
    cells = [
        [one["kind"], " x ".join(one["axes"]) or "other", f"{one['count']:,}",
         *(f"{one[key] / 1e6:,.2f}" for key in sizes)]
        for one in found
    ]  # fmt: skip
    return markdown(("collective", "axes", "count", *sizes.values()), cells)


def _remarks(figures: Mapping[str, Any], config: RunConfig) -> list[str]:
    share = figures["utilisation"]
    lines = [
        "FLOPs are the model's; recomputed are those of remat, per device. compute = (model + "
        "recomputed) / devices / peak, memory = bytes read and written / bandwidth, links = bytes "
        "sent / links of a chip, or those between GPU hosts or TPU slices / network where that is "
        "more; bound = their maximum, apart = their sum. tokens/s at "
        f"utilisation {share:g}: products at {share:.0%} of the peak, or memory or links where "
        "they are slower.",
    ]
    loops = figures["rows"][0]["open_loops"]
    if loops:
        lines.append(
            f"note: {loops} loops of plan 1 run as long as the data want; bytes count them once."
        )
    if not figures["ranked"]:
        return lines
    if figures["best"] is None:
        return [*lines, "", "none of the compiled plans fits."]
    lines += ["", f"best: --set {figures['best']}"]
    chosen = figures["rows"][0]["accumulation"]
    active = assemble.objective_of(config.regularizers).active
    coupled = [one.term.name for one in active if one.term.couples_rows]
    if coupled and chosen != config.training.accumulation:
        lines.append(
            f"note: the {' and the '.join(coupled)} term is a statistic of each micro-batch; "
            "another accumulation is another term."
        )
    return lines


def _size(size: float) -> str:
    """Bytes for people.

    >>> _size(3 * 2**30), _size(1536), _size(7)
    ('3.00 GiB', '1.5 KiB', '7 B')
    """
    for unit, factor, form in (("GiB", 2**30, ".2f"), ("MiB", 2**20, ".1f"), ("KiB", 2**10, ".1f")):
        if size >= factor:
            return f"{size / factor:{form}} {unit}"
    return f"{size:.0f} B"


def needed(row: Mapping[str, Any]) -> float:
    """GiB that the compiler asked for where it refused a step; else 0.

    >>> needed({"does_not_fit": "23.5G of 15.75G"}), needed({"does_not_fit": None})
    (23.5, 0.0)
    """
    found = re.match(r"([\d.]+)([KMGT])", row["does_not_fit"] or "")
    return 0.0 if found is None else float(found[1]) * 2.0 ** (10 * "KMGT".index(found[2]) - 20)


def draw(figures: Mapping[str, Any], path: Path) -> bool:
    """Bytes of each plan by kind as stacked bars in a PNG, with a line at the device's memory.

    Returns:
        Whether it was drawn.
    """

    def paint(subplots: Any) -> Any:
        rows = list(reversed(figures["rows"]))
        names = [row["case"].replace(", ", "\n", 1) for row in rows]
        figure, axis = subplots(figsize=(10, 0.7 * len(rows) + 1.6))
        left = [0.0] * len(rows)
        for number, (kind, title) in enumerate(KINDS.items()):
            sizes = [row["bytes_by_kind"].get(kind, 0) / 2**30 for row in rows]
            axis.barh(names, sizes, left=left, label=title, color=f"C{number}")
            left = [a + b for a, b in zip(left, sizes, strict=True)]
        rest = [max(needed(row) - place, 0.0) for row, place in zip(rows, left, strict=True)]
        if any(rest):
            title = "the rest of a step that was refused"
            grey = {"color": "none", "edgecolor": "grey", "hatch": "///"}
            axis.barh(names, rest, left=left, label=title, **grey)
            left = [a + b for a, b in zip(left, rest, strict=True)]
        limit = figures["target"]["memory"]
        if limit is not None:
            axis.axvline(limit / 2**30, color="black", linestyle="--", label="memory of a device")
        for place, row in enumerate(rows):
            axis.text(left[place], place, f"  {_verdict(row)}", va="center", fontsize=8)
        title = f"{figures['model']} on {figures['target']['name']}, GiB per device"
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        figure.legend(fontsize=7, ncols=4, loc="outside lower center")
        return figure

    return save_picture(path, paint)
