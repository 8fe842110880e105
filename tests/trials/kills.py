"""Kills and SIGTERMs over the whole life of a run, which then goes on to the same bytes.

Half of the trials are told by the clock, a quarter by a phase, a quarter by a change of the folder.
"""

import argparse
import json
import re
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from tests.trials import subject as subjects
from tests.trials.moments import PHASES
from tests.trials.record import Record
from tests.trials.subject import Process, differences, whole_steps

LIMIT = 10.0
"""Seconds within which a run that is told to stop must have ended."""
TRIES = 8
NAMED = re.compile(r"(\S+/checkpoints/\d+)\b")


def trial(subject, folder, number, name):
    """One trial: up to three signals to one run, then its end; returns what happened as a dict."""
    rng = np.random.default_rng([number, name == "TERM"])
    wanted = 1 + int(rng.choice(3, p=(0.7, 0.2, 0.1)))
    cold = rng.random() < 0.1  # with everything to compile

    def disturb(home, moment, *, resume):
        cache = str(home / "cold") if cold else subject.cache
        return _disturbed(subject, home / "run", cache, moment, name, resume=resume)

    home, met = disturbed(subject, folder, rng, number, name, wanted, disturb)
    if home is None:
        return {"met": met, "wrong": [f"{TRIES} times the run ended before the signal"]}
    workdir = home / "run"
    wrong = [fault for one in met for fault in one.pop("wrong")]
    last = Process(subject.config, subject.cache, workdir, resume=True).end()
    if last.code != 0:
        wrong.append(f"the resume ended with {last.code}: {last.log[-2000:]}")
    wrong += differences(subject, workdir, exact_steps=name == "KILL")
    if not wrong:
        shutil.rmtree(home)
    return {"met": met, "cold": cold, "wrong": wrong, "folder": str(home) if wrong else None}


def disturbed(subject, folder, rng, number, name, wanted, disturb):
    """Up to ``wanted`` signals to one run, of which one at least came in time.

    Args:
        disturb: sends one, ``(home, moment, resume=)``; returns ``code``, ``hit`` and ``wrong``.

    Returns:
        The folder of the trial, None where every run ended first, and what was met.
    """
    met = []
    for attempt in range(TRIES):
        home, met = folder / f"{name.lower()}{number}-{attempt}", []
        for count in range(wanted):
            moment = chosen(subject, rng, number, name)
            for wait in {"at", "after"} & moment.keys():
                # The machine may be quicker now than when it was timed.
                moment[wait] *= 0.7**attempt
            met.append(disturb(home, moment, resume=count > 0))
            if met[-1]["code"] == 0:
                break
        if any(one["hit"] for one in met):
            return home, met
        shutil.rmtree(home)
    return None, met


def chosen(subject, rng, number, name):
    """A moment: by the clock (``at``), by a phase, or by a change of the folder."""
    kind = ("clock", "phase", "clock", "write")[number % 4]
    moment = {"signal": f"SIG{name}"}
    if name == "TERM" and rng.random() < 0.2:
        moment["again"] = float(rng.uniform(0.0, 0.05))
    if kind == "clock":
        return moment | {"at": float(rng.uniform(0.0, subject.seconds))}
    if kind == "write":
        return moment | {"write": int(rng.integers(1, subject.writes + 1))}
    phase = list(PHASES)[number // 4 % len(PHASES)]
    taken = [seconds for known, _, seconds in subject.entries if known == phase]
    entry = int(rng.integers(len(taken)))
    after = float(rng.uniform(0.0, taken[entry])) if rng.random() < 0.7 else 0.0
    return moment | {"phase": phase, "entry": entry + 1, "after": after}


def _disturbed(subject, workdir, cache, moment, name, *, resume):
    """One process that gets a signal; what it met, and what was wrong."""
    before = _tree(workdir)
    by_clock = "at" in moment
    process = Process(
        subject.config, cache, workdir, resume=resume, moment=None if by_clock else moment
    )
    if by_clock:
        process.wait_for_entry()
        time.sleep(moment["at"])
        process.send(getattr(signal, f"SIG{name}"))
        if "again" in moment:
            time.sleep(moment["again"])
            process.send(getattr(signal, f"SIG{name}"))
    ended = process.end()
    hit = ended.told is not None and ended.code != 0
    found = {"moment": moment, "phase": ended.phase, "code": ended.code, "hit": hit}
    if name == "KILL":
        fine = ended.code in (0, -signal.SIGKILL)
        wrong = [] if fine else [f"it ended with {ended.code}: {ended.log[-2000:]}"]
    else:
        wrong = told_wrong(ended, workdir, before)
        found |= {"seconds": ended.told, "sentence": _sentences(ended.log)[-1:]}
    return found | {"wrong": wrong}


def told_wrong(ended, workdir, before):
    """What is wrong with the end of a run that was told to stop."""
    wrong, said = [], _sentences(ended.log)
    if "Traceback" in ended.log:
        wrong.append(f"a traceback: {ended.log.partition('Traceback')[2][:1000]}")
    if ended.code == 0:
        return wrong + [f"it ended well and said {line}" for line in said]
    if ended.code == -signal.SIGTERM and ended.phase in ("before", "entry"):
        # The interpreter had not come to the command line.
        return wrong + ["it had written something"] * (_tree(workdir) != before)
    if ended.code != 3:
        wrong.append(f"it ended with {ended.code}, not 3: {ended.log[-2000:]}")
    if ended.told is not None and ended.told > LIMIT:
        wrong.append(f"it took {ended.told:.1f} s to end, told in phase {ended.phase}")
    if len(said) != 1:
        return [*wrong, f"it said {len(said)} sentences: {ended.log[-2000:]}"]
    whole = whole_steps(workdir)
    newest = str(workdir / "checkpoints" / str(whole[-1])) if whole else None
    named = NAMED.findall(said[0])
    if named != ([newest] if newest else []):
        wrong.append(f"{newest or 'nothing'} is whole, and it said: {said[0]}")
    if "nothing was written" in said[0] and _tree(workdir) != before:
        wrong.append(f"something was written, and it said: {said[0]}")
    if not named and not re.search(r"nothing was written|no checkpoint", said[0]):
        wrong.append(f"it did not say what is saved: {said[0]}")
    return wrong


def _sentences(log):
    # Both streams go to one file: what the run prints may stand before it in the line.
    return re.findall(r"balora: .*", log)


def _tree(folder):
    """Names, sizes and times of everything in a folder."""
    if not folder.exists():
        return None
    found = ((path, path.lstat()) for path in folder.rglob("*"))
    return sorted((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in found)


def run(count, name, file, folder, only=()):
    """All trials that the file does not have yet; returns those that went wrong."""
    record = Record(file, {"signal": name})
    numbers = [n for n in (only or range(count)) if only or not record.has(n)]
    subject = subjects.prepare(folder / "subject") if numbers else None
    for number in numbers:
        found = trial(subject, folder, number, name)
        record.put(number, found)
        phases = ", ".join(one["phase"] for one in found["met"])
        print(f"{name} {number}: {phases}: {'; '.join(found['wrong']) or 'fine'}", flush=True)
    return record.wrong()


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--signal", choices=("KILL", "TERM"), required=True)
    parser.add_argument("--json", type=Path, required=True, help="results; trials in it are done")
    parser.add_argument("--only", type=int, nargs="*", default=(), help="these trials, done or not")
    parser.add_argument("--folder", type=Path, help="keeps the folders of trials that went wrong")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="kills."))
    shutil.rmtree(folder / "subject", ignore_errors=True)
    wrong = run(options.count, options.signal, options.json, folder, options.only)
    trials = json.loads(options.json.read_text())["trials"]
    met = [one for found in trials.values() for one in found["met"] if one["hit"]]
    print(f"{len(trials)} trials, {len(met)} signals, by phase:")
    print(json.dumps(Counter(one["phase"] for one in met), indent=1))
    print(f"{len(wrong)} went wrong: {wrong}; {folder}")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
