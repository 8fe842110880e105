"""Two live commands on one folder: one wins, the other names it, and nothing is mixed."""

import argparse
import datetime
import json
import re
import shutil
import socket
import tempfile
import time
from pathlib import Path

import numpy as np

from balora_jax.io import lock
from tests.trials import subject as subjects
from tests.trials.record import Record
from tests.trials.subject import PATIENCE, Process, differences

KINDS = (("fresh", "fresh"), ("fresh", "resume"), ("resume", "fresh"), ("resume", "resume"))
LATEST = 6
"""Phases that the first has entered when the second begins, at most: it takes steps by then."""
SINCE = re.compile(r"since (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4})")
TRIES = 8


def trial(subject, folder, number):
    """One trial; returns what happened as a dict."""
    rng = np.random.default_rng(number)
    kinds = KINDS[number % len(KINDS)]
    for attempt in range(TRIES):
        home = folder / f"overlap{number}-{attempt}"
        workdir = home / "run"
        if kinds == ("resume", "resume"):
            _cut_short(subject, workdir, 1 + int(rng.integers(3)))
        phases = int(rng.integers(1, LATEST + 1))
        began = datetime.datetime.now(datetime.UTC)
        first = Process(subject.config, subject.cache, workdir, resume=kinds[0] == "resume")
        first.wait_for_entry(phases)
        second = Process(subject.config, subject.cache, workdir, resume=kinds[1] == "resume")
        second.wait_for_entry()
        if _overlapped([first, second], workdir):
            break
        for one in (first, second):
            one.end()
        shutil.rmtree(home)  # the first was at its end: nothing overlapped
    else:
        return {"kinds": kinds, "wrong": [f"{TRIES} times nothing overlapped"]}
    wrong = judged([first, second], [one.end() for one in (first, second)], began)
    wrong += differences(subject, workdir, exact_steps=kinds != ("resume", "resume"))
    if not wrong:
        shutil.rmtree(home)
    codes = [one.process.exitcode for one in (first, second)]
    return {"kinds": kinds, "phases": phases, "codes": codes, "wrong": wrong}


def _cut_short(subject, workdir, seals):
    """A run that was killed after so many checkpoints."""
    moment = {"signal": "SIGKILL", "phase": "seal", "entry": seals + 1, "after": 0.0}
    Process(subject.config, subject.cache, workdir, moment=moment).end()


def _overlapped(processes, workdir):
    """Whether one of them was sent away while the other still held the folder."""
    limit = time.monotonic() + PATIENCE
    while all(one.process.is_alive() for one in processes):
        assert time.monotonic() < limit, "none of them ended"
        time.sleep(0.002)
    held = (workdir / lock.NAME).is_file()
    return held and 0 not in [one.process.exitcode for one in processes]


def judged(processes, ended, began):
    """What is wrong with the ends of two that overlapped; they began after ``began``."""
    if sorted(one.code for one in ended) != [0, 2]:
        return [f"they ended with {one.code}: {one.log[-2000:]}" for one in ended]
    winner = next(i for i, one in enumerate(ended) if one.code == 0)
    pid, log = processes[winner].process.pid, ended[1 - winner].log
    said = [line for line in log.splitlines() if line.startswith("balora: ")]
    if len(said) != 1 or len(log.splitlines()) != 1:
        return [f"the second said: {log[-2000:]}"]
    wrong = []
    if not re.search(rf"\b{pid}\b", said[0]) or socket.gethostname() not in said[0]:
        wrong.append(f"process {pid} on {socket.gethostname()} is not named: {said[0]}")
    since = SINCE.search(said[0])
    now = datetime.datetime.now(datetime.UTC)
    form = "%Y-%m-%d %H:%M:%S %z"
    # The sentence has whole seconds.
    early = began - datetime.timedelta(seconds=1)
    if since is None or not early <= datetime.datetime.strptime(since[1], form) <= now:
        wrong.append(f"its start is not named: {said[0]}")
    return wrong


def run(count, file, folder, only=()):
    """All trials that the file does not have yet; returns those that went wrong."""
    record = Record(file, {"trials of": "overlaps"})
    numbers = [n for n in (only or range(count)) if only or not record.has(n)]
    subject = subjects.prepare(folder / "subject") if numbers else None
    for number in numbers:
        found = trial(subject, folder, number)
        record.put(number, found)
        print(f"{number}: {found['kinds']}: {'; '.join(found['wrong']) or 'fine'}", flush=True)
    return record.wrong()


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--json", type=Path, required=True, help="results; trials in it are done")
    parser.add_argument("--only", type=int, nargs="*", default=(), help="these trials, done or not")
    parser.add_argument("--folder", type=Path, help="keeps the folders of trials that went wrong")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="overlaps."))
    shutil.rmtree(folder / "subject", ignore_errors=True)
    wrong = run(options.count, options.json, folder, options.only)
    trials = json.loads(options.json.read_text())["trials"]
    print(f"{len(trials)} trials, {len(wrong)} went wrong: {wrong}; {folder}")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
