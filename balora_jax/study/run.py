"""``balora study``: scores of variants over data sets and seeds."""

import gc
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from balora_jax.config import RunConfig
from balora_jax.config_file import load_config
from balora_jax.errors import InputError, RunStoppedError
from balora_jax.finetune import fit
from balora_jax.io import lock
from balora_jax.io.drawing import check_picture
from balora_jax.io.folders import write_atomically
from balora_jax.paths import named_folder
from balora_jax.progress import progress_bar
from balora_jax.signals import Interrupted, Signals, taken
from balora_jax.study.grid import FIGURES, FILES, PICTURE, TABLE, StudyRun, chosen, plan_runs
from balora_jax.study.table import Figures, diverged, draw, figure_of, figures_of, table
from balora_jax.training.workdir import CONFIG, SUMMARY, check_writable
from balora_jax.untyped.json_text import read_object

LOG = "log.txt"
"""File in the folder of each run with what it printed."""

RECORDED = ("before", "after", "wall_seconds", "trainable_parameters", "device")
MEASURED = "validation"
"""What a record has besides, where the held-out rows were measured."""


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
    folder = named_folder(workdir, "--workdir")
    runs = plan_runs(config, folder)
    wanted = chosen(runs, only)
    check_writable(folder)
    lock.check_not_held(folder)
    _check_content(folder, runs)
    check_picture(picture)
    with _locked(folder):
        return _done(folder, runs, wanted, picture)


def _done(
    folder: Path, runs: Sequence[StudyRun], wanted: Sequence[StudyRun], picture: Path | None
) -> Figures:
    """Do the wanted runs of a checked study; print the table, draw, and return the figures."""
    summaries = {run.name: finished(run) for run in runs}
    records = {name: _record(found) for name, found in summaries.items() if found is not None}
    todo = [run for run in wanted if run.name not in records]
    _save(folder, figures_of(runs, records))
    done = len(wanted) - len(todo)
    bar = progress_bar(total=len(wanted), initial=done, desc="study", unit="run")
    with bar, _stoppable() as signals:
        for run in todo:
            bar.set_description_str(run.name)
            records[run.name] = _perform(run, signals, folder)
            _save(folder, figures_of(runs, records))
            bar.set_postfix_str(_last_score(records[run.name]), refresh=False)
            bar.update(1)
    figures = figures_of(runs, records)
    print(table(figures))
    drawn_to = picture or folder / PICTURE
    if draw(figures, drawn_to):
        print(f"picture: {drawn_to}")
    return figures


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder of a study: its figures have one writer."""
    try:
        with lock.locked(folder):
            yield
    except OSError as error:
        raise RunStoppedError(
            f"{error.filename or folder}: expected to read and write there, got: "
            f"{error.strerror or error}. Correct that; {_kept()}"
        ) from error


def _check_content(folder: Path, runs: Sequence[StudyRun]) -> None:
    """Raises InputError where a file of a user's has a name that a study replaces or writes to."""
    there = [name for name in FILES if os.path.lexists(folder / name)]
    strange = [name for name in there if not _is_plain(folder / name)]
    if FIGURES in there and not strange:
        figures = read_object(folder / FIGURES)
        strange = [] if {"datasets", "variants", "runs"} <= figures.keys() else [FIGURES]
    elif there and not strange:
        strange = there[:1]
    logs = [run.folder / LOG for run in runs]
    strange += [
        str(log.relative_to(folder)) for log in logs if os.path.lexists(log) and not _is_plain(log)
    ]
    if strange:
        raise InputError(
            f"--workdir {folder}: expected an empty folder, or that of a study, got one with "
            f"{strange[0]} that no study wrote, and that this one would write to. Choose another."
        )


def _is_plain(file: Path) -> bool:
    return file.is_file() and not file.is_symlink()


def raise_failures(figures: Mapping[str, Any]) -> None:
    """Raises RunStoppedError if a run of these figures diverged."""
    failed = diverged(figures)
    if failed:
        raise RunStoppedError(
            f"study: {len(failed)} of {len(figures['runs'])} runs diverged: {', '.join(failed)}. "
            "The end of each log.txt says where; lower their training.learning_rate."
        )


def finished(run: StudyRun) -> Figures | None:
    """The summary of a run that is done; None if it is not begun or not at its end.

    Raises:
        InputError: its folder holds a run of another config.
    """
    written = run.folder / CONFIG
    if not written.exists():
        return None
    there = load_config(written)
    if there != run.config:
        key, old, new = _first_difference(there, run.config)
        raise InputError(
            f"{run.folder}: expected no run or one with {key} {new!r}, got one with {old!r}. "
            "Remove that folder, or choose another --workdir."
        )
    file = run.folder / SUMMARY
    if not os.path.lexists(file):
        return None
    summary = read_object(file)
    if not _is_summary(summary):
        raise InputError(
            f"{file}: expected the summary of a run, got something else. Remove that folder, or "
            "choose another --workdir."
        )
    return summary


def _is_summary(found: Figures) -> bool:
    """Whether figures are those that the table of a study takes for granted."""
    scores = (found.get("before"), found.get("after"))
    numbers = (found.get("wall_seconds"), found.get("trainable_parameters"))
    values = [value for score in scores if isinstance(score, dict) for value in score.values()]
    measured = found.get(MEASURED, {})
    return (
        all(isinstance(score, dict) for score in scores)
        and all(type(number) in (int, float) for number in numbers)
        and all(type(value) in (int, float, str) for value in values)
        and isinstance(measured, dict)
        and all(isinstance(value, dict) for value in measured.values())
    )


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


def _perform(run: StudyRun, signals: Signals, shared: Path) -> Figures:
    """One run, its output in ``log.txt``; what it scored, or why it failed."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / LOG).open("a", encoding="utf-8") as log:
        try:
            with redirect_stdout(log), redirect_stderr(log):
                # With nothing to go on from, `resume` begins at the beginning.
                return _record(fit(run.config, workdir=run.folder, resume=True, shared=shared))
        except RunStoppedError as error:
            log.write(f"balora: {error}\n")
            if signals.received:
                raise Interrupted from error
            return {"failed": str(error)}
        except InputError as error:
            raise InputError(f"study {run.name}: {error}") from error
        finally:
            signals.outcome = _kept
            gc.collect()  # a cycle may still hold the arrays of this run when the next one loads


def _kept() -> str:
    return "what is done is kept. Go on with the same command."


@contextmanager
def _stoppable() -> Iterator[Signals]:
    """Signals end the study; the run under way has saved what it could.

    Raises:
        RunStoppedError: one came.
    """
    with taken() as signals:
        signals.outcome = _kept
        try:
            yield signals
        except KeyboardInterrupt as error:
            raise RunStoppedError(f"study: {signals.sentence()}") from error


def _record(summary: Mapping[str, Any]) -> Figures:
    found = {name: summary.get(name) for name in RECORDED}
    return found | ({MEASURED: summary[MEASURED]} if MEASURED in summary else {})


def _save(folder: Path, figures: Figures) -> None:
    text = json.dumps(figures, indent=2, ensure_ascii=False)
    write_atomically(folder / FIGURES, text + "\n")
    write_atomically(folder / TABLE, table(figures) + "\n")


def _last_score(record: Mapping[str, Any]) -> str:
    if "failed" in record:
        return "diverged"
    found = figure_of(record)
    return "not scored" if found is None else f"{found.name} {found.said}"
