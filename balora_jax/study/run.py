"""``balora study``: which variant scores best, over data sets and seeds?"""

import copy
import datetime
import gc
import json
import math
import os
import re
import signal
import statistics
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from balora_jax import hardware
from balora_jax.config import RunConfig, StudyConfig
from balora_jax.config_file import load_config, parse_config
from balora_jax.errors import InputError, RunStoppedError
from balora_jax.finetune import fit
from balora_jax.io.drawing import save_picture
from balora_jax.io.folders import write_atomically
from balora_jax.training.workdir import check_workdir

RECORDED = ("before", "after", "wall_seconds", "trainable_parameters", "device")
COUNTS = ("rows", "answered")  # of a score: what it was taken on, not how good it is

Figures = dict[str, Any]


@dataclass(frozen=True)
class StudyRun:
    """One run of a study.

    Attributes:
        dataset, variant, seed: its place in the study.
        config: the base with the data set's settings, then the variant's, then the seed.
        folder: gets what ``fit`` leaves, and ``log.txt``.
    """

    dataset: str
    variant: str
    seed: int
    config: RunConfig
    folder: Path

    @property
    def name(self) -> str:
        """Its place as one word."""
        return f"{self.dataset}/{self.variant}/seed{self.seed}"


def conduct(
    config: RunConfig,
    *,
    workdir: str | Path,
    only: Sequence[str] = (),
    picture: Path | None = None,
) -> Figures:
    """Do the runs of a study that are not done yet; print the table and return its figures.

    A run that diverges is recorded as failed, and the next one begins. The same call goes on
    with a study that was interrupted.

    Args:
        config: of a run, with the section ``study``.
        workdir: gets ``DATASET/VARIANT/seedN/`` for each run, ``study.json``, ``table.md`` and,
            where matplotlib is installed, ``study.png``.
        only: ``DATASET/VARIANT`` of the runs to do; all of them if empty. The table has the
            others too if they are done.
        picture: PNG of the bars instead of ``study.png`` in the folder.

    Raises:
        InputError: a setting of any run, or a folder that holds another run, before the first
            run begins; or what ``fit`` says of the data or the model of a run.
        RunStoppedError: interrupted; everything done so far is kept.
    """
    folder = Path(workdir)
    runs = plan_runs(config, folder)
    chosen = _chosen(runs, only)
    check_workdir(folder, resume=True)
    if picture is not None and not (picture.suffix == ".png" and picture.parent.is_dir()):
        raise InputError(
            f"--picture {picture}: expected a .png in a folder that exists. Choose another."
        )
    summaries = {run.name: finished(run) for run in runs}
    records = {name: _record(found) for name, found in summaries.items() if found is not None}
    todo = [run for run in chosen if run.name not in records]
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder, figures_of(runs, records))
    done = len(chosen) - len(todo)
    bar = tqdm(total=len(chosen), initial=done, desc="study", unit="run", file=sys.stderr)
    with bar, _signals() as received:
        for run in todo:
            bar.set_description(run.name)
            records[run.name] = _perform(run, received)
            _save(folder, figures_of(runs, records))
            bar.set_postfix_str(_last_score(records[run.name]), refresh=False)
            bar.update(1)
            if received():
                raise _interrupted(received(), f"after {run.name}")
    figures = figures_of(runs, records)
    print(table(figures))
    drawn_to = picture or folder / "study.png"
    if draw(figures, drawn_to):
        print(f"picture: {drawn_to}")
    return figures


def raise_failures(figures: Mapping[str, Any]) -> None:
    """Raises RunStoppedError if a run of these figures diverged."""
    failed = [_name(row) for row in figures["runs"] if "failed" in row]
    if failed:
        raise RunStoppedError(
            f"study: {len(failed)} of {len(figures['runs'])} runs diverged: {', '.join(failed)}. "
            "The end of each log.txt says where; lower their training.learning_rate."
        )


def plan_runs(config: RunConfig, folder: Path) -> list[StudyRun]:
    """Every run of a study, resolved and checked, in the order in which they are done.

    Raises:
        InputError: no variants, a name that is no folder's, or a setting that does not
            fit; the message names the data set and the variant.
    """
    study = config.study
    _check_grid(study)
    base = config.model_dump(mode="json", exclude={"study"})
    return [
        StudyRun(
            dataset,
            variant,
            seed,
            _resolved(base, f"study {dataset}/{variant}", (row, column), seed),
            folder / dataset / variant / f"seed{seed}",
        )
        for dataset, row in study.datasets.items()
        for variant, column in study.variants.items()
        for seed in study.seeds
    ]


def _check_grid(study: StudyConfig) -> None:
    if not study.variants:
        raise InputError(
            "study.variants: expected settings to compare, got none. Add study: with variants: "
            "{NAME: {key.path: value}}, and datasets and seeds if there are several."
        )
    if not study.datasets:
        raise InputError("study.datasets: expected at least one name, got none. Add one.")
    for what, names in (("datasets", study.datasets), ("variants", study.variants)):
        for name in names:
            if not re.fullmatch(r"[A-Za-z0-9_+-][A-Za-z0-9._+-]*", name):
                raise InputError(
                    f"study.{what}: expected a name of letters, digits and . _ + -, got {name!r}. "
                    "It becomes a folder's name: choose another."
                )
    if not study.seeds or len(set(study.seeds)) < len(study.seeds):
        raise InputError(
            f"study.seeds: expected different seeds, got {list(study.seeds)}. Name each once."
        )


def _resolved(
    base: Mapping[str, Any], where: str, settings: Sequence[Mapping[str, Any]], seed: int
) -> RunConfig:
    tree = copy.deepcopy(dict(base))
    for one in settings:
        for key, value in one.items():
            _put(tree, key, value, where)
    tree["training"]["seed"] = seed
    return parse_config(tree, where)


def _put(tree: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set ``key.path`` to a value; a whole section as ``adapter: {rank: 4}`` is merged in."""
    *parents, leaf = key.split(".")
    if key == "training.seed":
        raise InputError(f"{where}: training.seed: expected seeds in study.seeds. Move it there.")
    if (parents or [leaf])[0] == "study":
        raise InputError(f"{where}: {key}: expected a setting of a run, got one of the study.")
    if not parents and isinstance(tree.get(leaf), dict):
        if not isinstance(value, Mapping):
            raise InputError(
                f"{where}: {key}: expected settings, got {value!r}. Write {key}.KEY: value."
            )
        for name, inner in value.items():
            _put(tree, f"{key}.{name}", inner, where)
        return
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise InputError(f"{where}: {key}: {parent!r} is not a section. Check the key.")
    node[leaf] = copy.deepcopy(value)


def _chosen(runs: Sequence[StudyRun], only: Sequence[str]) -> list[StudyRun]:
    known = list(dict.fromkeys(f"{run.dataset}/{run.variant}" for run in runs))
    for name in only:
        if name not in known:
            raise InputError(
                f"--only: expected one of {', '.join(known)}, got {name!r}. Choose among them."
            )
    return [run for run in runs if not only or f"{run.dataset}/{run.variant}" in only]


def finished(run: StudyRun) -> Figures | None:
    """The summary of a run that is done; None if it is not begun or not at its end.

    Raises:
        InputError: its folder holds a run of another config.
    """
    written = run.folder / "config.yaml"
    if not written.exists():
        return None
    there = load_config(written)
    if there != run.config:
        key, old, new = _first_difference(there, run.config)
        raise InputError(
            f"{run.folder}: expected no run or one with {key} {new!r}, got one with {old!r}. "
            "Remove that folder, or choose another --workdir."
        )
    summary = run.folder / "summary.json"
    return json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else None


def _first_difference(old: RunConfig, new: RunConfig) -> tuple[str, Any, Any]:
    before, after = (
        {"task": config.task}
        | {
            f"{section}.{key}": value
            for section, values in config.model_dump().items()
            if isinstance(values, dict)
            for key, value in values.items()
        }
        for config in (old, new)
    )
    key = next(key for key in before | after if before.get(key) != after.get(key))
    return key, before.get(key), after.get(key)


def _perform(run: StudyRun, received: Callable[[], list[str]]) -> Figures:
    """One run, its output in ``log.txt``; what it scored, or why it failed."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / "log.txt").open("a", encoding="utf-8") as log:
        try:
            with redirect_stdout(log), redirect_stderr(log):
                # With nothing to go on from, `resume` begins at the beginning.
                return _record(fit(run.config, workdir=run.folder, resume=True))
        except RunStoppedError as error:
            log.write(f"balora: {error}\n")
            if received():
                raise _interrupted(received(), f"in {run.name}") from error
            return {"failed": str(error)}
        except InputError as error:
            raise InputError(f"study {run.name}: {error}") from error
        except KeyboardInterrupt as error:
            raise _interrupted(received() or ["SIGINT"], f"in {run.name}") from error
        finally:
            gc.collect()  # a cycle may still hold the arrays of this run when the next one loads


def _interrupted(signals: Sequence[str], where: str) -> RunStoppedError:
    return RunStoppedError(
        f"study: interrupted by {signals[0]} {where}; what is done is kept. Go on with the same "
        "command."
    )


@contextmanager
def _signals() -> Iterator[Callable[[], list[str]]]:
    """A function that names the SIGTERM and SIGINT that came so far, whoever handled them.

    ``fit`` takes both for itself and may end as usual after one that came late, so handlers do not
    tell; the interpreter's wake-up pipe gets the number of every signal. Outside of a run's steps
    SIGTERM does what SIGINT does.
    """
    wanted = {signal.SIGTERM, signal.SIGINT}
    names: list[str] = []
    reader, writer = os.pipe()
    for end in (reader, writer):
        os.set_blocking(end, False)

    def received() -> list[str]:
        try:
            numbers = os.read(reader, 4096)
        except BlockingIOError:
            return names
        names.extend(signal.Signals(n).name for n in numbers if n in wanted)
        return names

    def stop(number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    with ExitStack() as undo:
        for end in (reader, writer):
            undo.callback(os.close, end)
        # Elsewhere than in the main thread the embedding program handles signals.
        if threading.current_thread() is threading.main_thread():
            wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            undo.callback(signal.set_wakeup_fd, wakeup)
            undo.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, stop))
        yield received


def _record(summary: Mapping[str, Any]) -> Figures:
    return {name: summary.get(name) for name in RECORDED}


def figures_of(runs: Sequence[StudyRun], records: Mapping[str, Figures]) -> Figures:
    """What ``study.json`` holds: the runs that ended, in their order, and what they ran on."""
    rows = [
        {"dataset": run.dataset, "variant": run.variant, "seed": run.seed, **records[run.name]}
        for run in runs
        if run.name in records
    ]
    return {
        "datasets": list(dict.fromkeys(run.dataset for run in runs)),
        "variants": list(dict.fromkeys(run.variant for run in runs)),
        "runs": rows,
        "wall_seconds": round(_wall_seconds(rows), 3),
        "versions": hardware.versions(),
        "device": hardware.device_description(),
    }


def _wall_seconds(rows: Sequence[Mapping[str, Any]]) -> float:
    return sum(row.get("wall_seconds") or 0.0 for row in rows)


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['dataset']}/{row['variant']}/seed{row['seed']}"


def _save(folder: Path, figures: Figures) -> None:
    text = json.dumps(figures, indent=2, ensure_ascii=False)
    write_atomically(folder / "study.json", text + "\n")
    write_atomically(folder / "table.md", table(figures) + "\n")


def main_metric(after: Mapping[str, Any] | None) -> str | None:
    """The first name of a score that is a metric; None where nothing was scored.

    >>> main_metric({"rows": 408, "accuracy": 0.9, "f1": 0.93})
    'accuracy'
    """
    return next((name for name in after or {} if name not in COUNTS), None)


def _last_score(record: Mapping[str, Any]) -> str:
    if "failed" in record:
        return "diverged"
    name = main_metric(record["after"])
    return "not scored" if name is None else f"{name} {100 * record['after'][name]:.2f}"


def _points(figures: Mapping[str, Any], variant: str, dataset: str) -> list[float]:
    """100 x the main metric of every run of a cell."""
    rows = [r for r in figures["runs"] if (r["variant"], r["dataset"]) == (variant, dataset)]
    scores = [row.get("after") or {} for row in rows]
    return [100 * s[name] for s in scores if (name := main_metric(s)) is not None]


def _deviation(points: Sequence[float]) -> float | None:
    return statistics.stdev(points) if len(points) > 1 else None


def table(figures: Mapping[str, Any]) -> str:
    """Mean ± sample standard deviation (runs) of each cell, in points, as Markdown.

    The average of a variant is the mean of its cells; there is none while a cell is empty.
    """
    datasets, runs = figures["datasets"], figures["runs"]
    header = ["variant", *(_title(figures, name) for name in datasets), "average", "wall time"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for variant in figures["variants"]:
        cells = [_points(figures, variant, dataset) for dataset in datasets]
        average = f"{statistics.mean(map(statistics.mean, cells)):.2f}" if all(cells) else "–"
        took = _wall_seconds([row for row in runs if row["variant"] == variant])
        lines.append([variant, *map(_cell, cells), average, _clock(took)])
    ended = [row for row in runs if "failed" not in row]
    below = (
        f"points: mean ± sample standard deviation (runs); {len(ended)} runs took "
        f"{_clock(figures['wall_seconds'])} in all; {figures['device']}, "
        f"jax {figures['versions']['jax']}"
    )
    text = [*(f"| {' | '.join(cells)} |" for cells in lines), "", below]
    failed = [_name(row) for row in runs if "failed" in row]
    return "\n".join([*text, *([f"diverged: {', '.join(failed)}"] if failed else [])])


def _title(figures: Mapping[str, Any], dataset: str) -> str:
    """A data set with its main metric, where a run of it was scored."""
    scores = (row.get("after") for row in figures["runs"] if row["dataset"] == dataset)
    name = next(filter(None, map(main_metric, scores)), None)
    return dataset if name is None else f"{dataset} ({name.replace('_', ' ')})"


def _cell(points: Sequence[float]) -> str:
    if not points:
        return "–"
    deviation = _deviation(points)
    spread = "" if deviation is None else f" ± {deviation:.2f}"
    return f"{statistics.mean(points):.2f}{spread} ({len(points)})"


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def draw(figures: Mapping[str, Any], path: Path) -> bool:
    """Mean and deviation of each cell as bars, by data set, in a PNG; whether it was drawn."""

    def paint(pyplot: Any) -> Any:
        datasets, variants = figures["datasets"], figures["variants"]
        width = 0.8 / len(variants)
        size = (2.5 + 0.45 * len(datasets) * (len(variants) + 1), 4)
        figure, axis = pyplot.subplots(figsize=size, constrained_layout=True)
        for place, variant in enumerate(variants):
            cells = [_points(figures, variant, dataset) for dataset in datasets]
            axis.bar(
                [i + (place - (len(variants) - 1) / 2) * width for i in range(len(datasets))],
                [statistics.mean(points) if points else math.nan for points in cells],
                width,
                yerr=[_deviation(points) or 0.0 for points in cells],
                capsize=3,
                label=variant,
            )
        axis.set_xticks(range(len(datasets)), [_title(figures, name) for name in datasets])
        axis.set_ylabel("points: mean, sample standard deviation")
        axis.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper center", ncols=len(variants), fontsize=8)
        return figure

    return save_picture(path, paint)
