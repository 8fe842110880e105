"""Short runs of an older commit and of this tree, which must be identical.

``python -m tests.same_numbers COMMIT`` trains both trees on the same inputs, each run in a process
of its own and compiled as users compile. What they log, their adapters and their scores must agree
to the last bit. ``--keep DIR`` keeps inputs and the older tree's runs for the next call, which then
trains this tree only. Exit code 0: all equal; 1: some differ or failed; 2: bad input.
"""

import argparse
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from importlib import metadata
from pathlib import Path

import yaml

from tests.same_compare import compare, sentence
from tests.same_inputs import CASES, DEVICES, configs, write_inputs

ROOT = Path(__file__).resolve().parents[1]
# A shell's settings that would compile a run in another way, or give it other threads or code.
UNSET = ("JAX_", "XLA_", "BALORA_", "PYTHONPATH", "OMP_", "OPENBLAS_", "MKL_")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy", "transformers", "qwix")


class RunFailedError(Exception):
    """A training run did not end well."""


def refuse(text):
    print(f"same_numbers: {text}", file=sys.stderr)
    raise SystemExit(2)


def git(*arguments):
    """What git prints, as bytes."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True)
    if done.returncode:
        reason = " ".join(done.stderr.decode().split())
        refuse(f"git {' '.join(arguments)}: expected it to work, got: {reason}. Check the commit.")
    return done.stdout


def unpack(commit, folder):
    """The files of a commit."""
    with tarfile.open(fileobj=io.BytesIO(git("archive", commit))) as archive:
        archive.extractall(folder, filter="data")


def made_with():
    """What the numbers of a run depend on besides the code."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    affinity, info = getattr(os, "sched_getaffinity", None), Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = sorted({line.split(":")[1].strip() for line in lines if "model name" in line})
    found["processor"] = ", ".join(models) or platform.processor()
    found["processors"] = len(affinity(0)) if affinity else os.cpu_count()
    return found


def prepare(place, commit, steps):
    """Write the inputs where there are none yet; returns case → config file.

    What is there must be what would be written now, or runs of other things would be compared.
    """
    advice = f"Remove {place}, or name another folder with --keep."
    inputs, record = place / "inputs", place / "made_with.json"
    if not record.is_file():
        place.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(inputs, ignore_errors=True)
        write_inputs(inputs)
        record.write_text(json.dumps(made_with(), indent=2) + "\n")
    before, now = json.loads(record.read_text()), made_with()
    changed = [f"{n} {before.get(n)} -> {now[n]}" for n in now if before.get(n) != now[n]]
    if changed:
        refuse(f"{place}: expected runs made as here, got others: {'; '.join(changed)}. {advice}")
    quickstart = yaml.safe_load(git("show", f"{commit}:configs/quickstart.yaml"))
    files = {}
    for name, tree in configs(inputs, quickstart, steps).items():
        files[name], text = inputs / f"{name}.yaml", yaml.safe_dump(tree, sort_keys=False)
        if not files[name].exists():
            files[name].write_text(text)
        if files[name].read_text() != text:
            refuse(f"{files[name]}: expected the settings of this call, got others. {advice}")
    return files


def environment(case):
    """The user's, less what is in ``UNSET``; on the CPU."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(UNSET)}
    kept |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
    if case in DEVICES:
        kept["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES[case]}"
    return kept


def train(tree, case, config, workdir):
    """``train.py`` of a tree; returns seconds.

    Raises:
        RunFailedError: with the last line that it printed; all of them lie beside ``workdir``.
    """
    command = [sys.executable, "train.py", str(config), "--workdir", str(workdir)]
    log = workdir.with_suffix(".txt")
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        code = subprocess.run(
            command, cwd=tree, env=environment(case), stdout=output, stderr=subprocess.STDOUT
        ).returncode
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise RunFailedError(f"exit code {code}: {lines[-1] if lines else 'no output'} ({log})")
    shutil.rmtree(workdir / "checkpoints")  # large, and not compared
    log.rename(workdir / "log.txt")
    return time.monotonic() - began


def train_older(place, commit, cases, files, scratch):
    """Train the commit's tree where ``place`` lacks a run; returns case → sentence of failures."""
    missing = [case for case in cases if not (place / commit / case).is_dir()]
    if not missing:
        return {}
    failures, tree = {}, scratch / "tree"
    unpack(commit, tree)
    (place / commit).mkdir(exist_ok=True)
    for case in missing:
        draft = place / commit / f"{case}.{os.getpid()}"
        try:
            seconds = train(tree, case, files[case], draft)
        except RunFailedError as error:
            failures[case] = f"the older tree: {error}"
            continue
        print(f"{case:<11}trained by the older tree in {seconds:.0f} s", flush=True)
        if (place / commit / case).exists():  # by another call, meanwhile
            shutil.rmtree(draft)
        else:
            draft.rename(place / commit / case)
    shutil.rmtree(tree)
    return failures


def check(case, config, older, workdir):
    """Train this tree and compare; a run that is equal leaves nothing behind."""
    try:
        seconds = train(ROOT, case, config, workdir)
    except RunFailedError as error:
        return {"state": "failed", "why": f"this tree: {error}"}
    found = compare(older, workdir)
    if found["state"] == "equal":
        shutil.rmtree(workdir)
    return found | {"seconds": round(seconds, 1)}


def options_of(arguments):
    parser = argparse.ArgumentParser(prog="python -m tests.same_numbers", description=__doc__)
    parser.add_argument("commit", help="the older tree")
    parser.add_argument("--only", action="append", choices=CASES, help="this case; repeatable")
    parser.add_argument("--steps", type=int, default=30, help="of every run")
    parser.add_argument("--keep", metavar="DIR", help="inputs and runs of the older tree")
    parser.add_argument("--json", metavar="FILE", help="write all that was found to this file")
    return parser.parse_args(arguments)


def main(arguments=None):
    options = options_of(arguments)
    os.nice(10)  # nobody waits for it
    commit = git("rev-parse", "--verify", f"{options.commit}^{{commit}}").decode().strip()
    scratch = Path(tempfile.mkdtemp(prefix="same_numbers_"))
    place = Path(options.keep).resolve() if options.keep else scratch / "older"
    cases, files = options.only or CASES, prepare(place, commit, options.steps)
    failures = train_older(place, commit, cases, files, scratch)
    found = {}
    for case in cases:
        if case in failures:
            found[case] = {"state": "failed", "why": failures[case]}
        else:
            found[case] = check(case, files[case], place / commit / case, scratch / case)
        took = f" ({found[case]['seconds']:.0f} s)" if "seconds" in found[case] else ""
        print(f"{case:<11}{sentence(found[case])}{took}", flush=True)
    if options.json:
        report = {"commit": commit, "steps": options.steps, "cases": found}
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")
    if all(case["state"] == "equal" for case in found.values()):
        shutil.rmtree(scratch)
        return 0
    print(f"runs that differ, and the logs of those that failed: {scratch}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
