"""Two finished runs compared to the last bit, and where they part."""

import json
import math
import re

import numpy as np
from safetensors.numpy import load_file

# What a row cannot lack, whatever else it gains or loses.
ALWAYS = ("step", "loss", "task_loss", "grad_norm", "learning_rate")
# What the clock, the machine or the place of a tree decides.
ELSEWHERE = ("wall_seconds", "peak_memory_bytes", "versions", "device", "base_model_name_or_path")
ANSWER = re.compile(r"^(\w+): .*first answer: (.*) \(right: ", flags=re.MULTILINE)


def is_time(column):
    return column == "mfu" or column.endswith(("seconds", "per_second"))


def relative(one, other):
    """Difference of two values as a share of the larger; infinite where they are no numbers."""
    if one == other:
        return 0.0
    if not all(isinstance(value, int | float) for value in (one, other)):
        return math.inf
    return abs(one - other) / max(abs(one), abs(other))


def compare_rows(older, newer):
    """Rows of ``metrics.jsonl``, one by one, by the columns that both have."""
    first, largest, new, gone = None, {}, set(), set()
    for before, after in zip(older, newer, strict=False):
        new, gone = new | (after.keys() - before.keys()), gone | (before.keys() - after.keys())
        for name in (name for name in before if name in after and not is_time(name)):
            share = relative(before[name], after[name])
            if share > 0:
                largest[name] = max(share, largest.get(name, 0.0))
                first = first or (before["step"], name, before[name], after[name])
    if len(older) != len(newer):
        first = first or ("the end", "rows", len(older), len(newer))
    lacking = [name for name in ALWAYS if name in gone]
    if lacking:
        first = first or ("the start", lacking[0], "there", "gone")
    columns = {name for row in older for name in row if not is_time(name)} - gone
    counts = {"rows": len(newer), "columns": len(columns)}
    return {**counts, "first": first, "largest": largest, "new": sorted(new), "gone": sorted(gone)}


def compare_tensors(older, newer):
    """Tensors by name, bit by bit; a difference is a share of its tensor's largest number."""
    shares = {}
    for name in sorted(older.keys() | newer.keys()):
        one, other = older.get(name), newer.get(name)
        if one is None or other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
            shares[name] = math.inf
        elif one.tobytes() != other.tobytes():
            wide = one.astype(np.float64), other.astype(np.float64)
            shares[name] = float(np.abs(wide[0] - wide[1]).max() / (np.abs(wide[0]).max() or 1.0))
    return {"tensors": len(newer), "differing": shares}


def leaves(tree, path=""):
    """Key path → value, without what the clock or the machine decides."""
    if not isinstance(tree, dict):
        return {path: tree}
    found = {}
    for name, value in tree.items():
        if name not in ELSEWHERE:
            found |= leaves(value, f"{path}.{name}" if path else name)
    return found


def compare_figures(older, newer):
    """Values of nested mappings, by the keys that both have."""
    older, newer = leaves(older), leaves(newer)
    both = [name for name in older if name in newer]
    return {
        "figures": len(both),
        "differing": {n: [older[n], newer[n]] for n in both if older[n] != newer[n]},
        "new": sorted(newer.keys() - older.keys()),
        "gone": sorted(older.keys() - newer.keys()),
    }


def results(workdir):
    """Rows, tensors and figures that a run left; ``log.txt`` is what it printed."""
    lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    tensors = {
        f"{file.name}/{name}": value
        for file in sorted((workdir / "adapter").glob("*.safetensors"))
        for name, value in load_file(file).items()
    }
    figures = {
        "summary": json.loads((workdir / "summary.json").read_text(encoding="utf-8")),
        "adapter": json.loads((workdir / "adapter" / "adapter_config.json").read_text("utf-8")),
        "first answer": dict(ANSWER.findall((workdir / "log.txt").read_text(encoding="utf-8"))),
    }
    return [json.loads(line) for line in lines], tensors, figures


def compare(older, newer):
    """All that two finished runs left, and whether it is the same."""
    one, other = results(older), results(newer)
    rows, tensors = compare_rows(one[0], other[0]), compare_tensors(one[1], other[1])
    figures = compare_figures(one[2], other[2])
    moved = any((rows["first"], tensors["differing"], figures["differing"]))
    state = "differs" if moved else "equal"
    return {"state": state, "metrics": rows, "adapter": tensors, "figures": figures}


def sentence(found):
    """What a case came to, in one line."""
    if found["state"] == "failed":
        return f"FAILED: {found['why']}"
    rows, tensors, figures = found["metrics"], found["adapter"], found["figures"]
    said = []
    if found["state"] == "equal":
        said.append(
            f"equal: {rows['rows']} rows of {rows['columns']} columns, {tensors['tensors']} "
            f"tensors, {figures['figures']} figures"
        )
    if rows["first"]:
        step, name, before, after = rows["first"]
        said.append(f"DIFFERS from step {step}, {name}: {before} -> {after}")
    if rows["largest"]:
        shares = ", ".join(f"{name} {share:.1e}" for name, share in rows["largest"].items())
        said.append(f"largest relative differences: {shares}")
    if shares := tensors["differing"]:
        where = max(shares, key=lambda name: shares[name])
        said.append(
            f"ADAPTER DIFFERS in {len(shares)} of {tensors['tensors']} tensors, by at most "
            f"{shares[where]:.1e} of the largest number, in {where}"
        )
    said += [f"{name} DIFFERS: {a!r} -> {b!r}" for name, (a, b) in figures["differing"].items()]
    for part, title in ((rows, "columns"), (figures, "figures")):
        said += [f"{k} {title}: {', '.join(part[k])}" for k in ("new", "gone") if part[k]]
    return "; ".join(said)
