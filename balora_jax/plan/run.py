"""``balora plan``: the memory, the speed and the traffic of a run."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from balora_jax import hardware
from balora_jax.config import RunConfig
from balora_jax.config_file import parse_config
from balora_jax.errors import InputError
from balora_jax.io.drawing import check_picture
from balora_jax.parallel import sharding
from balora_jax.plan import ahead, arguments, search
from balora_jax.plan import report as plan_report
from balora_jax.plan.ahead import Compile
from balora_jax.plan.targets import Target, parse_target
from balora_jax.progress import progress_bar
from balora_jax.tasks.registry import TASKS

Row = dict[str, Any]


def plan(
    config: RunConfig,
    *,
    topology: str = "auto",
    mesh: str | None = None,
    head: str | None = None,
    candidates: int = 8,
    utilisation: float = 0.4,
    picture: Path | None = None,
) -> dict[str, Any]:
    """Compile the training step of a config for devices; print what it needs and return it.

    Args:
        config: of a run; its model folder may hold a ``config.json`` alone.
        topology: the devices, see :func:`devices.parse_target`.
        mesh: ``auto`` to search, or sizes such as ``data=1,fsdp=16``, the others 1; the config's
            where not given.
        head: ``training.head`` instead of the config's.
        candidates: most layouts that a search compiles.
        utilisation: share of the peak that the products reach, for the expected speed.
        picture: PNG of the bytes of every plan.

    Raises:
        InputError: a setting that does not fit, or no compiler for the devices.
    """
    check_picture(picture)
    _check(config, candidates, utilisation)
    target = parse_target(topology)
    if head is not None:
        config = _with(config, {"training": {"head": head}})
    if mesh is not None and mesh != "auto":
        config = _with(config, {"mesh": mesh_sizes(mesh)})
    config = search.default_head_memory(ahead.without_libraries(config, target), target)
    with ahead.compiler(target) as compile_one:
        if mesh == "auto":
            rows = _searched(config, target, compile_one, candidates)
        else:
            rows = [compile_one(config, layout_name(config), head_alone=True)]
    if target.stands_in:
        rows = [row | search.least_moved(row, config, target) for row in rows]
    rows = [judged(row, target, utilisation) for row in rows]
    figures = {
        "versions": hardware.versions(),
        "model": config.model.name_or_path,
        "dtype": config.model.dtype,
        "rank": config.adapter.rank,
        "target": target.summary,
        "utilisation": utilisation,
        "ranked": mesh == "auto",
        "rows": ranked(rows) if mesh == "auto" else rows,
    }
    figures["best"] = best_settings(figures["rows"]) if mesh == "auto" else None
    print(plan_report.text(figures, config))
    if picture is not None and plan_report.draw(figures, picture):
        print(f"picture: {picture}")
    return figures


def _check(config: RunConfig, candidates: int, utilisation: float) -> None:
    if TASKS[config.task].model == "encoder":
        raise InputError(
            f"plan: expected task text, got {config.task}. An encoder fits one device: measure it "
            "with balora bench."
        )
    if candidates < 1:
        raise InputError(f"--candidates: expected at least 1, got {candidates}. Raise it.")
    if not 0 < utilisation <= 1:
        raise InputError(
            f"--utilisation: expected a share above 0 and up to 1, got {utilisation}. Correct it."
        )


def mesh_sizes(text: str) -> dict[str, int]:
    """Size of every mesh axis; those not named are 1.

    Raises:
        InputError: an unknown axis or a size that is no number.

    >>> sizes = mesh_sizes("fsdp=16")
    >>> sizes["data"], sizes["fsdp"]
    (1, 16)
    """
    sizes: dict[str, int] = dict.fromkeys(sharding.AXES, 1)
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in sizes or not re.fullmatch(r"-?[0-9]{1,9}", size):
            raise InputError(
                f"--mesh: expected auto or sizes of {', '.join(sizes)}, such as data=1,fsdp=16, "
                f"got {text!r}. Correct it."
            )
        sizes[axis] = int(size)
    return sizes


def _with(config: RunConfig, changes: Mapping[str, Mapping[str, Any]]) -> RunConfig:
    tree = config.model_dump(mode="json")
    for section, values in changes.items():
        tree[section] |= values
    return parse_config(tree, "plan")


def layout_name(config: RunConfig) -> str:
    """Title of a plan: the mesh axes above 1, micro-batches, remat, head."""
    sizes = {axis: getattr(config.mesh, axis) for axis in sharding.AXES}
    axes = " ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1)
    training = config.training
    rows = training.batch_size // training.accumulation
    parts = f"{training.accumulation} x {rows} rows"
    return f"{axes or 'one device'}, {parts}, remat {config.model.remat}, {training.head} head"


def _searched(
    config: RunConfig, target: Target, compile_one: Compile, candidates: int
) -> list[Row]:
    """Compile promising layouts until the number is spent."""
    space = search.Space(config, arguments.opened_base(config.model).config, target)
    found: list[tuple[search.Layout, Row]] = []
    with progress_bar(total=candidates, unit="compilation", desc="plan") as bar:
        while len(found) < candidates:
            layout = space.next(found, candidates)
            if layout is None:
                break
            chosen = layout.applied(config)
            bar.set_postfix_str(layout_name(chosen))
            row = compile_one(chosen, layout_name(chosen), head_alone=True)
            found.append((layout, row | {"settings": layout.settings, "estimate": layout.memory}))
            bar.update()
    return [row for _, row in found]


def judged(row: Row, target: Target, utilisation: float) -> Row:
    """A row with its verdict: whether it fits, and how fast it could be.

    Seconds of a step have three lower bounds per device: ``compute`` = (model FLOPs + recomputed) /
    devices / peak, ``memory`` = traffic / bandwidth, ``links`` = bytes of collectives / link, or
    those between hosts / network where that is more. The step takes at least their maximum
    (``bound``, all at once) and, with nothing overlapped, their sum (``apart``). ``expected`` lets
    products reach a share of the peak: max(compute / share, memory, links).
    """
    memory = row["bytes_per_device"]
    fits = search.fits(row, target)
    spare = None if memory is None or target.memory is None else target.memory - memory["total"]
    row = row | {"fits": fits, "spare": spare, "memory_limit": target.memory}
    row["seconds"] = row["tokens_per_second"] = None
    if memory is None or target.peak is None or target.bandwidth is None or target.link is None:
        return row
    worked = (row["model_flops"] + row["recomputed_flops"]) / row["devices"]
    parts = {
        "compute": worked / target.peak,
        "memory": row["traffic"] / target.bandwidth,
        "links": search.link_seconds(row["sent"], target.link, target.network),
    }
    expected = max(parts["compute"] / utilisation, parts["memory"], parts["links"])
    tokens = row["batch"][0] * row["batch"][1] * row["batch"][2]
    bounds = {"bound": max(parts.values()), "apart": sum(parts.values()), "expected": expected}
    row["seconds"] = parts | bounds
    row["tokens_per_second"] = tokens / expected
    row["mfu"] = row["flops_per_device"] / expected / target.peak
    return row


def ranked(rows: list[Row]) -> list[Row]:
    """Those that fit first, by the bound of their step time; those of unknown need last."""
    return sorted(rows, key=lambda row: (row["fits"] is not True, *speed_key(row)))


def speed_key(row: Row) -> tuple[float, ...]:
    """What a ranking compares: the bound, then the sum; work and bytes where no speed is known."""
    if row["seconds"] is not None:
        return row["seconds"]["bound"], row["seconds"]["apart"]
    moved = 0 if row["sent"] is None else row["sent"]["bytes"]
    return row["model_flops"] + row["recomputed_flops"], moved, row["traffic"] or 0


def best_settings(rows: list[Row]) -> str | None:
    """The ``--set`` words of the first plan; None where none fits."""
    if not rows or not rows[0]["fits"]:
        return None
    return " ".join(f"{key}={value}" for key, value in rows[0]["settings"].items())
