"""One run from start to end: check, load, score, train, export, score again."""

import datetime
import functools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from balora_jax import hardware
from balora_jax.config import DataConfig, RunConfig
from balora_jax.config_file import dump_changes, dump_config, parse_config
from balora_jax.data.template_files import read_template
from balora_jax.errors import InputError
from balora_jax.io import drawing, metrics
from balora_jax.io.beside import CARD, CHAT_TEMPLATE, OF_A_TOKENIZER, SETTINGS, found_beside
from balora_jax.io.folders import write_atomically
from balora_jax.io.keeper import Keeper
from balora_jax.io.program_cache import kept
from balora_jax.models.methods import METHODS
from balora_jax.parallel import hosts
from balora_jax.paths import is_store, named_folder
from balora_jax.pretrained import export
from balora_jax.pretrained.card import Trained, model_card
from balora_jax.pretrained.card_kinds import ADAPTER, FULL
from balora_jax.signals import taken
from balora_jax.tasks.registry import TASKS
from balora_jax.training.endings import failures, reading
from balora_jax.training.loop import Training, resumable
from balora_jax.training.mirror import Mirror, mirrored
from balora_jax.training.records import beside_each_other
from balora_jax.training.run import Arrays, Run
from balora_jax.training.trackers import TRACKERS
from balora_jax.training.trackers.tracker import Callback, check_receivers
from balora_jax.training.workdir import (
    CONFIG,
    CURVES,
    METRICS,
    SUMMARY,
    check_workdir,
    held,
    recorded_day,
)


def fit(
    config: RunConfig,
    *,
    workdir: str | Path,
    resume: bool = False,
    shared: Path | None = None,
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any]:
    """Fine-tune as the config says; everything a run leaves lies in ``workdir``.

    Args:
        config: from ``load_config``.
        workdir: gets ``config.yaml``, ``metrics.jsonl``, ``checkpoints/``, ``adapter/`` (PEFT),
            ``summary.json`` and ``curves.png``; a folder, or ``gs://BUCKET/FOLDER``.
        resume: go on from the newest checkpoint in ``workdir`` (from the start if there is none).
        shared: folder for what several runs need of one teacher (``regularizers.teacher_cache`` of
            ``task: text``); ``workdir`` where it is not given.
        callbacks: objects with ``start(workdir, config)``, ``log(row)`` and ``finish(summary)``,
            which get each row of ``metrics.jsonl`` as it is written, as a tracker does.

    Returns:
        The contents of ``summary.json``.

    Raises:
        InputError: bad input or configuration; nothing was written.
        RunStoppedError: diverged, interrupted after a checkpoint, or a device, a host or the disk
            failed.
    """
    if is_store(workdir):
        check_hosts(config)
        with mirrored(str(workdir), resume=resume) as mirror:
            return _fit(config, mirror.folder, mirror, resume, shared, callbacks)
    folder = named_folder(workdir, "--workdir")
    return _fit(config, folder, None, resume, shared, callbacks)


def check_hosts(config: RunConfig) -> None:
    """Raises InputError for a run whose hosts need one folder, where each has its own."""
    if jax.process_count() == 1:
        return
    method, terms = METHODS[config.adapter.method], config.regularizers
    decodes = TASKS[config.task].model != "encoder"
    rows = decodes and terms.teacher_cache and terms.teacher_cache_folder is None
    for where, needs in (
        (f"adapter.method={config.adapter.method}", method.trains_base),
        ("regularizers.teacher_cache=true", rows),
    ):
        if needs:
            raise InputError(
                f"{where}: expected a --workdir that all hosts share, got one in a bucket. Name a "
                "folder on NFS or Filestore, or use one host."
            )


def _fit(
    config: RunConfig,
    folder: Path,
    mirror: Mirror | None,
    resume: bool,
    shared: Path | None,
    callbacks: Sequence[Callback],
) -> dict[str, Any]:
    """:func:`fit` in a folder of this machine, which a mirror may keep elsewhere."""
    began = time.monotonic()
    keep = config.training.compilation_cache
    with taken() as signals, failures(folder, signals), kept(keep):
        signals.several = jax.process_count() > 1
        with reading():
            hosts.by_first(functools.partial(check_workdir, folder, resume=resume))
            trackers = [*(TRACKERS[name] for name in config.training.trackers), *callbacks]
            if trackers:
                hosts.by_first(functools.partial(check_receivers, trackers, folder))
            config = dated(config, folder)
            run = TASKS[config.task].check(config)
            template = chat_template_of(config)
        with held(folder, resume=resume) as check:
            keeper = Keeper(check) if mirror is None else mirror.keeper(check)
            with reading():
                hosts.by_first(functools.partial(run.check_folders, folder, shared))
                found = resumable(run, folder) if resume else None
                loaded = run.load()
            describe(run, folder)
            with jax.set_mesh(run.mesh):
                training = Training(
                    run,
                    loaded,
                    folder,
                    signals,
                    trackers=trackers,
                    found=found,
                    shared=shared,
                    keeper=keeper,
                    on_best=functools.partial(export_best, template=template),
                )
                with training.trackers as told:
                    training.score_before()
                    training.train()
                    keeper.check()
                    written = export_trained(training, template)
                    summary = summarise(training, training.score_after(), began)
                    told.summary = summary
                keeper.check()
                write_card(training, summary["after"] | training.measure_after())
                write_results(folder, summary, written)
        return summary


def dated(config: RunConfig, folder: Path) -> RunConfig:
    """The config with the day that chat templates are told: that of the run's first start.

    A template may write the date; of a run that goes on tomorrow the texts must stay what they are.
    """
    if TASKS[config.task].model == "encoder":  # its rows are not written by a template
        return config
    if config.data.today is not None or not _chats(config.data):
        return config
    today = datetime.date.today().isoformat()
    tree = config.model_dump(mode="json")
    tree["data"]["today"] = hosts.by_first(lambda: recorded_day(folder) or today)
    return parse_config(tree, str(folder))


def describe(run: Run, folder: Path | None = None) -> None:
    """Say what is about to run: settings, layers, counts, data and an example with its loss mask.

    Of the settings those that are not their defaults; all of them will stand in the folder.
    """
    there = "" if folder is None else f", written to {folder / CONFIG}"
    modules = run.adapters.modules
    kinds = sorted({module.path.rsplit(".", 1)[-1] for module in modules})
    layers = f"{len(modules)} layers ({', '.join(kinds)})" if kinds else "none, full model"
    share = 100.0 * run.trainable / run.total
    devices = f"devices: {hardware.device_description()}, mesh {dict(run.mesh.shape)}"
    if jax.process_count() > 1:
        devices += f", {jax.process_count()} processes"
    hosts.say(
        dump_changes(run.config).rstrip(),
        f"all other settings are their defaults{there}",
        f"base: {run.base.folder} ({run.base.config.model_type}, {run.total:,} parameters)",
        f"adapters: {layers}, {run.trainable:,} trainable parameters ({share:.2f} %)",
        devices,
        *run.describe(),
    )


def _chats(data: DataConfig) -> bool:
    """Whether a chat template writes any of the rows."""
    sets = () if data.train is None or isinstance(data.train, str) else data.train
    return "chat" in {data.template, *(one.template for one in sets)}


def chat_template_of(config: RunConfig) -> str | None:
    """The text of ``data.chat_template``, read before the run: its file may be gone after it.

    None where the tokenizer's own is used, or none at all.
    """
    data = config.data
    if TASKS[config.task].model == "encoder":  # its rows are not written by a template
        return None
    if data.chat_template is None or not _chats(data):
        return None
    return read_template(data.chat_template, "data.chat_template")


def export_trained(training: Training, template: str | None) -> str:
    """Write the adapter, or of a full fine-tuning the whole model; says what was written.

    Args:
        training: at its end.
        template: the chat template, if it is not the tokenizer's.
    """
    whole = training.run.adapters.method.trains_base
    folder = training.folder / (export.MODEL if whole else export.ADAPTER)
    return _export(training, folder, training.state.adapters, card_of(training, {}), template)


def export_best(training: Training, template: str | None) -> None:
    """Write what the held-out rows were best with, where it is kept; as :func:`export_trained`."""
    kept, best = training.held_out.kept, training.held_out.best
    if kept is None or best is None:
        return
    card = card_of(training, best["figures"], steps=best["step"], skipped=best["skipped"])
    _export(training, training.folder / export.BEST, kept, card, template)


def _export(
    training: Training, folder: Path, arrays: Arrays, card: str, template: str | None
) -> str:
    """Write trainable arrays as the run's method has it into a folder; says what was written."""
    run, model = training.run, training.run.config.model
    trainable = hosts.gathered_all(arrays)
    origin = hosts.gathered_all(training.constants.origin)
    if not hosts.is_first():
        return ""
    beside = beside_trained(training, card, template)
    if run.adapters.method.trains_base:
        found = export.write_model(
            folder, run.base, trainable, model.dtype, beside=beside, overwrite=True
        )
        return f"model: {found.folder} ({found.merged} tensors changed)"
    report = export.write_adapter(
        folder,
        run.base,
        model.name_or_path,
        run.adapters.modules,
        trainable,
        origin,
        revision=model.revision,
        use_rslora=run.adapters.use_rslora,
        whole=run.adapters.whole,
        beside=beside,
        overwrite=True,
    )
    return f"adapter: {report.folder} (PEFT, rank {report.rank}, {report.parameters:,} numbers)"


def beside_trained(training: Training, card: str, template: str | None) -> dict[str, Path | bytes]:
    """What lies beside the trained weights: tokenizer, chat template, card and settings."""
    found = found_beside(training.run.base.folder, OF_A_TOKENIZER)
    if template is not None:
        found[CHAT_TEMPLATE] = template.encode()
    found[CARD] = card.encode()
    return found | {SETTINGS: dump_config(training.run.config).encode()}


def card_of(
    training: Training,
    after: Mapping[str, Any],
    *,
    steps: int | None = None,
    skipped: int | None = None,
) -> str:
    """The card of what was trained.

    Args:
        training: while it runs, or at its end.
        after: figures of the held-out rows; empty as long as nothing is scored.
        steps: of what the card is for; all where not given.
        skipped: updates of them; as many as were skipped until now where not given.
    """
    run, state = training.run, training.state
    before = training.before | training.held_out.before
    trained = Trained(
        **vars(export.subject_of(run.config, run.base)),
        rows=str(run.report),
        steps=int(state.step) if steps is None else steps,
        skipped=int(state.guard.skipped) if skipped is None else skipped,
        before={name: value for name, value in before.items() if value is not None},
        after={name: value for name, value in after.items() if value is not None},
    )
    return model_card(trained, FULL if run.adapters.method.trains_base else ADAPTER)


def summarise(training: Training, after: dict[str, Any], began: float) -> dict[str, Any]:
    """The contents of ``summary.json``; ``began`` is the clock at the start of the run."""
    return {
        "before": training.before,
        "after": after,
        "trainable_parameters": training.run.trainable,
        "total_parameters": training.run.total,
        "steps": int(training.state.step),
        "skipped_updates": int(training.state.guard.skipped),
        "wall_seconds": round(time.monotonic() - began, 3),
        "peak_memory_bytes": hardware.peak_memory_bytes(),
        "versions": hardware.versions(),
        "device": hardware.device_description(),
        **training.held_out.summary(training.measure_after()),
    }


def write_card(training: Training, after: dict[str, Any]) -> None:
    """The card anew, with the scores after the training.

    Its draft lies in the run's folder: one that a kill leaves in ``adapter/`` would pass for a
    user's file.
    """
    if hosts.is_first():
        whole = training.run.adapters.method.trains_base
        file = training.folder / (export.MODEL if whole else export.ADAPTER) / CARD
        write_atomically(file, card_of(training, after), drafts=training.folder)


def write_results(folder: Path, summary: dict[str, Any], written: str) -> None:
    """The summary and the curves, by the first process, and what was gained, for the reader."""
    if hosts.is_first():
        rows = metrics.read_metrics(folder / METRICS)
        drawn = drawing.draw_curves(rows, folder / CURVES)
        text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
        write_atomically(folder / SUMMARY, text)
        hosts.say(written, *_best(folder, summary))
        if drawn:
            hosts.say(f"curves:  {folder / 'curves.png'}")
        hosts.say(*beside_each_other(folder), *_gains(summary))
    hosts.barrier("finished")


def _best(folder: Path, summary: dict[str, Any]) -> list[str]:
    """Where the best lies, if it is kept, and what it is."""
    best = summary.get("validation", {}).get("best")
    if best is None or not (folder / export.BEST).is_dir():
        return []
    figure = best["metric"].replace("_", " ")
    return [
        f"best:    {folder / export.BEST} ({figure} {best['value']:.4f} after step {best['step']})"
    ]


def _gains(summary: dict[str, Any]) -> list[str]:
    """A line for each figure of the score, and the held-out loss: before, after, and how long."""
    measured, seconds = summary.get("validation", {}), summary["wall_seconds"]
    before, after = (
        summary[when] | {k: v for k, v in measured.get(when, {}).items() if k == metrics.LOSS}
        for when in ("before", "after")
    )
    return [
        f"{name.replace('_', ' ')} on held-out rows: {before[name]:.3f} -> {after[name]:.3f} in "
        f"{seconds:.0f} s"
        for name in after
        if not metrics.is_count(name) and isinstance(after[name], float | int)
        if isinstance(before.get(name), float | int)
    ]
