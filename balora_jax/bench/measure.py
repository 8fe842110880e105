"""Time and memory of steps whose cases alternate on one machine.

Whole steps are timed, in turn, so that a machine whose speed drifts slows all of them alike; ratios
are taken within a round.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from balora_jax.plan.compiled import memory_of
from balora_jax.tasks.text.program import TextProgram
from balora_jax.training import steps
from balora_jax.training.run import Loaded

Step = Callable[[], Mapping[str, Any]]
"""Runs one optimizer step; returns at least ``seconds`` and ``loss``."""


@dataclass
class Measured:
    """Measurements of one case.

    Attributes:
        seconds: of a step, the mean of each counted round.
        losses: of every step, the first included.
        memory: bytes per device by the compiler; of the reference, none.
        compile_seconds: tracing and compilation.
        rss_growth: most bytes by which a step raised the resident memory of its process; None where
            the system does not tell.
        device_peak: most bytes in use on a device, where the device tells.
    """

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    memory: dict[str, int] | None = None
    compile_seconds: float | None = None
    rss_growth: int | None = None
    device_peak: int | None = None

    @property
    def median(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.seconds)


class OurStep:
    """A compiled training step of this package with its state, on batches that it takes in turn."""

    def __init__(
        self,
        parts: steps.StepParts,
        mesh: Mesh,
        trainable: dict[str, Any],
        constants: Any,
        batches: Sequence[Mapping[str, Any]],
        seed: int,
    ):
        self.mesh, self.key, self.constants = mesh, jax.random.key(seed), constants
        self.compiled: dict[tuple[int, ...], Any] = {}
        with jax.set_mesh(self.mesh):
            self.state = steps.initial_state(trainable, parts.optimizer, self.mesh)
            self.batches = [steps.place_batch(dict(batch), self.mesh) for batch in batches]
            step = steps.compile_step(parts, self.state, self.mesh)
            began = time.perf_counter()
            for batch in self.batches:
                shape = batch["input_ids"].shape
                arguments: tuple[Any, ...] = (self.state, self.constants, batch, self.key)
                if shape not in self.compiled:
                    self.compiled[shape] = step.lower(*arguments).compile()
        self.compile_seconds = time.perf_counter() - began
        largest = max(self.compiled, key=math.prod)
        self.memory = memory_of(self.compiled[largest])
        self.coming = itertools.cycle(self.batches)

    def __call__(self) -> dict[str, Any]:
        """One step, on the next batch."""
        batch = next(self.coming)
        compiled = self.compiled[batch["input_ids"].shape]
        before = reset_peak()
        began = time.perf_counter()
        self.state, values = compiled(self.state, self.constants, batch, self.key)
        jax.block_until_ready((self.state, values))
        seconds = time.perf_counter() - began
        peak = resident("VmHWM")
        growth = None if before is None or peak is None else peak - before
        statistics_of = jax.local_devices()[0].memory_stats() or {}
        return {name: float(value) for name, value in values.items()} | {
            "seconds": seconds,
            "rss_growth": growth,
            "device_peak": statistics_of.get("peak_bytes_in_use"),
        }


def text_step(
    program: TextProgram, loaded: Loaded, batches: Sequence[Mapping[str, Any]]
) -> OurStep:
    """The step of a causal language model."""
    parts, seed = program.step_parts(10**6), program.config.training.seed
    with jax.set_mesh(program.mesh):
        constants = program.constants(loaded)
    return OurStep(parts, program.mesh, loaded.trainable, constants, batches, seed)


def product_rate(dtype: str) -> float:
    """Operations per second of a large product on one device, the best of several; measured."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    device = jax.devices()[0]
    square = jax.device_put(jnp.ones((size, size), dtype), device)
    product = jax.jit(lambda x: jnp.matmul(x, x, precision="highest"))
    product(square).block_until_ready()
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        product(square).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def alternate(
    named: Mapping[str, Step], rounds: int, progress: Callable[[str], None], *, batches: int = 1
) -> dict[str, Measured]:
    """Run all steps in turn: two rounds that do not count, then ``rounds`` that do.

    Args:
        named: the steps.
        rounds: counted ones, each as many steps of one case after another as there are batches.
        progress: is told what comes.
        batches: that the steps take in turn.
    """
    found = {name: Measured() for name in named}
    for number in range(rounds + 2):
        for name, step in named.items():
            progress(f"round {number + 1} of {rounds + 2}: {name}")
            taken = [step() for _ in range(batches)]
            _add(found[name], taken, counts=number >= 2)
    for name, step in named.items():
        if isinstance(step, OurStep):
            found[name].memory, found[name].compile_seconds = step.memory, step.compile_seconds
    return found


def _add(seen: Measured, taken: Sequence[Mapping[str, Any]], *, counts: bool) -> None:
    seen.losses += [values["loss"] for values in taken]
    seen.device_peak = taken[-1]["device_peak"]
    growths = [values["rss_growth"] for values in taken if values["rss_growth"] is not None]
    if growths:
        seen.rss_growth = max(seen.rss_growth or 0, *growths)
    if counts:
        seen.seconds.append(statistics.fmean(values["seconds"] for values in taken))


def ratio(of: Measured, to: Measured) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(of.seconds, to.seconds, strict=True))


def reset_peak() -> int | None:
    """Let the peak of resident memory start from now; bytes resident, None where not possible."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return None
    return resident("VmRSS")


def resident(key: str) -> int | None:
    """``VmRSS`` or ``VmHWM`` of this process in bytes; None where the system does not tell."""
    file = Path("/proc/self/status")
    if not file.is_file():
        return None
    for line in file.read_text(encoding="ascii").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return None
