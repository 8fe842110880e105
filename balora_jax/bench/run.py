"""``balora bench``: measure the cases of a config, beside the torch reference if asked."""

import contextlib
import math
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from balora_jax import hardware
from balora_jax.bench import labels, measure, report
from balora_jax.bench.cases import Case, cases_of, chosen, compiled_for, configured, text_cases
from balora_jax.bench.labels import LabelsCase
from balora_jax.bench.measure import Measured
from balora_jax.bench.weights import Weights, loaded_for, weights_of
from balora_jax.config import RunConfig
from balora_jax.config_file import parse_config
from balora_jax.errors import InputError
from balora_jax.io.drawing import check_picture
from balora_jax.plan.arguments import shapes_only
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
    lengths: Sequence[int] = (),
    tokenizer: str | None = None,
    topology: str | None = None,
    picture: Path | None = None,
) -> dict[str, Any]:
    """Measure the steps of a config; print a table for each setting and return its figures.

    Args:
        config: of a run; its model folder may hold a ``config.json`` alone.
        rounds: counted rounds of each case, after two that are not; a round is one step, on rows of
            data one on each of a few batches.
        cases: names of cases; all of them if empty.
        against_torch: run the torch reference for LoRA and BA-LoRA in turn with ours.
        lengths: measure full rows of so many tokens, a setting for each; a step has as many tokens
            as the config's would, and at least one row.
        tokenizer: folder of the tokenizer for the rows of ``data.train``, of a model without one;
            they are a setting after those of ``lengths``.
        topology: compile for these devices, which need not be here, instead of measuring here.
        picture: PNG of time and memory of each case, of the first setting.

    Raises:
        InputError: no round, an unknown case, or a setting that does not fit.
    """
    check_picture(picture)
    kind = TASKS[config.task].model
    todo = chosen(cases_of(kind), cases)
    _check(config, kind, rounds, lengths, tokenizer, topology, against_torch=against_torch)
    if topology is not None:
        _check_ahead(
            {
                "--against": against_torch,
                "--lengths": lengths,
                "--tokenizer": tokenizer,
                "--picture": picture,
            }
        )
    figures: dict[str, Any] = {"versions": hardware.versions()}
    if topology is not None:
        target = parse_target(topology)
        figures |= {"topology": topology, "notes": list(target.notes)}
        figures |= {"rows": compiled_for(target, config, todo)}
        print(report.ahead_table(figures))
        return figures
    figures |= {"machine": _machine(config.model.dtype), "tables": []}
    if kind == "encoder":
        figures["tables"].append(_measured_labels(config, rounds, todo))
    else:
        for setting in settings_of(config, lengths, tokenizer):
            figures["tables"].append(_measured(setting, rounds, todo, against_torch))
    print(report.tables(figures))
    if picture is not None and report.draw(figures["tables"][0], picture):
        print(f"picture: {picture}")
    return figures


def _check(
    config: RunConfig,
    kind: str,
    rounds: int,
    lengths: Sequence[int],
    tokenizer: str | None,
    topology: str | None,
    *,
    against_torch: bool,
) -> None:
    """Raises InputError where options do not fit each other."""
    for name, value in (("--rounds", rounds), *(("--lengths", length) for length in lengths)):
        if value < 1:
            raise InputError(f"{name}: expected at least 1, got {value}. Raise it.")
    more = against_torch or topology is not None or lengths or tokenizer is not None
    if kind == "encoder" and more:
        raise InputError(
            "bench: expected task text with --against, --lengths, --tokenizer or --topology, got "
            f"{config.task}. Leave them out."
        )
    if tokenizer is not None and shapes_only(config.model.name_or_path) is None:
        raise InputError(
            f"--tokenizer: expected a model without a tokenizer, got {config.model.name_or_path}, "
            "which has its own. Leave it out."
        )


def _check_ahead(options: Mapping[str, object]) -> None:
    """Raises InputError for options of measuring, where a step is compiled and not run."""
    given = [name for name, value in options.items() if value]
    if given:
        raise InputError(
            f"--topology: expected it without {', '.join(given)}: nothing is run there, got both. "
            "Leave one of them out."
        )


class Setting(NamedTuple):
    """What all cases of a table have in common.

    Attributes:
        config: of a run.
        full: full rows of random tokens.
        tokenizer: of the rows of ``data.train``, where the model has none.
    """

    config: RunConfig
    full: bool
    tokenizer: str | None


def settings_of(config: RunConfig, lengths: Sequence[int], tokenizer: str | None) -> list[Setting]:
    """The settings that are asked for: full rows of each length, then rows of data."""
    tree = config.model_dump(mode="json")
    tokens = config.training.batch_size * config.data.max_length
    found = []
    for length in lengths:
        rows = max(1, tokens // length)
        training = {**tree["training"], "batch_size": rows, "accumulation": 1}
        changed = {**tree, "training": training, "data": {**tree["data"], "max_length": length}}
        found.append(Setting(parse_config(changed, f"{rows} x {length}"), True, None))
    if not lengths or tokenizer is not None:
        found.append(Setting(config, False, tokenizer))
    return found


def _measured(
    setting: Setting, rounds: int, cases: Sequence[Case], against_torch: bool
) -> dict[str, Any]:
    config = setting.config
    if against_torch:
        names = [*(case.name for case in cases), *TORCH_CASES]
        cases = [case for case in text_cases() if case.name in names]
    base, weights = weights_of(config, full=setting.full, tokenizer=setting.tokenizer)
    steps = len(weights.batches)
    if against_torch:  # as many losses as are compared
        rounds = max(rounds, math.ceil(COMPARED_STEPS / steps) - 2)
    programs = {case.name: _program(config, case, base) for case in cases}
    with contextlib.ExitStack() as stack, _shown() as bar:
        named: dict[str, Any] = {}
        for name, program in programs.items():
            bar.set_description_str(f"compiling: {name}")
            loaded = loaded_for(program, weights)
            named[name] = measure.text_step(program, loaded, weights.batches)
            if against_torch and name in TORCH_CASES:
                # Asked for after the compilation, so that its start does not compete with it.
                named[f"torch {name}"] = _torch_step(stack, program, base, weights, name)
        found = measure.alternate(named, rounds, bar.set_description_str, batches=steps)
    real = _mean(int((batch["segment_ids"] > 0).sum()) for batch in weights.batches)
    rows = []
    for name, seen in found.items():
        program = programs[name.removeprefix("torch ")]
        needed = _mean(_needed(program, batch) for batch in weights.batches)
        rows.append(_row(name, seen, needed, found, real, program.mesh.size))
    places = _mean(batch["input_ids"].size for batch in weights.batches)
    torch = next((step.setup for step in named.values() if hasattr(step, "setup")), None)
    return _setting(config, weights.batches) | {
        "weights": "random" if weights.random else "of the checkpoint",
        "counted_tokens": _mean(_counted(batch) for batch in weights.batches),
        "fill": real / places,
        "rounds": rounds,
        "torch": torch,
        "rows": rows,
    }


def _needed(program: TextProgram, batch: Mapping[str, Any]) -> float:
    return flops.model_flops(program, batch["input_ids"].shape, _counted(batch))


def _counted(batch: Mapping[str, Any]) -> int:
    """Tokens of a batch that are learnt."""
    same = batch["segment_ids"][..., 1:] == batch["segment_ids"][..., :-1]
    return int((batch["loss_mask"][..., 1:] * same).sum())


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


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
    batch = next(iter(compiled.values())).step.batches[0]
    real = int(batch["attention_mask"].sum())
    rows = [
        _row(name, seen, compiled[name].model_flops, found, real, jax.device_count())
        for name, seen in found.items()
    ]
    return _setting(config, [batch]) | {
        "weights": "of the checkpoint",
        "counted_tokens": batch["labels"].size,
        "fill": real / batch["input_ids"].size,
        "rounds": rounds,
        "torch": None,
        "rows": rows,
    }


def _setting(config: RunConfig, batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    shapes = sorted({batch["input_ids"].shape for batch in batches}, key=math.prod)
    return {
        "model": config.model.name_or_path,
        "dtype": config.model.dtype,
        "remat": config.model.remat,
        "rank": config.adapter.rank,
        "batches": [list(shape) for shape in shapes],
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
    return stack.enter_context(trainer)


def _row(
    name: str,
    seen: Measured,
    needed: float,
    found: dict[str, Measured],
    tokens: float,
    devices: int,
) -> dict[str, Any]:
    """Figures of one case; ratios to others, and to the reference's same case, within rounds."""
    peak = hardware.peak_flops(jax.devices()[0].device_kind)
    rate = needed / seen.median / devices
    row: dict[str, Any] = {
        "case": name,
        "seconds": seen.median,
        "seconds_min": min(seen.seconds),
        "seconds_max": max(seen.seconds),
        "tokens_per_second": tokens / seen.median,
        "model_flops": needed,
        "mfu": None if peak is None else rate / peak,
        "flops_per_device_second": rate,
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


def _machine(dtype: str) -> dict[str, Any]:
    return {
        "device": hardware.device_description(),
        "processor": _processor(),
        "threads": os.cpu_count(),
        "product_rate": measure.product_rate(dtype),
    }


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
