"""The run that trials disturb: its inputs, what it leaves when nobody does, and how to compare."""

import contextlib
import hashlib
import json
import os
import re
import time
from pathlib import Path
from typing import NamedTuple

from tests.run import workers
from tests.tiny_run import FEW, write_config, write_inputs
from tests.trials import moments

STEPS, EVERY, KEPT = 12, 3, 2
CLOCK = ("tokens_per_second", "step_seconds", "mfu")
OF_THE_MACHINE = ("wall_seconds", "peak_memory_bytes")
PATIENCE = 300.0
LEFT_BEHIND = re.compile(r"^\.|tmp|\.partial|unsealed|damaged|removed|writing|lock", re.ASCII)


class Subject(NamedTuple):
    """A run of a few seconds.

    Attributes:
        config: path of its config.
        cache: folder of compiled programs.
        expected: its folder after a run that nobody disturbed.
        seconds: how long that took, from the entry to the command line.
        entries: (phase, seconds from then on, seconds in it) of each phase it went through.
        writes: how often it wrote, renamed or removed something in its folder.
    """

    config: str
    cache: str
    expected: Path
    seconds: float
    entries: list[tuple[str, float, float]]
    writes: int


class Ended(NamedTuple):
    """A process that came to its end.

    Attributes:
        code: exit code; negative for a signal.
        log: what it printed.
        told: the seconds from the signal to its end; None without a signal.
        phase: the phase that the signal met.
    """

    code: int
    log: str
    told: float | None
    phase: str


def prepare(folder):
    """Run it twice undisturbed, to fill the cache and to measure; both must leave the same."""
    folder = Path(folder)
    inputs = write_inputs(folder / "inputs")
    config = write_config(
        folder / "config.yaml",
        inputs,
        adapter=FEW,
        training={
            "max_steps": STEPS,
            "checkpoint_every": EVERY,
            "keep_checkpoints": KEPT,
            "keep_best": "validation_loss",
        },
        eval={"task": "exact_match", "every": 2, "score_every": 6},
    )
    cache = folder / "cache"
    cache.mkdir()
    for name in ("first", "expected"):
        process = Process(config, str(cache), folder / name / "run", folder / f"{name}.json")
        ended = process.end()
        assert ended.code == 0, ended.log
    found = json.loads((folder / "expected.json").read_text())
    entries = [tuple(entry) for entry in found["entries"]]
    subject = Subject(
        config, str(cache), folder / "expected" / "run", found["seconds"], entries, found["writes"]
    )
    wrong = differences(subject, folder / "first" / "run")
    assert not wrong, wrong
    return subject


class Process:
    """A live command on a folder; what it prints goes to a file beside the folder."""

    def __init__(self, config, cache, workdir, report=None, *, resume=False, moment=None):
        workdir.parent.mkdir(parents=True, exist_ok=True)
        count = len(list(workdir.parent.glob("log*")))
        self.log = workdir.parent / f"log{count}"
        self.phases = workdir.parent / f"phases{count}"
        arguments = ["train", config, "--workdir", str(workdir), *(["--resume"] if resume else [])]
        self.sent, self.phase = None, "none"
        self.process = self.start(
            *(arguments, str(self.log), cache, str(workdir), str(self.phases)),
            *(None if report is None else str(report), moment),
        )

    def start(self, *arguments):
        """A process of ``moments.command``."""
        return workers.start(moments.command, *arguments)

    def wait_for_entry(self, phases=1):
        """Until it has entered the command line, or so many phases."""
        limit = time.monotonic() + PATIENCE
        while self.process.is_alive() and len(self._notes()) <= phases:
            assert time.monotonic() < limit, "it never began"
            time.sleep(0.002)

    def send(self, number):
        """Send a signal."""
        if self.process.is_alive():
            if self.sent is None:
                self.phase, self.sent = self._notes()[-1], time.monotonic()
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.process.pid, number)

    def end(self):
        """Wait for its end."""
        self.process.join(PATIENCE)
        ended = time.monotonic()
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            raise AssertionError(f"it did not end in {PATIENCE} s:\n{self.log.read_text()}")
        notes = self._notes()
        for note, phase in zip(notes[1:], notes, strict=False):
            if note.startswith("@"):
                self.sent, self.phase = float(note[1:]), phase
        log = self.log.read_text(errors="replace") if self.log.exists() else ""
        told = None if self.sent is None else ended - self.sent
        return Ended(self.process.exitcode, log, told, self.phase)

    def _notes(self):
        """The phases it entered, and when it sent itself a signal."""
        notes = self.phases.read_text().splitlines() if self.phases.exists() else []
        return ["before", *notes]


def differences(subject, workdir, *, exact_steps=True):
    """What of a finished run is not as the undisturbed run left it; a list of sentences."""
    expected, wrong = subject.expected, []
    folders = ("adapter", "best", "predictions")
    exported = [name for one in folders for name in _files(expected / one, f"{one}/")]
    for name in ("config.yaml", *exported):
        if not (workdir / name).is_file():
            wrong.append(f"{name} is missing")
        elif (workdir / name).read_bytes() != (expected / name).read_bytes():
            wrong.append(f"{name} differs")
    for name, reader in (("metrics.jsonl", _rows), ("summary.json", _summary)):
        try:
            if reader(workdir / name) != reader(expected / name):
                wrong.append(f"{name} differs")
        except (OSError, ValueError) as error:
            wrong.append(f"{name}: {error}")
    return wrong + _other_files(expected, workdir, exact_steps)


def _other_files(expected, workdir, exact_steps):
    wrong = []
    for place in ("", "adapter/", "best/"):
        folder = workdir / place
        there = set(_names(folder)) ^ set(_names(expected / place))
        wrong += [f"{place}{name} is in one of the two only" for name in sorted(there)]
    steps, wanted = (set(_names(f / "checkpoints")) for f in (workdir, expected))
    if exact_steps and steps != wanted:
        wrong.append(f"checkpoints are {sorted(steps)}, not {sorted(wanted)}")
    if len(steps) > KEPT or str(STEPS) not in steps or not all(map(str.isdigit, steps)):
        wrong.append(f"checkpoints are {sorted(steps)}")
    if whole_steps(workdir) != sorted(map(int, filter(str.isdigit, steps))):
        wrong.append(f"of the checkpoints {sorted(steps)}, {whole_steps(workdir)} are whole")
    everything = [path.relative_to(workdir).as_posix() for path in workdir.rglob("*")]
    left = [name for name in everything if LEFT_BEHIND.search(name.rsplit("/", 1)[-1])]
    return wrong + [f"{name} was left behind" for name in left if name not in _known(expected)]


def whole_steps(workdir):
    """Steps of the checkpoints that ``sha256sum --check`` would accept."""
    folder = workdir / "checkpoints"
    found = [int(name) for name in _names(folder) if name.isdigit()]
    return sorted(step for step in found if _is_whole(folder / str(step)))


def _is_whole(folder):
    sums = folder / "SHA256SUMS"
    if not sums.is_file():
        return False
    lines = [line for line in sums.read_text().splitlines() if not line.startswith("#")]
    named = dict(reversed(line.split("  ", 1)) for line in lines)
    there = set(_files(folder, "")) - {"SHA256SUMS"}
    return named.keys() == there and all(
        hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
        for name, digest in named.items()
    )


def _known(expected):
    """Names that a run which nobody disturbed leaves as well."""
    return {path.relative_to(expected).as_posix() for path in expected.rglob("*")}


def _names(folder):
    return [child.name for child in folder.iterdir()] if folder.is_dir() else []


def _files(folder, prefix):
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(prefix + path.relative_to(folder).as_posix() for path in found)


def _rows(file):
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [{name: v for name, v in row.items() if name not in CLOCK} for row in rows]


def _summary(file):
    found = json.loads(file.read_text())
    return {name: v for name, v in found.items() if name not in OF_THE_MACHINE}
