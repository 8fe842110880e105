"""Reports and log of a run while it trains."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from balora_jax.io import metrics
from balora_jax.io.drawing import LiveCurves
from balora_jax.parallel import hosts
from balora_jax.progress import Bar, progress_bar
from balora_jax.training.trackers.tracker import Trackers

Measure = Callable[[], dict[str, float | None]]
"""What measures more figures of a step, by their names in the log."""

COUNTS = ("tokens", "skipped", "skipped_in_a_row")


class Filled(NamedTuple):
    """What is known of a step's batch before it is computed.

    Attributes:
        shape: [micro-batches, B, T].
        real: places that hold a token.
    """

    shape: tuple[int, ...]
    real: int


class Reporter:
    """Metrics from the devices to the log, one step behind the computation.

    Args:
        log: the file, or None in a process that does not write it.
        every: steps between its rows.
        flops: model FLOPs of a step by the shape of its batch and its counted tokens.
        peak: FLOPs per second of all devices; None where not known.
        trackers: what gets each row of the log as well.
        curves: what draws the log while the run goes on.
    """

    def __init__(
        self,
        log: metrics.MetricsLog | None,
        every: int,
        flops: Callable[[Sequence[int], float], float],
        peak: float | None,
        trackers: Trackers | None = None,
        curves: LiveCurves | None = None,
    ):
        self.trackers, self.curves = trackers, curves
        self.log, self.every, self.flops, self.peak = log, every, flops, peak
        self.pending: tuple[int, Any, Filled] | None = None
        self.clock, self.tokens, self.steps, self.work = time.monotonic(), 0.0, 0, 0.0
        self.real, self.places = 0, 0

    def restart(self) -> None:
        """Measure the speed from now on."""
        self.clock, self.tokens, self.steps, self.work = time.monotonic(), 0.0, 0, 0.0
        self.real, self.places = 0, 0

    def take(self, step: int, values: Any, bar: Bar, batch: Filled) -> dict[str, float] | None:
        """Remember a step's metrics; log and return those of the step before."""
        row = self.flush(bar)
        self.pending = (step, values, batch)
        return row

    def flush(self, bar: Bar, measure: Measure | None = None) -> dict[str, float] | None:
        """Wait for the remembered step, log it if it is due, return it.

        With ``measure`` it is due; its row gets those figures as well, whose time is no step's.
        """
        if self.pending is None:
            return None
        step, values, batch = self.pending
        self.pending = None
        row = {"step": step} | {name: float(v) for name, v in jax.device_get(values).items()}
        self.tokens += row["tokens"]
        self.steps += 1
        self.work += self.flops(batch.shape, row["tokens"])
        self.real, self.places = self.real + batch.real, self.places + math.prod(batch.shape)
        shown = {"loss": f"{row['loss']:.4f}"}
        if row["skipped"]:
            shown["skipped"] = f"{row['skipped']:.0f}"
        bar.set_postfix(shown, refresh=False)
        bar.update(1)
        if measure or step % self.every == 0 or step == 1 or row["skipped_in_a_row"]:
            self._write(row, measure)
        return row

    def begin(self, figures: dict[str, float | None]) -> None:
        """A row of step 0: figures of the start, and nothing in the columns of a step."""
        if self.log is not None:
            self.log.write({**dict.fromkeys(metrics.columns()), "step": 0, **figures})

    def _write(self, row: dict[str, float], measure: Measure | None) -> None:
        seconds = max(time.monotonic() - self.clock, 1e-9)
        speed = {"tokens_per_second": self.tokens / seconds, "step_seconds": seconds / self.steps}
        if self.peak is not None:
            speed["mfu"] = self.work / seconds / self.peak
        speed["fill"] = self.real / self.places
        figures: dict[str, float | None] = {} if measure is None else measure()
        if self.log is not None:
            whole = {name: int(row[name]) for name in COUNTS}
            # JSON knows no NaN: what is not finite is null.
            finite = {name: v if math.isfinite(v) else None for name, v in row.items()}
            self.log.write({**finite, **whole, **speed, **figures})
            if self.trackers is not None:
                self.trackers.log({**finite, **whole, **speed, **figures})
        self.restart()
        if self.log is not None and self.curves is not None:
            self.curves.follow()  # while the devices go on: the time is that of the next row


def progress(total: int, start: int) -> Bar:
    """The bar of the optimizer steps; the first process shows it."""
    return progress_bar(
        total=total, initial=start, desc="training", unit="step", disable=not hosts.is_first()
    )


def divergence(row: dict[str, float], most: int, kept: str) -> str:
    """The sentence for a run that stops because its updates cannot be trusted any more."""
    times = "" if most == 0 else f" for {row['skipped_in_a_row']:.0f} steps one after another"
    return (
        f"training diverged at step {row['step']:.0f}: expected a finite loss and gradient without "
        f"a spike, got loss {row['loss']} and gradient norm {row['grad_norm']}{times}; {kept}. "
        "Lower training.learning_rate and start again, or look at the data of this step."
    )
