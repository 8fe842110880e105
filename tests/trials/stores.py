"""Kills and SIGTERMs over the life of a run whose folder is in a bucket, which then goes on.

The bucket is a folder of this machine (:mod:`tests.bucket`); in the end it must hold what the same run
leaves on a disk. Moments are chosen as in :mod:`tests.trials.kills`, and a write is one of an object.
"""

import argparse
import json
import shutil
import signal
import tempfile
import time
from pathlib import Path

import numpy as np

from balora_jax.io import lease
from tests import bucket
from tests.run import workers
from tests.trials import moments
from tests.trials import subject as subjects
from tests.trials.kills import TRIES, disturbed
from tests.trials.record import Record
from tests.trials.subject import Process, differences

ADDRESS = "gs://b/runs/one"


def command(root, *arguments):
    """``moments.command`` where ``gs://`` leads to a folder, and a silent holder is soon dead."""
    bucket.install(root)
    lease.BEAT, lease.DEAD = 0.1, 1.0
    moments.command(*arguments)


class InBucket(Process):
    """A live command on an address of a bucket."""

    def start(self, *arguments):
        given = list(arguments)
        root = given[3]
        given[0] = [ADDRESS if word == root else word for word in given[0]]
        return workers.start(command, root, *given)


def prepare(folder):
    """The run on a disk, and what it is like in a bucket."""
    subject = subjects.prepare(folder / "subject")
    report = folder / "bucket.json"
    ended = InBucket(subject.config, subject.cache, folder / "bucket" / "run", report).end()
    assert ended.code == 0, ended.log
    found = json.loads(report.read_text())
    entries = [tuple(entry) for entry in found["entries"]]
    subject = subject._replace(seconds=found["seconds"], entries=entries, writes=found["writes"])
    wrong = differences(
        subject, bucket.unpacked(folder / "bucket" / "run", ADDRESS, folder / "seen")
    )
    assert not wrong, wrong
    return subject


def trial(subject, folder, number, name):
    """One trial: one or two signals to a run, then its end; what happened as a dict."""
    rng = np.random.default_rng([number, name == "TERM"])
    wanted = 1 + int(rng.choice(2, p=(0.7, 0.3)))

    def disturb(home, moment, *, resume):
        return _disturbed(subject, home / "bucket", moment, name, resume=resume)

    home, met = disturbed(subject, folder, rng, number, name, wanted, disturb)
    if home is None:
        return {"met": met, "wrong": [f"{TRIES} times the run ended before the signal"]}
    root = home / "bucket"
    wrong = [fault for one in met for fault in one.pop("wrong")]
    last = InBucket(subject.config, subject.cache, root, resume=True).end()
    if last.code != 0:
        wrong.append(f"the resume ended with {last.code}: {last.log[-2000:]}")
    seen = bucket.unpacked(root, ADDRESS, home / "seen")
    wrong += differences(subject, seen, exact_steps=name == "KILL")
    if not wrong:
        shutil.rmtree(home)
    return {"met": met, "wrong": wrong, "folder": str(home) if wrong else None}


def _disturbed(subject, root, moment, name, *, resume):
    by_clock = "at" in moment
    process = InBucket(
        subject.config, subject.cache, root, resume=resume, moment=None if by_clock else moment
    )
    if by_clock:
        process.wait_for_entry()
        time.sleep(moment["at"])
        process.send(getattr(signal, f"SIG{name}"))
    ended = process.end()
    hit = ended.told is not None and ended.code != 0
    codes = (0, -signal.SIGKILL) if name == "KILL" else (0, 3, -signal.SIGTERM)
    wrong = [] if ended.code in codes else [f"it ended with {ended.code}: {ended.log[-2000:]}"]
    return {"moment": moment, "phase": ended.phase, "code": ended.code, "hit": hit, "wrong": wrong}


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--signal", choices=("KILL", "TERM"), required=True)
    parser.add_argument("--json", type=Path, required=True, help="results; trials in it are done")
    options = parser.parse_args()
    record = Record(options.json, {"signal": options.signal, "bucket": True})
    folder = Path(tempfile.mkdtemp(prefix="stores."))
    subject = prepare(folder)
    for number in (n for n in range(options.count) if not record.has(n)):
        found = trial(subject, folder, number, options.signal)
        record.put(number, found)
        phases = ", ".join(one["phase"] for one in found["met"])
        print(f"{number}: {phases}: {'; '.join(found['wrong']) or 'fine'}", flush=True)
    print(f"{options.count} trials, {len(record.wrong())} went wrong: {record.wrong()}; {folder}")
    raise SystemExit(bool(record.wrong()))


if __name__ == "__main__":
    main()
