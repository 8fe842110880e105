"""The figures of a benchmark as a Markdown table and a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from balora_jax.io.drawing import save_picture
from balora_jax.io.tables import markdown

MIB = 2**20


def tables(figures: Mapping[str, Any]) -> str:
    """A Markdown table for each setting, with what it was measured on above."""
    machine = figures["machine"]
    versions = f"jax {figures['versions']['jax']}"
    told = (
        f"{machine['device']}, {machine['processor']}, {machine['threads']} threads; a large "
        f"product runs at {machine['product_rate'] / 1e9:,.0f} GFLOP/s; {versions}"
    )
    return "\n\n".join(table(one, told, machine["product_rate"]) for one in figures["tables"])


def table(figures: Mapping[str, Any], machine: str, product_rate: float) -> str:
    """The measured cases of a setting as Markdown.

    Args:
        figures: of the setting.
        machine: a line about the machine.
        product_rate: operations per second of a large product on a device, as measured.
    """
    batches = ", ".join(" x ".join(map(str, shape)) for shape in figures["batches"])
    lines = [
        f"{figures['model']} ({figures['weights']} weights, {figures['dtype']}, remat "
        f"{figures['remat']}), r = {figures['rank']}, batch {batches}, "
        f"{figures['counted_tokens']:.0f} tokens counted, fill {figures['fill']:.2f}",
        machine,
        f"median of {figures['rounds']} rounds taken in turn",
        *_torch_line(figures["torch"]),
        "",
        *markdown(_HEADER, [_cells(row, product_rate) for row in figures["rows"]]),
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


def _torch_line(setup: Mapping[str, Any] | None) -> list[str]:
    """What the reference ran with; nothing where it did not run."""
    if setup is None:
        return []
    path = "without MKL" if setup["mkl"] is None else f"MKL for {setup['mkl']} processors"
    path += ", asked for its fast path" if setup["asked"] else ""
    rate = setup["product_rate"] / 1e9
    return [f"torch {setup['versions']['torch']}, {path}: a large product at {rate:,.0f} GFLOP/s"]


_HEADER = (
    "case", "s/step", "min-max", "over LoRA", "over PiSSA", "over torch", "tokens/s", "TFLOP/s",
    "of a product", "MFU", "step memory MiB", "RSS growth MiB", "compile s",
)  # fmt: skip


def _cells(row: Mapping[str, Any], product_rate: float) -> list[str]:
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
        f"{row['flops_per_device_second'] / product_rate:.0%}",
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

    def paint(subplots: Any) -> Any:
        rows = list(reversed(figures["rows"]))
        names = [row["case"] for row in rows]
        seconds = [row["seconds"] for row in rows]
        memory = [_step_mebibytes(row) for row in rows]
        figure, (left, right) = subplots(1, 2, figsize=(10, 0.45 * len(rows) + 1.2), sharey=True)
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
