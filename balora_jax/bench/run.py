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

from balora_jax import hardware
from balora_jax.bench import labels, measure, report
from balora_jax.bench.cases import Case, cases_of, chosen, compiled_for, configured, text_cases
from balora_jax.bench.labels import LabelsCase
from balora_jax.bench.measure import Measured
from balora_jax.bench.weights import Weights, loaded_for, weights_of
from balora_jax.config import RunConfig
from balora_jax.errors import InputError
from balora_jax.io.drawing import check_picture
from balora_jax.plan.targets import parse_target
from balora_jax.pretrained.checkpoint import Base
from balora_jax.progress import Bar, progress_bar
from balora_jax.tasks import flops
from balora_jax.tasks.registry import TASKS
from balora_jax.tasks.text.program import TextProgram, text_program

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
        cases: names of cases; all of them if empty.
        against_torch: run the torch reference for LoRA and BA-LoRA in turn with ours.
        topology: compile for these devices, which need not be here, instead of measuring here.
        picture: PNG of time and memory of each case.

    Raises:
        InputError: no round, an unknown case, or a setting that does not fit.
    """
    check_picture(picture)
    if rounds < 1:
        raise InputError(f"--rounds: expected at least 1, got {rounds}. Raise it.")
    kind = TASKS[config.task].model
    todo = chosen(cases_of(kind), cases)
    if kind == "encoder" and (against_torch or topology is not None):
        raise InputError(
            f"bench: expected task text with --against or --topology, got {config.task}. Leave "
            "them out."
        )
    figures: dict[str, Any] = {"versions": hardware.versions()}
    if topology is not None:
        target = parse_target(topology)
        figures |= {"topology": topology, "notes": list(target.notes)}
        figures |= {"rows": compiled_for(target, config, todo)}
        print(report.ahead_table(figures))
        return figures
    figures |= {"machine": _machine()}
    if kind == "encoder":
        figures |= _measured_labels(config, rounds, todo)
    else:
        figures |= _measured(config, rounds, todo, against_torch)
    print(report.table(figures))
    if picture is not None and report.draw(figures, picture):
        print(f"picture: {picture}")
    return figures


def _measured(
    config: RunConfig, rounds: int, cases: Sequence[Case], against_torch: bool
) -> dict[str, Any]:
    if against_torch:
        names = [*(case.name for case in cases), *TORCH_CASES]
        cases = [case for case in text_cases() if case.name in names]
        rounds = max(rounds, COMPARED_STEPS - 2)
    base, weights = weights_of(config)
    programs = {case.name: _program(config, case, base) for case in cases}
    with contextlib.ExitStack() as stack, _shown() as bar:
        named: dict[str, Any] = {}
        for name, program in programs.items():
            bar.set_description_str(f"compiling: {name}")
            loaded = loaded_for(program, weights)
            named[name] = measure.text_step(program, loaded, weights.batch)
            if against_torch and name in TORCH_CASES:
                # Asked for after the compilation, so that its start does not compete with it.
                named[f"torch {name}"] = _torch_step(stack, program, base, weights, name)
        found = measure.alternate(named, rounds, bar.set_description_str)
    counted = int(weights.batch["loss_mask"][..., 1:].sum())
    shape = weights.batch["input_ids"].shape
    rows = []
    for name, seen in found.items():
        program = programs[name.removeprefix("torch ")]
        needed = flops.model_flops(program, shape, counted)
        rows.append(_row(name, seen, needed, found, math.prod(shape), program.mesh.size))
    drawn = "random" if weights.random else "of the checkpoint"
    return _setting(config, drawn, shape) | {
        "counted_tokens": counted,
        "rounds": rounds,
        "rows": rows,
    }


def _shown() -> Bar:
    """What is being compiled or measured, and since when."""
    return progress_bar(desc="bench", bar_format="{desc} [{elapsed}]")


def _measured_labels(config: RunConfig, rounds: int, cases: Sequence[Case]) -> dict[str, Any]:
    compiled: dict[str, LabelsCase] = {}
    with _shown() as bar:
        for case in cases:
            bar.set_description_str(f"compiling: {case.name}")
            compiled[case.name] = labels.compiled_case(config, case)
        named = {name: case.step for name, case in compiled.items()}
        found = measure.alternate(named, rounds, bar.set_description_str)
    shape = next(iter(compiled.values())).shape
    rows = [
        _row(name, seen, compiled[name].model_flops, found, math.prod(shape), jax.device_count())
        for name, seen in found.items()
    ]
    return _setting(config, "of the checkpoint", shape) | {
        "counted_tokens": shape[0] * shape[1],
        "rounds": rounds,
        "rows": rows,
    }


def _setting(config: RunConfig, weights: str, shape: Sequence[int]) -> dict[str, Any]:
    return {
        "model": config.model.name_or_path,
        "weights": weights,
        "dtype": config.model.dtype,
        "remat": config.model.remat,
        "rank": config.adapter.rank,
        "batch": list(shape),
    }


def _program(config: RunConfig, case: Case, base: Base) -> TextProgram:
    return text_program(configured(config, case), base.config)


def _torch_step(
    stack: contextlib.ExitStack, program: TextProgram, base: Base, weights: Weights, name: str
) -> Any:
    from balora_jax.bench.against import torch_trainer

    root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="balora_bench_")))
    loaded = loaded_for(program, weights)
    threads = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    trainer = torch_trainer(root / name, program, base, weights, loaded, threads)
    return stack.enter_context(trainer).step


def _row(
    name: str,
    seen: Measured,
    needed: float,
    found: dict[str, Measured],
    tokens: int,
    devices: int,
) -> dict[str, Any]:
    """Figures of one case; ratios to others, and to the reference's same case, within rounds."""
    peak = hardware.peak_flops(jax.devices()[0].device_kind)
    row: dict[str, Any] = {
        "case": name,
        "seconds": seen.median,
        "seconds_min": min(seen.seconds),
        "seconds_max": max(seen.seconds),
        "tokens_per_second": tokens / seen.median,
        "model_flops": needed,
        "mfu": None if peak is None else needed / seen.median / peak / devices,
        "memory": seen.memory,
        "rss_growth": seen.rss_growth,
        "device_peak": seen.device_peak,
        "compile_seconds": seen.compile_seconds,
        "losses": seen.losses[:COMPARED_STEPS],
    }
    others = {"LoRA": "over_lora", "PiSSA": "over_pissa", f"torch {name}": "over_torch"}
    for other, key in others.items():
        if other in found and other != name:
            row[key] = measure.ratio(seen, found[other])
    if f"torch {name}" in found:
        pairs = zip(seen.losses[:COMPARED_STEPS], found[f"torch {name}"].losses, strict=False)
        row["largest_loss_difference"] = max(abs(a - b) for a, b in pairs)
    return row


def _machine() -> dict[str, Any]:
    return {
        "device": hardware.device_description(),
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
