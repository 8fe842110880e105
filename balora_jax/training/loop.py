"""One run from start to end: score, train with checkpoints, export, score again."""

import functools
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from balora_jax import hardware
from balora_jax.config import RunConfig, TrainingConfig
from balora_jax.config_file import dump_config
from balora_jax.errors import RunStoppedError
from balora_jax.io import checkpoint, drawing, metrics
from balora_jax.io.folders import write_atomically
from balora_jax.parallel import hosts
from balora_jax.pretrained import export
from balora_jax.tasks.assemble import Loaded
from balora_jax.tasks.labels import run as label_run
from balora_jax.tasks.labels.run import LabelRun
from balora_jax.tasks.text import run as text_run
from balora_jax.tasks.text.run import TextRun
from balora_jax.training import steps
from balora_jax.training.profiling import Profile
from balora_jax.training.reporting import Reporter, divergence, progress
from balora_jax.training.workdir import check_model_folder, check_workdir, make_folder

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
        RunStoppedError: diverged, interrupted after a checkpoint, or a device, a host or the disk
            failed.
    """
    folder, began = Path(workdir), time.monotonic()
    with failures(folder):
        hosts.by_first(functools.partial(check_folders, config, folder, resume))
        check = label_run.check if config.task == "nlu" else text_run.check
        run: Run = check(config)
        step = last_step(run, folder) if resume else None
        loaded = run.load()
        describe(run)
        with jax.set_mesh(run.mesh), interruptions() as interrupted:
            return Training(run, loaded, folder, began, interrupted).run(step)


def check_folders(config: RunConfig, folder: Path, resume: bool) -> None:
    """Raises InputError unless the run may write to ``folder``."""
    check_workdir(folder, resume)
    check_model_folder(config, folder, resume)


def last_step(run: Run, folder: Path) -> int | None:
    """The step of the newest whole checkpoint; None where there is none.

    Raises:
        InputError: all are damaged, or that one is of another run.
    """
    step, found = hosts.by_first(lambda: checkpoint.newest_whole(folder / "checkpoints"))
    hosts.say(*found)
    if step is not None:
        store = checkpoint.Checkpoints(folder / "checkpoints", keep=10**6)
        checkpoint.check_same_run(store.identity(step), identity_of(run), f"{folder}: --resume")
        store.close()
    return step


@contextmanager
def failures(folder: Path) -> Iterator[None]:
    """Turn what a device, another host or the disk does to a run into its end.

    Raises:
        RunStoppedError: in one sentence.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        line = " ".join(str(error).split())[:300]
        advice = "Go on with --resume."
        if "RESOURCE_EXHAUSTED" in line:
            advice = (
                "Lower training.batch_size, raise training.accumulation or mesh.fsdp, or set "
                "model.remat=full; balora plan says what fits."
            )
        elif jax.process_count() > 1:
            advice = "Another host may be gone. Start all processes again with --resume."
        raise RunStoppedError(f"{folder}: a device or a host failed: {line} {advice}") from error
    except OSError as error:
        raise RunStoppedError(
            f"{folder}: expected to read and write there, got: {error.strerror or error}. Correct "
            "that and go on with --resume."
        ) from error


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
        self.postponed = False

    def run(self, resumed: int | None) -> dict[str, Any]:
        """Everything after loading, from the checkpoint of a step on if one is given."""
        make_folder(self.folder)
        if hosts.is_first():
            text = dump_config(self.setup.config)
            write_atomically(self.folder / "config.yaml", text)
        self.store = self.open_store(resumed)
        start = 0 if resumed is None else self.restore(resumed)
        self.log = None
        if hosts.is_first():
            self.log = metrics.MetricsLog(self.folder / "metrics.jsonl", keep_until=start)
        self.scorer = self.setup.scorer()
        self.teacher: Any = self.setup.teacher(self.constants, self.folder)
        if not self.before:
            self.before = self.score("before")
        try:
            self.train(start)
        finally:
            if self.log is not None:
                self.log.close()
        self.store.close()
        return self.finish()

    def open_store(self, resumed: int | None) -> checkpoint.Checkpoints:
        """The checkpoint folder; what a killed first save left there is removed."""
        folder = self.folder / "checkpoints"
        if resumed is None and hosts.is_first():
            checkpoint.discard(folder)
        hosts.barrier("checkpoints")
        return checkpoint.Checkpoints(folder, keep=self.setup.config.training.keep_checkpoints)

    def restore(self, step: int) -> int:
        """Go to the checkpoint of a step; returns it."""
        found = self.store.restore(step, self.saved_tree())
        self.constants = self.constants._replace(origin=found.state["origin"])
        self.state = steps.TrainState(**found.state["train"])
        self.batches.set_state(found.data["batches"])
        self.before, self.saved = found.data["before"], step
        hosts.say(f"resumed at step {step} from {self.store.path_of(step)}")
        return step

    def saved_tree(self) -> dict[str, Any]:
        """The arrays of a checkpoint; the origin too, as another machine's SVD may differ."""
        return {"train": self.state._asdict(), "origin": self.constants.origin}

    def train(self, start: int) -> None:
        """Optimizer steps from ``start``; reported one step late, so that devices stay busy."""
        training, mesh = self.setup.config.training, self.setup.mesh
        step_fn = steps.compile_step(self.parts, self.state, mesh)
        shares_fn = steps.gradient_shares(self.parts)
        self.report = Reporter(self.log, training.log_every, self.setup.step_flops, peak_of(mesh))
        profile = Profile(training.profile_steps, self.folder / "profile")
        with progress(self.stop_at, start) as bar, profile:
            for step in range(start + 1, self.stop_at + 1):
                self.stop_if_interrupted(step - 1, bar)
                rows = self.setup.prepare(next(self.batches), self.teacher)
                batch = steps.place_batch(rows, mesh)
                every = training.log_gradient_share_every
                shares = {}
                if every and step % every == 0:
                    shares = shares_fn(self.state, self.constants, batch, self.key)
                profile.before(step, self.state)
                with profile.named(step):
                    self.state, values = step_fn(self.state, self.constants, batch, self.key)
                self.check_row(self.report.take(step, values | shares, bar))
                profile.after(step, self.state)
                self.store.poll()
                due = training.checkpoint_every and step % training.checkpoint_every == 0
                if due or self.postponed or step == self.stop_at:
                    self.save_if_good(step, bar)
            self.stop_if_interrupted(self.stop_at, bar)

    def save_if_good(self, step: int, bar: tqdm) -> None:
        """A checkpoint of this step, or of the next one whose update was made.

        While updates are left out the weights may be to blame, and older checkpoints must stay.
        """
        row = self.report.flush(bar)
        self.check_row(row)
        self.postponed = row is not None and row["skipped_in_a_row"] > 0 and step < self.stop_at
        if not self.postponed:
            self.save(step)

    def save(self, step: int) -> None:
        """Start a checkpoint of this step."""
        if not bool(steps.all_finite(self.state.adapters)):
            raise RunStoppedError(
                f"training diverged by step {step}: expected finite weights, got others; "
                f"{self.good_before(step)}. Lower training.learning_rate and start again."
            )
        data = {"batches": self.batches.get_state(), "before": self.before}
        self.store.save(step, self.saved_tree(), data, identity_of(self.setup))
        self.saved = step

    def check_row(self, row: dict[str, float] | None) -> None:
        """Raises RunStoppedError where more updates were left out in a row than may be.

        A run must not end on a loss that is not finite: nobody would know its weights to be good.
        """
        if row is None:
            return
        finite = math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])
        may_go_on = finite or row["step"] < self.stop_at
        most = self.setup.config.training.max_skipped if may_go_on else 0
        if row["skipped_in_a_row"] <= most:
            return
        # A loss is that of the weights before its step, so the checkpoint just before is not good.
        first = int(row["step"] - row["skipped_in_a_row"]) + 1
        raise RunStoppedError(divergence(row, most, self.good_before(first - 1)))

    def good_before(self, step: int) -> str:
        """Says which checkpoint is the newest before a step."""
        self.store.wait()
        good = self.store.latest_step(before=step)
        if good is None:
            return "there is no good checkpoint yet"
        return f"the last good checkpoint is {self.store.path_of(good)}"

    def stop_if_interrupted(self, step: int, bar: tqdm) -> None:
        """On SIGTERM or SIGINT: log and save the steps done, and end with exit code 3.

        With several processes all of them stop at the same step, whichever got the signal.
        """
        if hosts.preempted(step):
            self.interrupted.append("SIGTERM")
        if not self.interrupted:
            return
        self.check_row(self.report.flush(bar))
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
        summary = {
            "before": self.before,
            "after": after,
            "trainable_parameters": setup.trainable,
            "total_parameters": setup.total,
            "steps": int(self.state.step),
            "skipped_updates": int(self.state.guard.skipped),
            "wall_seconds": round(time.monotonic() - self.began, 3),
            "peak_memory_bytes": hardware.peak_memory_bytes(),
            "versions": hardware.versions(),
            "device": hardware.device_description(),
        }
        if hosts.is_first():
            write_results(self.folder, summary, written)
        hosts.barrier("finished")
        return summary

    def export(self) -> str:
        """Write the adapter, or of a full fine-tuning the whole model; says what was written."""
        setup, model = self.setup, self.setup.config.model
        trainable = hosts.gathered_all(self.state.adapters)
        origin = hosts.gathered_all(self.constants.origin)
        if not hosts.is_first():
            return ""
        if setup.config.adapter.method == "full":
            shutil.rmtree(self.folder / export.MODEL, ignore_errors=True)
            found = export.write_model(
                self.folder / export.MODEL, setup.base, trainable, model.dtype
            )
            return f"model: {found.folder} ({found.merged} tensors changed)"
        report = export.write_adapter(
            self.folder / export.ADAPTER,
            setup.base,
            model.name_or_path,
            setup.modules,
            trainable,
            origin,
            use_rslora=use_rslora(setup),
            overwrite=True,
        )
        return f"adapter: {report.folder} (PEFT, rank {report.rank}, {report.parameters:,} numbers)"


def write_results(folder: Path, summary: dict[str, Any], written: str) -> None:
    """The summary and the curves of a finished run, and what was gained, for the reader."""
    rows = metrics.read_metrics(folder / "metrics.jsonl")
    drawn = drawing.draw_curves(rows, folder / "curves.png")
    text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / "summary.json", text)
    print(written)
    if drawn:
        print(f"curves:  {folder / 'curves.png'}")
    before, after = summary["before"], summary["after"]
    for name in (n for n in after if n in before and not _is_count(n)):
        rise = f"{before[name]:.3f} -> {after[name]:.3f}"
        title = name.replace("_", " ")
        print(f"{title} on held-out rows: {rise} in {summary['wall_seconds']:.0f} s")


def _is_count(figure: str) -> bool:
    """Whether a figure of a score is a number of rows (MNLI's two sets name theirs)."""
    return figure == "answered" or figure.split("_")[0] == "rows"


def total_steps(config: TrainingConfig, batches_per_epoch: Callable[[], int]) -> int:
    """Optimizer steps of the whole run."""
    if config.max_steps is not None:
        return config.max_steps
    assert config.epochs is not None
    return math.ceil(config.epochs * batches_per_epoch())


def peak_of(mesh: Mesh) -> float | None:
    """Published operations per second of all devices; None for devices that nobody lists."""
    peak = hardware.peak_flops(mesh.devices.flat[0].device_kind)
    return None if peak is None else peak * mesh.size


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
    kinds = sorted({module.path.rsplit(".", 1)[-1] for module in run.modules})
    layers = f"{len(run.modules)} layers ({', '.join(kinds)})" if kinds else "none, full model"
    share = 100.0 * run.trainable / run.total
    devices = f"devices: {hardware.device_description()}, mesh {dict(run.mesh.shape)}"
    if jax.process_count() > 1:
        devices += f", {jax.process_count()} processes"
    hosts.say(
        dump_config(run.config).rstrip(),
        f"base: {run.base.folder} ({run.base.config.model_type}, {run.total:,} parameters)",
        f"adapters: {layers}, {run.trainable:,} trainable parameters ({share:.2f} %)",
        devices,
        *run.describe(),
    )


@contextmanager
def interruptions() -> Iterator[list[str]]:
    """Collect the names of SIGTERM and SIGINT instead of dying; the loop looks between steps."""
    received: list[str] = []
    several = jax.process_count() > 1

    def note(number: int, _frame: object) -> None:
        if several:
            # The runtime takes SIGTERM, and lets all processes agree on the step to stop after.
            os.kill(os.getpid(), signal.SIGTERM)
            return
        received.append(signal.Signals(number).name)
        if len(received) > 1:
            raise KeyboardInterrupt

    try:
        taken = (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT)
        previous = {s: signal.signal(s, note) for s in taken}
    except ValueError:  # not in the main thread: the embedding program handles signals
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
