"""The figures of a benchmark as a Markdown table and a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from balora_jax.io.drawing import save_picture
from balora_jax.io.tables import markdown

MIB = 2**20


def table(figures: Mapping[str, Any]) -> str:
    """The measured cases as Markdown, with what they were measured on above."""
    batch = " x ".join(map(str, figures["batch"]))
    machine = figures["machine"]
    lines = [
        f"{figures['model']} ({figures['weights']} weights, {figures['dtype']}, remat "
        f"{figures['remat']}), r = {figures['rank']}, batch {batch}, "
        f"{figures['counted_tokens']} tokens counted",
        f"{machine['device']}, {machine['processor']}, {machine['threads']} threads; median of "
        f"{figures['rounds']} steps taken in turn; jax {figures['versions']['jax']}",
        "",
        *markdown(_HEADER, [_cells(row) for row in figures["rows"]]),
    ]
    differences = [
        f"{row['case']} {row['largest_loss_difference']:.1e}"
        for row in figures["rows"]
        if "largest_loss_difference" in row
    ]
    if differences:
        lines += ["", "largest difference of the loss to torch over 10 steps: "
                  + ", ".join(differences)]  # fmt: skip
    return "\n".join(lines)


_HEADER = (
    "case", "s/step", "min-max", "over LoRA", "over PiSSA", "over torch", "tokens/s", "TFLOP/s",
    "MFU", "step memory MiB", "RSS growth MiB", "compile s",
)  # fmt: skip


def _cells(row: Mapping[str, Any]) -> list[str]:
    memory = row["memory"]
    step_memory = None if memory is None else memory["temporaries"] + memory["output"]
    return [
        row["case"],
        f"{row['seconds']:.3f}",
        f"{row['seconds_min']:.3f}-{row['seconds_max']:.3f}",
        _number(row.get("over_lora"), "{:.2f}"),
        _number(row.get("over_pissa"), "{:.2f}"),
        _number(row.get("over_torch"), "{:.2f}"),
        f"{row['tokens_per_second']:,.0f}",
        f"{row['model_flops'] / row['seconds'] / 1e12:.3f}",
        _number(row["mfu"], "{:.1%}"),
        _number(step_memory, "{:.0f}", MIB),
        _number(row["rss_growth"], "{:.0f}", MIB),
        _number(row["compile_seconds"], "{:.1f}"),
    ]


def _number(value: float | None, form: str, unit: float = 1) -> str:
    return "–" if value is None else form.format(value / unit)


def ahead_table(figures: Mapping[str, Any]) -> str:
    """Cases compiled for devices that are not here, as Markdown."""
    header = ("case", "arguments GiB", "temporaries GiB", "total GiB", "TFLOP", "compile s")
    rows = []
    for row in figures["rows"]:
        size = row["bytes_per_device"]
        if size is None:
            gib = ["–", "–", f"does not fit: {row['does_not_fit']}"]
        else:
            gib = [f"{size[part] / 2**30:.2f}" for part in ("arguments", "temporaries", "total")]
        flops = f"{row['flops_per_device'] / 1e12:.1f}"
        rows.append([row["case"], *gib, flops, f"{row['compile_seconds']:.0f}"])
    title = f"per device of {figures['topology']}, compiled ahead; jax {figures['versions']['jax']}"
    notes = [f"note: {note}." for note in figures["notes"]]
    return "\n".join([title, *notes, "", *markdown(header, rows)])


def draw(figures: Mapping[str, Any], path: Path) -> bool:
    """Time and memory of each case as bars in a PNG; whether it was drawn."""

    def paint(pyplot: Any) -> Any:
        rows = list(reversed(figures["rows"]))
        names = [row["case"] for row in rows]
        seconds = [row["seconds"] for row in rows]
        memory = [_step_mebibytes(row) for row in rows]
        figure, (left, right) = pyplot.subplots(
            1, 2, figsize=(10, 0.45 * len(rows) + 1.2), sharey=True, constrained_layout=True
        )
        colours = ["#b07a3f" if name.startswith("torch") else "#3f6fb0" for name in names]
        for axis, values, title, form in (
            (left, seconds, "seconds per step (median)", "%.2f"),
            (right, memory, "memory of a step, MiB", "%.0f"),
        ):
            axis.bar_label(axis.barh(names, values, color=colours), fmt=form, padding=3, fontsize=8)
            axis.set_title(title, fontsize=10)
            axis.margins(x=0.15)
            axis.spines[["top", "right"]].set_visible(False)
        return figure

    return save_picture(path, paint)


def _step_mebibytes(row: Mapping[str, Any]) -> float:
    """The compiler's count for ours; growth of the process for the reference."""
    if row["memory"] is not None:
        return (row["memory"]["temporaries"] + row["memory"]["output"]) / MIB
    return (row["device_peak"] or row["rss_growth"] or 0) / MIB
