"""Runs that are told to stop, or killed at any moment, and go on.

``BALORA_KILL_TRIALS=10`` runs ten random kills instead of two; each takes a few seconds.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from balora_jax.training import steps
from tests.run import workers
from tests.run.conftest import invoke
from tests.tiny_run import FEW, adapter_bytes, checkpoint_steps, metrics_of, write_config

ROOT = Path(__file__).parents[2]
STEPS = 40
TRIALS = int(os.environ.get("BALORA_KILL_TRIALS", "2"))
PATIENCE = 300.0


@pytest.fixture(scope="module")
def straight(tmp_path_factory, inputs):
    """The config of a run long enough to be caught, and the folder of the run nobody disturbs."""
    folder = tmp_path_factory.mktemp("straight")
    config = write_config(
        folder / "config.yaml",
        inputs,
        adapter=FEW,
        training={"max_steps": STEPS, "checkpoint_every": 5, "keep_checkpoints": 2},
    )
    outcome = invoke("train", config, "--workdir", folder / "run")
    assert outcome.code == 0, outcome.err
    return config, folder / "run"


def same_runs(left, right):
    assert metrics_of(left) == metrics_of(right)
    assert adapter_bytes(left) == adapter_bytes(right)


def wait_for(condition, alive):
    """Look often; fail when the process ends first or nothing happens for minutes."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert alive(), "the run ended too early"
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.002)


def rows_logged(workdir):
    file = workdir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def test_sigterm_saves_and_ends(straight, tmp_path, process_environment):
    config, expected = straight
    workdir = tmp_path / "run"
    command = [sys.executable, ROOT / "train.py", config, "--workdir", workdir]
    with subprocess.Popen(
        command, env=process_environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        wait_for(lambda: rows_logged(workdir) >= 1, lambda: process.poll() is None)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=PATIENCE)
    message = err.decode().splitlines()[-1]
    assert process.returncode == 3, err.decode()
    assert message.startswith("balora: interrupted by SIGTERM after step ")
    step = int(re.findall(r"after step (\d+)", message)[0])
    assert 1 <= step < STEPS
    assert str(workdir / "checkpoints" / str(step)) in message
    assert checkpoint_steps(workdir)[-1] == step
    assert metrics_of(workdir) == metrics_of(expected)[:step]
    assert not (workdir / "adapter").exists()
    outcome = invoke("train", config, "--workdir", workdir, "--resume")
    assert outcome.code == 0, outcome.err
    assert f"resumed at step {step} " in outcome.out
    same_runs(workdir, expected)


@pytest.mark.parametrize(
    ("name", "at"), [("SIGTERM", 1), ("SIGTERM", 5), ("SIGINT", 7), ("SIGTERM", STEPS)]
)
def test_a_signal_during_a_step(straight, tmp_path, monkeypatch, no_curves, name, at):
    """The step under way is finished, logged and saved, wherever the signal falls."""
    config, expected = straight
    workdir = tmp_path / "run"
    place, calls = steps.place_batch, []

    def place_batch(batch, mesh):
        calls.append(None)
        if len(calls) == at:
            signal.raise_signal(getattr(signal, name))
        return place(batch, mesh)

    monkeypatch.setattr(steps, "place_batch", place_batch)
    handler = signal.getsignal(getattr(signal, name))
    code, _, err = invoke("train", config, "--workdir", workdir)
    assert signal.getsignal(getattr(signal, name)) is handler
    assert code == 3
    assert f"balora: interrupted by {name} after step {at}; " in err
    assert checkpoint_steps(workdir)[-1] == at
    assert metrics_of(workdir) == metrics_of(expected)[:at]
    outcome = invoke("train", config, "--workdir", workdir, "--resume")
    assert outcome.code == 0, outcome.err
    same_runs(workdir, expected)


def test_a_second_signal_ends_at_once(straight, tmp_path, monkeypatch):
    def place_batch(batch, mesh):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(steps, "place_batch", place_batch)
    config, _ = straight
    code, _, err = invoke("train", config, "--workdir", tmp_path / "run")
    assert code == 3
    assert err.splitlines()[-1].startswith("balora: interrupted")
    assert "Traceback" not in err


def killed(config, workdir, cache, when, log):
    """Start or resume the run and kill it after ``when(process)`` returns; True if it was alive."""
    arguments = ["train", config, "--workdir", str(workdir), "--resume"]
    process = workers.start(workers.command, arguments, str(log), str(cache))
    when(process)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), log.read_text()
    return process.exitcode != 0


def finish(config, workdir, expected):
    outcome = invoke("train", config, "--workdir", workdir, "--resume")
    assert outcome.code == 0, outcome.err
    same_runs(workdir, expected)
    kept = [child.name for child in (workdir / "checkpoints").iterdir()]
    assert all(name.removeprefix("unsealed-").isdigit() for name in kept), kept
    return outcome


@pytest.mark.parametrize("trial", range(TRIALS))
def test_sigkill_at_a_random_moment(straight, tmp_path, cache_folder, trial, no_curves):
    """Between the first row of the metrics and the end of the process."""
    config, expected = straight
    rng = np.random.default_rng(trial)
    for attempt in range(5):
        workdir = tmp_path / f"run{attempt}"
        rows, seconds = int(rng.integers(1, STEPS + 1)), rng.exponential(0.05)

        def at_a_random_moment(process, workdir=workdir, rows=rows, seconds=seconds):
            wait_for(lambda: rows_logged(workdir) >= rows, process.is_alive)
            time.sleep(seconds)

        if killed(config, workdir, cache_folder, at_a_random_moment, tmp_path / "log"):
            break
    else:
        pytest.fail("every run ended before it was killed")
    print(f"killed after {rows_logged(workdir)} rows; checkpoints {checkpoint_steps(workdir)}")
    finish(config, workdir, expected)


def test_sigkill_while_a_checkpoint_is_written(straight, tmp_path, cache_folder, no_curves):
    """Twice: in the first save, and in one after a resume."""
    config, expected = straight
    workdir = tmp_path / "run"
    folder = workdir / "checkpoints"

    def while_saving(process):
        def saving():
            return folder.is_dir() and any(
                "tmp" in child.name for child in folder.iterdir()
            )  # fmt: skip

        wait_for(saving, process.is_alive)

    for _ in range(2):
        assert killed(config, workdir, cache_folder, while_saving, tmp_path / "log")
    finish(config, workdir, expected)
