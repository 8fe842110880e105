"""``balora bench``: measure the cases of a config, beside the torch reference if asked."""

import contextlib
import math
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from balora_jax.bench import ahead, measure, report, workload
from balora_jax.bench.measure import Measured, OurStep
from balora_jax.bench.workload import Case, Weights
from balora_jax.config import RunConfig
from balora_jax.errors import InputError
from balora_jax.io import metrics
from balora_jax.io.base import Base
from balora_jax.training import assemble
from balora_jax.training.assemble import Program

TORCH_CASES = ("LoRA", "BA-LoRA")
COMPARED_STEPS = 10


def bench(
    config: RunConfig,
    *,
    rounds: int = 5,
    cases: Sequence[str] = (),
    against_torch: bool = False,
    topology: str | None = None,
    picture: Path | None = None,
) -> dict[str, Any]:
    """Measure the steps of a config; print the table and return its figures.

    Args:
        config: of a run; its model folder may hold a ``config.json`` alone.
        rounds: counted steps of each case, after two that are not.
        cases: names of :data:`workload.CASES`; all of them if empty.
        against_torch: run the torch reference for LoRA and BA-LoRA in turn with ours.
        topology: compile for this TPU slice instead of measuring here.
        picture: PNG of time and memory of each case.

    Raises:
        InputError: an unknown case, or a setting that does not fit.
    """
    known = [case.name for case in workload.CASES]
    for name in cases:
        if name not in known:
            raise InputError(
                f"--case: expected one of {', '.join(known)}, got {name!r}. Choose among them."
            )
    figures: dict[str, Any] = {"versions": metrics.versions()}
    if topology is not None:
        figures |= {"topology": topology, "rows": ahead.compiled_for(topology, config, cases)}
        print(report.ahead_table(figures))
        return figures
    figures |= {"machine": _machine()} | _measured(config, rounds, cases, against_torch)
    print(report.table(figures))
    if picture is not None and report.draw(figures, picture):
        print(f"picture: {picture}")
    return figures


def _measured(
    config: RunConfig, rounds: int, names: Sequence[str], against_torch: bool
) -> dict[str, Any]:
    if against_torch:
        names = [*names, *(name for name in TORCH_CASES if names and name not in names)]
        rounds = max(rounds, COMPARED_STEPS - 2)
    base, weights = workload.weights_of(config)
    chosen = workload.cases_named(names)
    programs = {case.name: _program(config, case, base) for case in chosen}
    with contextlib.ExitStack() as stack, tqdm(total=1, unit="step") as bar:
        named: dict[str, Any] = {}
        for name, program in programs.items():
            bar.set_description_str(f"compiling: {name}")
            loaded = workload.loaded_for(program, weights)
            named[name] = OurStep(program, loaded, weights.batch)
            if against_torch and name in TORCH_CASES:
                # Asked for after the compilation, so that its start does not compete with it.
                named[f"torch {name}"] = _torch_step(stack, program, base, weights, name)
        found = measure.alternate(named, rounds, bar.set_description_str)
    counted = int(weights.batch["loss_mask"][..., 1:].sum())
    shape = weights.batch["input_ids"].shape
    rows = [
        _row(name, seen, programs.get(name.removeprefix("torch ")), found, shape, counted)
        for name, seen in found.items()
    ]
    return {
        "model": config.model.name_or_path,
        "weights": "random" if weights.random else "of the checkpoint",
        "dtype": config.model.dtype,
        "remat": config.model.remat,
        "rank": config.adapter.rank,
        "batch": list(shape),
        "counted_tokens": counted,
        "rounds": rounds,
        "rows": rows,
    }


def _program(config: RunConfig, case: Case, base: Base) -> Program:
    return assemble.program_of(workload.configured(config, case), base.config)[0]


def _torch_step(
    stack: contextlib.ExitStack, program: Program, base: Base, weights: Weights, name: str
) -> Any:
    from balora_jax.bench.against import torch_trainer

    root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="balora_bench_")))
    loaded = workload.loaded_for(program, weights)
    threads = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    trainer = torch_trainer(root / name, program, base, weights, loaded, threads)
    return stack.enter_context(trainer).step


def _row(
    name: str,
    seen: Measured,
    program: Program | None,
    found: dict[str, Measured],
    shape: Sequence[int],
    counted: int,
) -> dict[str, Any]:
    """Figures of one case; ratios to LoRA, and to the reference's same case, within rounds."""
    assert program is not None
    tokens = math.prod(shape)
    flops = workload.model_flops(program, shape, counted)
    peak = measure.peak_flops(jax.devices()[0].device_kind)
    row: dict[str, Any] = {
        "case": name,
        "seconds": seen.median,
        "seconds_min": min(seen.seconds),
        "seconds_max": max(seen.seconds),
        "tokens_per_second": tokens / seen.median,
        "model_flops": flops,
        "mfu": None if peak is None else flops / seen.median / peak / program.mesh.size,
        "memory": seen.memory,
        "rss_growth": seen.rss_growth,
        "device_peak": seen.device_peak,
        "compile_seconds": seen.compile_seconds,
        "losses": seen.losses[:COMPARED_STEPS],
    }
    for other, key in (("LoRA", "over_lora"), (f"torch {name}", "over_torch")):
        if other in found and other != name:
            row[key] = measure.ratio(seen, found[other])
    if f"torch {name}" in found:
        pairs = zip(seen.losses[:COMPARED_STEPS], found[f"torch {name}"].losses, strict=False)
        row["largest_loss_difference"] = max(abs(a - b) for a, b in pairs)
    return row


def _machine() -> dict[str, Any]:
    return {
        "device": metrics.device_description(),
        "processor": _processor(),
        "threads": os.cpu_count(),
    }


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
