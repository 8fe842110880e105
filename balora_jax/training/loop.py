"""The training loop: optimizer steps with log and checkpoints; it knows no task."""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from balora_jax import hardware
from balora_jax.config import TrainingConfig
from balora_jax.config_file import dump_config
from balora_jax.errors import RunStoppedError
from balora_jax.io import checkpoint, checkpoint_folder, metrics, same_run
from balora_jax.io.drawing import LiveCurves
from balora_jax.io.folders import write_atomically
from balora_jax.io.keeper import Keeper
from balora_jax.parallel import hosts
from balora_jax.progress import Bar
from balora_jax.signals import Signals
from balora_jax.training import expert_order, steps
from balora_jax.training.held_out import Figures, HeldOut
from balora_jax.training.profiling import Profile
from balora_jax.training.records import Records
from balora_jax.training.reporting import Filled, Reporter, divergence, progress
from balora_jax.training.run import Loaded, Run, Scored
from balora_jax.training.trackers.tracker import Callback, Trackers
from balora_jax.training.workdir import (
    CHECKPOINTS,
    CONFIG,
    CURVES,
    HEADER,
    METRICS,
    PROFILE,
    SKIPPED,
    agree_on_folder,
    remove_leftovers,
)


class Training:
    """The state of one run while it trains.

    Args:
        run: what the task gives.
        loaded: its arrays at step 0; the trainable ones are given away with the first step.
        folder: of the run, held by its lock; the first thing is written here, after all that may
            be refused.
        signals: what takes SIGTERM and SIGINT.
        trackers: those that the config names, and the caller's callbacks.
        found: the checkpoints of a run to go on with; None for a new one.
        shared: for what several runs need of one teacher; None for the run's own folder.
        keeper: keeps the folder.
        on_best: called where the held-out rows are better off than ever, to write that down.
    """

    def __init__(
        self,
        run: Run,
        loaded: Loaded,
        folder: Path,
        signals: Signals,
        *,
        trackers: Sequence[Callback] = (),
        found: checkpoint_folder.Found | None,
        shared: Path | None = None,
        keeper: Keeper,
        on_best: Callable[["Training"], None] = lambda _: None,
    ):
        self.keeper, self.on_best = keeper, on_best
        self.run, self.folder, self.signals = run, folder, signals
        training = run.config.training
        self.batches = run.batches()
        self.total_steps = total_steps(training, self.batches.batches_per_epoch)
        self.stop_at = min(training.stop_at or self.total_steps, self.total_steps)
        self.parts = run.step_parts(self.total_steps)
        # Before the state: its arrays are given away with the first step.
        self.constants: Any = run.constants(loaded)
        self.state = steps.initial_state(loaded.trainable, self.parts.optimizer, run.mesh)
        self.key = jax.random.key(training.seed)
        self.before: dict[str, Any] = {}
        self.saved: int | None = None
        self.latest: tuple[int, Scored] | None = None  # the step and what its score found
        self.skipping = self.postponed = False
        self.start = 0
        self.scorer, self.records = run.scorer(), Records(folder)
        self.held_out = HeldOut(
            run.config.eval, training, run.validator(), self.total_steps, self.state.adapters
        )
        if found is not None and found.step is not None:
            self.store = self.open_store()
            self.start = self.restore(found.step)
        open_folder(folder, run, found, apart=keeper.apart)
        if self.start:
            self.store.look_again()
        else:
            self.store = self.open_store()
        self.records.begin(self.start)
        self.log = open_log(folder, self.start)
        keeper.push()
        told = trackers if hosts.is_first() else ()
        self.trackers = Trackers(told, folder, run.config.model_dump(mode="json"), folder / METRICS)
        self.report = reporter_of(run, self.log, self.trackers, folder)
        self.teacher: Any = run.teacher(self.constants, folder, shared)

    def open_store(self) -> checkpoint.Checkpoints:
        """The checkpoints of the run."""
        keep = self.run.config.training.keep_checkpoints
        return checkpoint.Checkpoints(self.folder / CHECKPOINTS, keep=keep, keeper=self.keeper)

    def restore(self, step: int) -> int:
        """Go to the checkpoint of a step; returns it.

        What it says of held-out rows is kept if it is of the same rows and settings; else the start
        is scored and measured again, before its weights are given up.
        """
        path = self.store.path_of(step)
        saved, data = checkpoint.read_identity(path).config, checkpoint.read_data(path)
        alike = same_run.scored_alike(saved, identity_of(self.run).config)
        again = {} if alike else self.score("before")
        known = data.get("held_out") if alike else None
        if known is None and "held_out" in data:
            hosts.say("the held-out rows or their settings are others: the best is looked for anew")
        if known is None or not known["before"]:
            self.held_out.begin(self.constants, self.state.adapters)
        found = self.store.restore(step, self.saved_tree())
        held = expert_order.as_held(found.state, self.run.base.config)
        self.constants = self.constants._replace(origin=held["origin"])
        self.state = steps.TrainState(**held["train"])
        self.batches.set_state(found.data["batches"])
        self.before, self.saved = found.data["before"] if alike else again, step
        if known is not None:
            self.held_out.set_state(known, held.get("best"))
        hosts.say(f"resumed at step {step} from {self.store.path_of(step)}")
        return step

    def saved_tree(self) -> dict[str, Any]:
        """The arrays of a checkpoint; the origin too, as another machine's SVD may differ."""
        found = {"train": self.state._asdict(), "origin": self.constants.origin}
        kept = self.held_out.kept
        return found if kept is None else found | {"best": kept}

    def train(self) -> None:
        """All steps that are left, with the log and the checkpoints closed after them."""
        with ExitStack() as polite:
            done = False
            try:
                self.go_on_with_the_best()
                self.take_steps(polite)
                done = True
            finally:
                if not done:
                    self.store.abandon()
                if self.log is not None:
                    self.log.close()
            self.store.close()

    def take_steps(self, polite: ExitStack) -> None:
        """Optimizer steps; reported one step late, so that devices stay busy.

        Once the step is compiled, ``polite`` gets what lets a signal wait for the end of a step.
        """
        training, mesh = self.run.config.training, self.run.mesh
        step_fn = steps.compile_step(self.parts, self.state, mesh)
        shares_fn = steps.gradient_shares(self.parts)
        profile = Profile(training.profile_steps, self.folder / PROFILE)
        self.report.restart()
        with progress(self.stop_at, self.start) as bar, profile:
            for step in range(self.start + 1, self.stop_at + 1):
                self.stop_if_interrupted(step - 1, bar)
                rows = self.run.prepare(next(self.batches), self.teacher)
                batch = steps.place_batch(rows, mesh)
                every = training.log_gradient_share_every
                shares = {}
                if every and step % every == 0:
                    shares = shares_fn(self.state, self.constants, batch, self.key)
                profile.before(step, self.state)
                with profile.named(step):
                    self.state, values = step_fn(self.state, self.constants, batch, self.key)
                if step == self.start + 1:
                    polite.enter_context(self.signals.polite())
                filled = Filled(rows["input_ids"].shape, self.batches.tokens(rows))
                self.settle(self.report.take(step, values | shares, bar, filled))
                profile.after(step, self.state)
                if self.held_out.due(step):
                    self.measure(step, bar)
                self.store.poll()
                due = training.checkpoint_every and step % training.checkpoint_every == 0
                if due or self.postponed or step == self.stop_at:
                    self.save_if_good(step, bar)
                if step == self.stop_at:  # which may have moved
                    break
            self.stop_if_interrupted(self.stop_at, bar)

    def go_on_with_the_best(self) -> None:
        """After a resume: what was best is written again, and a run that it stopped stays so."""
        if self.held_out.best is not None:
            self.on_best(self)
        if self.held_out.exhausted:
            self.stop_at = self.start
            hosts.say(self.held_out.ending(self.start))

    def measure(self, step: int, bar: Bar) -> None:
        """Measure the held-out rows after a step, for its row of the log, and stop if it is time.

        The best so far is written down before the row and before a checkpoint: one that a kill
        leaves without them is found again by the run that goes on.
        """
        held_out = self.held_out

        def figures() -> Figures:
            bar.clear()
            adapters, constants = self.state.adapters, self.constants
            found = held_out.measure(step, constants, adapters, self.score)
            skipped = int(self.state.guard.skipped)
            if held_out.compare(step, found, adapters, skipped):
                self.keeper.check()
                self.on_best(self)
            return found

        row = self.report.flush(bar, figures)
        if held_out.exhausted:
            self.stop_at = step
            hosts.say(held_out.ending(step))
        self.settle(row)

    def settle(self, row: dict[str, float] | None) -> None:
        """Check the row of a step, and remember whether its update was made."""
        if row is not None:
            self.check_row(row)
            self.skipping = row["skipped_in_a_row"] > 0

    def save_if_good(self, step: int, bar: Bar) -> None:
        """A checkpoint of this step, or of the next one whose update was made.

        While updates are skipped the weights may be to blame, and older checkpoints must stay.
        """
        self.settle(self.report.flush(bar))
        self.postponed = self.skipping and step < self.stop_at
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
        if self.held_out.is_on:
            data["held_out"] = self.held_out.get_state()
        tree = expert_order.as_stored(self.saved_tree(), self.run.base.config)
        self.store.save(step, tree, data, identity_of(self.run))
        self.saved = step

    def check_row(self, row: dict[str, float]) -> None:
        """Raises RunStoppedError where more updates were skipped in a row than may be.

        A run must not end on a loss that is not finite: nobody would know its weights to be good.
        """
        finite = math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])
        may_go_on = finite or row["step"] < self.stop_at
        most = self.run.config.training.max_skipped if may_go_on else 0
        if row["skipped_in_a_row"] <= most:
            return
        # A loss is that of the weights before its step, so the checkpoint just before is not good.
        first = int(row["step"] - row["skipped_in_a_row"]) + 1
        raise RunStoppedError(divergence(row, most, self.good_before(first - 1)))

    def good_before(self, step: int) -> str:
        """Names the newest good checkpoint before a step."""
        self.store.wait()
        good = self.store.latest_step(before=step)
        if good is None:
            return "there is no good checkpoint yet"
        return f"the last good checkpoint is {self.store.path_of(good)}"

    def stop_if_interrupted(self, step: int, bar: Bar) -> None:
        """On SIGTERM or SIGINT: log and save the steps done, and end with exit code 3.

        With several processes all of them stop at the same step, whichever got the signal.
        """
        received = self.signals.received
        if hosts.preempted(step):
            received.append("SIGTERM")
        if not received:
            return
        self.settle(self.report.flush(bar))
        if self.saved != step:
            self.save(step)
        self.store.wait()
        hosts.barrier("saved")  # the first process seals; who left earlier would be missed
        raise RunStoppedError(
            f"interrupted by {received[0]} after step {step}; everything is saved in "
            f"{self.store.path_of(step)}. Go on with --resume."
        )

    def score(self, title: str) -> dict[str, Any]:
        """Score the validation rows with the weights as they are now; keeps what is predicted.

        Args:
            title: ``before``, ``after``, or during the training ``step N``.
        """
        if self.scorer is None:
            return {}
        found = self.scorer(self.constants, self.state.adapters, self.key, title)
        self.keeper.check()
        self.latest = int(self.state.step), found
        self.records.keep(title, *self.latest)
        return found.figures

    def score_before(self) -> None:
        """Score and measure the start, unless the run that goes on has done so."""
        if not self.before and not self.start:
            self.before = self.score("before")
        if self.held_out.validator is not None and not self.held_out.before:
            self.held_out.begin(self.constants, self.state.adapters)
            self.report.begin(self.held_out.before)

    def score_after(self) -> dict[str, Any]:
        """Score the end, unless that was done after the last step."""
        if self.latest is None or self.latest[0] != int(self.state.step):
            return self.score("after")
        self.keeper.check()
        self.records.keep("after", *self.latest)
        return self.latest[1].figures

    def measure_after(self) -> Figures:
        """The loss and the terms of the held-out rows at the end."""
        step = int(self.state.step)
        return self.held_out.validate(step, "after", self.constants, self.state.adapters)


def open_folder(
    folder: Path, run: Run, found: checkpoint_folder.Found | None, *, apart: bool
) -> None:
    """The first writing: tidy the folder of a run to go on with, and put the config in it.

    Hosts share it, unless it lies ``apart`` on each of them.
    """
    if hosts.is_first():
        remove_leftovers(folder)
        if found is not None:
            checkpoint_folder.tidy(folder / CHECKPOINTS, found)
        write_atomically(folder / CONFIG, HEADER + dump_config(run.config))
        if run.left_out:
            rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in run.left_out)
            write_atomically(folder / SKIPPED, rows)
    if jax.process_count() > 1 and not apart:
        agree_on_folder(folder)
    if found is not None:
        hosts.say(*found.said)


def open_log(folder: Path, start: int) -> metrics.MetricsLog | None:
    """The log of the first process, without rows after ``start``; None in all others."""
    if not hosts.is_first():
        return None
    # A row of step 0 is written anew with the first step.
    log = metrics.MetricsLog(folder / METRICS, keep_until=start or -1)
    if log.unread:
        hosts.say(f"{folder / METRICS}: {log.unread} lines are no rows; moved to {metrics.ASIDE}")
    return log


def reporter_of(
    run: Run, log: metrics.MetricsLog | None, trackers: Trackers, folder: Path
) -> Reporter:
    """What writes the rows of a run, and draws its curves in its folder."""
    return Reporter(
        log,
        run.config.training.log_every,
        run.step_flops,
        peak_of(run.mesh),
        trackers,
        LiveCurves(folder / METRICS, folder / CURVES),
    )


def resumable(run: Run, folder: Path) -> checkpoint_folder.Found:
    """The checkpoints of a run to go on with; changes nothing.

    Raises:
        InputError: all are damaged, or the newest whole one is of another run, of other data, or
            of another version.
    """
    mine: list[checkpoint_folder.Found] = []

    def find() -> tuple[int | None, list[str]]:
        mine.append(_found(run, folder))
        return mine[0].step, mine[0].said

    step, said = hosts.by_first(find)
    return mine[0] if mine else checkpoint_folder.Found(step, said, [], [])


def _found(run: Run, folder: Path) -> checkpoint_folder.Found:
    found = checkpoint_folder.look(folder / CHECKPOINTS)
    if found.step is not None:
        path = folder / CHECKPOINTS / str(found.step)
        saved = checkpoint.read_identity(path)
        now = identity_of(run)
        extend = run.config.training.extend
        same_run.check_same_run(saved, now, f"{folder}: --resume", extend=extend)
        found = found._replace(said=[*found.said, *same_run.extension(saved, now)])
        run.batches().set_state(checkpoint.read_data(path)["batches"])
    return found


def identity_of(run: Run) -> same_run.Identity:
    """What a checkpoint must agree with to be resumed."""
    return same_run.Identity(
        run.config.model_dump(mode="json"), run.base.fingerprint, run.adapters.start.fingerprint
    )


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
