"""Moments in the life of a run, by name, by writing and by the clock, in a process of its own.

A run's phases are told apart by the functions that they begin with; the child notes in a file when
it enters one. A moment is one of

- ``{"phase": name, "entry": n, "after": seconds}``: so long after its n-th entry into a phase;
- ``{"write": n}``: just before it makes, writes, renames or removes the n-th thing in its folder.

With ``again``, the signal comes a second time so many seconds later.
"""

import functools
import importlib
import json
import os
import signal
import sys
import threading
import time

from balora_jax import cli, signals
from tests.run import workers

PHASES = {
    "loading": "balora_jax.config_file:load_config",
    "start": "balora_jax.tasks.text.run:TextRun.load",
    "opening": "balora_jax.training.loop:Training.__init__",
    "first score": "balora_jax.training.loop:Training.score_before",
    "steps": "balora_jax.training.loop:Training.take_steps",
    "save": "balora_jax.io.checkpoint:Checkpoints.save",
    "seal": "balora_jax.io.seals:seal",
    "export": "balora_jax.finetune:export_trained",
    "last score": "balora_jax.training.loop:Training.score",
    "card": "balora_jax.finetune:write_card",
    "summary": "balora_jax.finetune:write_results",
}
INSIDE = ("save", "seal")
"""Those that lie within another, which goes on after them."""

WRITES = {"os.mkdir": 0, "os.rename": 1, "os.remove": 0, "os.rmdir": 0, "os.truncate": 0}
"""Events that change a folder, and which of their arguments is the place."""


def command(arguments, log, cache, workdir, phases, report, moment):
    """``balora ARGUMENTS``, with a signal to itself at a moment; ``report`` gets what it did."""
    workers._prepare(log, cache, 1)
    watch = Watch(workdir, phases, moment)
    for phase, place in PHASES.items():
        _wrap(place, phase, watch)
    sys.addaudithook(watch.audit)
    watch.enter("entry")
    with signals.taken(for_good=True):
        code = cli.main(arguments)
    if report is not None:
        watch.write(report)
    signals.leave(code)


class Watch:
    """What a run is doing, noted outside of it, and the signal that it gets."""

    def __init__(self, workdir, phases, moment):
        self.workdir, self.moment = os.path.abspath(workdir) + os.sep, moment or {}
        self.notes = os.open(phases, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.began, self.writes = time.monotonic(), 0
        self.entries, self.open, self.counts = [], [], {}
        self.done = False

    def enter(self, phase):
        """Note the beginning of a phase."""
        now = time.monotonic()
        if self.open and phase not in INSIDE:
            self._close(now)
        self.open.append((phase, now))
        os.write(self.notes, f"{phase}\n".encode())
        self.counts[phase] = self.counts.get(phase, 0) + 1
        if (phase, self.counts[phase]) == (self.moment.get("phase"), self.moment.get("entry")):
            timer = threading.Timer(self.moment["after"], self.signal)
            timer.daemon = True
            timer.start()

    def leave(self):
        """Note the end of a phase within another."""
        phase, began = self.open.pop()
        self.entries.append((phase, began - self.began, time.monotonic() - began))
        if self.open:
            os.write(self.notes, f"{self.open[-1][0]}\n".encode())

    def audit(self, event, arguments):
        """Count what changes the folder; send the signal before the wanted change."""
        place = _written(event, arguments)
        if place is not None and place.startswith(self.workdir):
            self.writes += 1
            if self.writes == self.moment.get("write"):
                self.signal()

    def signal(self):
        """Send the signal to this process, once, and note when."""
        if not self.done:
            self.done = True
            os.write(self.notes, f"@{time.monotonic()!r}\n".encode())
            number = getattr(signal, self.moment["signal"])
            if "again" in self.moment:
                again = threading.Timer(self.moment["again"], os.kill, (os.getpid(), number))
                again.daemon = True
                again.start()
            os.kill(os.getpid(), number)

    def write(self, file):
        """What it did, as JSON."""
        now = time.monotonic()
        self._close(now)
        found = {
            "entries": self.entries,
            "writes": self.writes,
            "seconds": now - self.began,
            "cpu": time.process_time(),
        }
        with open(file, "w") as report:
            json.dump(found, report)

    def _close(self, now):
        while self.open:
            phase, began = self.open.pop()
            self.entries.append((phase, began - self.began, now - began))


def _written(event, arguments):
    """The path that an event makes, writes, renames or removes; None where it does not."""
    if event == "open":
        path, mode, flags = arguments
        changes = (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not changes and not set(str(mode or "")) & set("wax+"):
            return None
        folder = -1
    elif event in WRITES:
        path = arguments[WRITES[event]]
        # What removes a tree names its files by their folder's descriptor.
        folder = arguments[-1] if event != "os.truncate" else -1
    else:
        return None
    if not isinstance(path, str | bytes):
        return None
    path = os.fsdecode(path)
    if folder != -1:
        path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
    return os.path.abspath(path)


def _wrap(place, phase, watch):
    """Let the watch know when a function is called, wherever in the package it is known."""
    module, _, name = place.partition(":")
    owner, _, attribute = name.rpartition(".")
    holder = importlib.import_module(module)
    holder = getattr(holder, owner) if owner else holder
    function = getattr(holder, attribute)

    @functools.wraps(function)
    def wrapped(*arguments, **options):
        # The score before the steps is a call of the same function.
        if phase != "last score" or "steps" in watch.counts:
            watch.enter(phase)
        try:
            return function(*arguments, **options)
        finally:
            if phase in INSIDE:
                watch.leave()

    setattr(holder, attribute, wrapped)
    for other in [m for n, m in sys.modules.items() if n.startswith("balora_jax")]:
        for known, value in list(vars(other).items()):
            if value is function:
                setattr(other, known, wrapped)
