"""How long one process of several may wait or stand still, and what is said meanwhile.

No clock and no process: :mod:`balora_jax.parallel.supervise` brings both.
"""

import time
from collections.abc import Mapping
from typing import Any

SAY_EVERY = 15.0
"""Seconds between two lines about the same wait."""


class Patience:
    """What a process has told of itself, and when it is too late for it to go on.

    A process tells facts, each a mapping with some of these keys: ``name`` (of itself), ``wait``
    (what for; None: no longer; perhaps with a ``limit`` in seconds and an ``advice``), ``steady``
    (whether it takes steps, and so can stop after one and save), ``step`` (the last one done) and
    ``moved`` (what it does between two steps goes on). Any other fact is a sign of life.

    Args:
        stall: seconds without a sign of life after the first, in one wait, or from step to step.
        now: the clock, in seconds.
    """

    def __init__(self, stall: float, now: float):
        self.stall, self.name = stall, "this process"
        self.heard: float | None = None  # it loads its modules first
        self.stepped = self.since = self.said = now
        self.wait: str | None = None
        self.limit, self.advice = stall, ""
        self.steady, self.step = False, 0

    def hear(self, fact: Mapping[str, Any], now: float) -> None:
        """Take in a fact that the process told."""
        self.heard = now
        self.name = fact.get("name", self.name)
        if "wait" in fact:
            self.wait, self.limit = fact["wait"], fact.get("limit", self.stall)
            self.advice = fact.get("advice", "")
            self.since = self.said = now
        self.steady, self.step = fact.get("steady", self.steady), fact.get("step", self.step)
        if fact.keys() & {"steady", "step", "moved"}:
            self.stepped = now

    def line(self, now: float, clock: float) -> str | None:
        """What to say of the wait, if it is time; ``clock`` is now in seconds of the epoch."""
        if self.wait is None or now - self.said < SAY_EVERY:
            return None
        self.said = now
        end = time.strftime("%H:%M:%S", time.localtime(clock + self.since + self.limit - now))
        return f"{self.name} has waited {now - self.since:.0f} s for {self.wait}; until {end}."

    def over(self, now: float) -> str | None:
        """Why the process must end, if it must."""
        if self.wait is not None and now - self.since >= self.limit:
            return f"{self.name} waited {self.limit:.0f} s for {self.wait}, in vain{self.advice}"
        if self.steady and now - self.stepped >= self.stall:
            return f"{self.name} made no progress for {self.stall:.0f} s after step {self.step}"
        if self.heard is not None and now - self.heard >= self.stall:
            return f"{self.name} gave no sign of life for {self.stall:.0f} s"
        return None
