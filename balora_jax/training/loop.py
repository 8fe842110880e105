"""One run from start to end: score, train with checkpoints, export, score again."""

import json
import math
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from balora_jax.config import RunConfig, TrainingConfig
from balora_jax.config_file import dump_config
from balora_jax.errors import InputError, RunStoppedError
from balora_jax.io import checkpoint, export, metrics
from balora_jax.training import label_run, steps, text_run
from balora_jax.training.assemble import Loaded
from balora_jax.training.label_run import LabelRun
from balora_jax.training.text_run import TextRun

Run = TextRun | LabelRun


def fit(config: RunConfig, *, workdir: str | Path, resume: bool = False) -> dict[str, Any]:
    """Fine-tune as the config says; everything a run leaves lies in ``workdir``.

    Args:
        config: from ``load_config``.
        workdir: gets ``config.yaml``, ``metrics.jsonl``, ``checkpoints/``, ``adapter/`` (PEFT),
            ``summary.json`` and ``curves.png``.
        resume: go on from the newest checkpoint in ``workdir`` (from the start if there is none).

    Returns:
        The contents of ``summary.json``.

    Raises:
        InputError: bad input or configuration; nothing was written.
        RunStoppedError: diverged, or interrupted after a checkpoint.
    """
    folder = Path(workdir)
    check_workdir(folder, resume)
    check_model_folder(config, folder, resume)
    began = time.monotonic()
    run = label_run.check(config) if config.task == "nlu" else text_run.check(config)
    if resume and checkpoint.has_checkpoints(folder / "checkpoints"):
        store = checkpoint.Checkpoints(folder / "checkpoints", keep=10**6)
        step = store.latest_step()
        if step is not None:
            where = f"{folder}: --resume"
            checkpoint.check_same_run(store.identity(step), identity_of(run), where)
        store.close()
    loaded = run.load()
    describe(run)
    with jax.set_mesh(run.mesh), interruptions() as interrupted:
        return Training(run, loaded, folder, began, interrupted).run(resume)


class Training:
    """The state of one ``fit`` while it runs."""

    def __init__(
        self,
        setup: Run,
        loaded: Loaded,
        folder: Path,
        began: float,
        interrupted: list[str],
    ):
        self.setup, self.folder = setup, folder
        self.began, self.interrupted = began, interrupted
        training = setup.config.training
        self.batches = setup.batches()
        self.total_steps = total_steps(training, self.batches.batches_per_epoch)
        self.stop_at = min(training.stop_at or self.total_steps, self.total_steps)
        self.parts = setup.step_parts(self.total_steps)
        # Before the state: its arrays are given away with the first step.
        self.constants: Any = setup.constants(loaded)
        self.state = steps.initial_state(loaded.trainable, self.parts.optimizer, setup.mesh)
        self.key = jax.random.key(training.seed)
        self.before: dict[str, Any] = {}
        self.saved: int | None = None

    def run(self, resume: bool) -> dict[str, Any]:
        """Everything after loading."""
        self.folder.mkdir(parents=True, exist_ok=True)
        metrics.write_atomically(self.folder / "config.yaml", dump_config(self.setup.config))
        self.store = self.open_store(resume)
        start = self.restore() if resume else 0
        self.log = metrics.MetricsLog(self.folder / "metrics.jsonl", keep_until=start)
        self.scorer = self.setup.scorer()
        self.teacher: Any = self.setup.teacher(self.constants, self.folder)
        if not self.before:
            self.before = self.score("before")
        try:
            self.train(start)
        finally:
            self.log.close()
            self.store.close()
        return self.finish()

    def open_store(self, resume: bool) -> checkpoint.Checkpoints:
        """The checkpoint folder; what a killed first save left there is removed."""
        folder = self.folder / "checkpoints"
        if not (resume and checkpoint.has_checkpoints(folder)):
            checkpoint.discard(folder)
        return checkpoint.Checkpoints(folder, keep=self.setup.config.training.keep_checkpoints)

    def restore(self) -> int:
        """Go to the newest checkpoint; returns its step."""
        latest = self.store.latest_step()
        if latest is None:
            return 0
        found = self.store.restore(latest, self.saved_tree())
        self.constants = self.constants._replace(origin=found.state["origin"])
        self.state = steps.TrainState(**found.state["train"])
        self.batches.set_state(found.data["batches"])
        self.before, self.saved = found.data["before"], latest
        print(f"resumed at step {latest} from {self.store.path_of(latest)}", flush=True)
        return latest

    def saved_tree(self) -> dict[str, Any]:
        """The arrays of a checkpoint; the origin too, as another machine's SVD may differ."""
        return {"train": self.state._asdict(), "origin": self.constants.origin}

    def train(self, start: int) -> None:
        """Optimizer steps from ``start``; reported one step late, so that devices stay busy."""
        training, mesh = self.setup.config.training, self.setup.mesh
        step_fn = steps.compile_step(self.parts, self.state, mesh)
        shares_fn = steps.gradient_shares(self.parts)
        report = Reporter(self.log, training.log_every)
        bar = tqdm(total=self.stop_at, initial=start, desc="training", unit="step")
        with bar:
            for step in range(start + 1, self.stop_at + 1):
                self.stop_if_interrupted(step - 1, report, bar)
                rows = self.setup.prepare(next(self.batches), self.teacher)
                batch = steps.place_batch(rows, mesh)
                every = training.log_gradient_share_every
                shares = {}
                if every and step % every == 0:
                    shares = shares_fn(self.state, self.constants, batch, self.key)
                self.state, values = step_fn(self.state, self.constants, batch, self.key)
                self.check_finite(report.take(step, values | shares, bar))
                due = training.checkpoint_every and step % training.checkpoint_every == 0
                if due or step == self.stop_at:
                    self.check_finite(report.flush(bar))
                    self.save(step)
            self.stop_if_interrupted(self.stop_at, report, bar)

    def save(self, step: int) -> None:
        """Start a checkpoint of this step."""
        data = {"batches": self.batches.get_state(), "before": self.before}
        self.store.save(step, self.saved_tree(), data, identity_of(self.setup))
        self.saved = step

    def check_finite(self, row: dict[str, float] | None) -> None:
        """Raises RunStoppedError at the first loss or gradient that is not a number."""
        if row is None or (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            return
        self.store.wait()
        # A loss is that of the weights before its step, so the checkpoint just before is not good.
        good = self.store.latest_step(before=int(row["step"]) - 1)
        kept = "there is no good checkpoint yet"
        if good is not None:
            kept = f"the last good checkpoint is {self.store.path_of(good)}"
        raise RunStoppedError(
            f"training diverged at step {row['step']:.0f}: expected a finite loss and gradient, "
            f"got loss {row['loss']} and gradient norm {row['grad_norm']}; {kept}. Lower "
            "training.learning_rate and start again, or look at the data of this step."
        )

    def stop_if_interrupted(self, step: int, report: "Reporter", bar: tqdm) -> None:
        """On SIGTERM or SIGINT: log and save the steps done, and end with exit code 3."""
        if not self.interrupted:
            return
        self.check_finite(report.flush(bar))
        if self.saved != step:
            self.save(step)
        self.store.wait()
        raise RunStoppedError(
            f"interrupted by {self.interrupted[0]} after step {step}; everything is saved in "
            f"{self.store.path_of(step)}. Go on with --resume."
        )

    def score(self, title: str) -> dict[str, Any]:
        """Score the validation rows with the weights as they are now."""
        if self.scorer is None:
            return {}
        return self.scorer(self.constants, self.state.adapters, self.key, title)

    def finish(self) -> dict[str, Any]:
        """Export the adapter, score it, draw the curves, write the summary."""
        setup = self.setup
        written = self.export()
        after = self.score("after")
        drawn = metrics.draw_curves(
            metrics.read_metrics(self.folder / "metrics.jsonl"), self.folder / "curves.png"
        )
        summary = {
            "before": self.before,
            "after": after,
            "trainable_parameters": setup.trainable,
            "total_parameters": setup.total,
            "steps": int(self.state.step),
            "wall_seconds": round(time.monotonic() - self.began, 3),
            "peak_memory_bytes": metrics.peak_memory_bytes(),
            "versions": metrics.versions(),
            "device": metrics.device_description(),
        }
        text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
        metrics.write_atomically(self.folder / "summary.json", text)
        print(written)
        if drawn:
            print(f"curves:  {self.folder / 'curves.png'}")
        for name in (n for n in after if n in self.before and not _is_count(n)):
            rise = f"{self.before[name]:.3f} -> {after[name]:.3f}"
            title = name.replace("_", " ")
            print(f"{title} on held-out rows: {rise} in {summary['wall_seconds']:.0f} s")
        return summary

    def export(self) -> str:
        """Write the adapter, or of a full fine-tuning the whole model; says what was written."""
        setup, model = self.setup, self.setup.config.model
        if setup.config.adapter.method == "full":
            shutil.rmtree(self.folder / export.MODEL, ignore_errors=True)
            found = export.write_model(
                self.folder / export.MODEL, setup.base, self.state.adapters, model.dtype
            )
            return f"model: {found.folder} ({found.merged} tensors changed)"
        report = export.write_adapter(
            self.folder / export.ADAPTER,
            setup.base,
            model.name_or_path,
            setup.modules,
            self.state.adapters,
            self.constants.origin,
            use_rslora=use_rslora(setup),
            overwrite=True,
        )
        return f"adapter: {report.folder} (PEFT, rank {report.rank}, {report.parameters:,} numbers)"


def _is_count(figure: str) -> bool:
    """Whether a figure of a score is a number of rows (MNLI's two sets name theirs)."""
    return figure == "answered" or figure.split("_")[0] == "rows"


class Reporter:
    """Metrics from the device to the log, one step behind the computation."""

    def __init__(self, log: metrics.MetricsLog, every: int):
        self.log, self.every = log, every
        self.pending: tuple[int, Any] | None = None
        self.clock, self.tokens = time.monotonic(), 0.0

    def take(self, step: int, values: Any, bar: tqdm) -> dict[str, float] | None:
        """Remember a step's metrics; log and return those of the step before."""
        row = self.flush(bar)
        self.pending = (step, values)
        return row

    def flush(self, bar: tqdm) -> dict[str, float] | None:
        """Log what is remembered."""
        if self.pending is None:
            return None
        step, values = self.pending
        self.pending = None
        row = {"step": step} | {name: float(v) for name, v in jax.device_get(values).items()}
        self.tokens += row["tokens"]
        bar.update(1)
        bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
        finite = math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])
        if finite and (step % self.every == 0 or step == 1):
            now = time.monotonic()
            speed = self.tokens / max(now - self.clock, 1e-9)
            self.clock, self.tokens = now, 0.0
            self.log.write(row | {"tokens": int(row["tokens"]), "tokens_per_second": speed})
        return row


def total_steps(config: TrainingConfig, batches_per_epoch: Callable[[], int]) -> int:
    """Optimizer steps of the whole run."""
    if config.max_steps is not None:
        return config.max_steps
    assert config.epochs is not None
    return math.ceil(config.epochs * batches_per_epoch())


def use_rslora(run: Run) -> bool:
    """Whether the scales are alpha / √rank."""
    if run.peft is not None:
        return bool(run.peft.config.get("use_rslora"))
    return run.config.adapter.use_rslora


def identity_of(run: Run) -> checkpoint.Identity:
    """What a checkpoint must agree with to be resumed."""
    return checkpoint.Identity(run.config.model_dump(mode="json"), run.base.fingerprint)


def describe(run: Run) -> None:
    """What is about to run: config, layers, counts, data and one example with its loss mask."""
    print(dump_config(run.config).rstrip())
    kinds = sorted({module.path.rsplit(".", 1)[-1] for module in run.modules})
    layers = f"{len(run.modules)} layers ({', '.join(kinds)})" if kinds else "none, full model"
    share = 100.0 * run.trainable / run.total
    print(f"base: {run.base.folder} ({run.base.config.model_type}, {run.total:,} parameters)")
    print(f"adapters: {layers}, {run.trainable:,} trainable parameters ({share:.2f} %)")
    print(f"devices: {metrics.device_description()}, mesh {dict(run.mesh.shape)}")
    print(*run.describe(), sep="\n", flush=True)


def check_workdir(folder: Path, resume: bool) -> None:
    """Raises InputError unless the folder can be written and does not hold another run."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--workdir {folder}: expected a folder, got a file. Choose another.")
    holds_run = (folder / "config.yaml").exists() or (folder / "checkpoints").exists()
    if holds_run and not resume:
        raise InputError(
            f"--workdir {folder}: expected a new or empty folder, got one that holds a run. "
            "Add --resume to go on with it, or choose another folder."
        )
    existing = folder
    while not existing.exists():
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(
            f"--workdir {folder}: expected a folder that can be written, got "
            f"{os.strerror(error.errno or 0)}. Choose another or change its permissions."
        ) from error


def check_model_folder(config: RunConfig, folder: Path, resume: bool) -> None:
    """Raises InputError where the model of a full fine-tuning would replace one of the user's."""
    target = folder / export.MODEL
    full = config.adapter.method == "full"
    if full and target.exists() and not (resume and (folder / "config.yaml").exists()):
        raise InputError(
            f"--workdir {folder}: expected no {export.MODEL}/ in it before a full fine-tuning, "
            "which writes one, got one. Choose another folder."
        )


@contextmanager
def interruptions() -> Iterator[list[str]]:
    """Collect the names of SIGTERM and SIGINT instead of dying; the loop looks between steps."""
    received: list[str] = []

    def note(number: int, _frame: object) -> None:
        received.append(signal.Signals(number).name)
        if len(received) > 1:
            raise KeyboardInterrupt

    try:
        previous = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread: the embedding program handles signals
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
