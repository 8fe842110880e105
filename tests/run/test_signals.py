"""Runs that are told to stop, and go on; at random moments in ``tests/trials``."""

import gc
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from balora_jax import finetune, signals
from balora_jax.data import training_sets
from balora_jax.errors import InputError
from balora_jax.io import checkpoint_folder, lock
from balora_jax.tasks.text import run as text_run
from balora_jax.training import loop, steps
from tests.run import workers
from tests.run.conftest import invoke
from tests.tiny_run import (
    PLAIN,
    adapter_bytes,
    checkpoint_steps,
    metrics_of,
    tree_digest,
    write_config,
)

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 40, 10
PATIENCE = 300.0


@pytest.fixture(scope="module")
def straight(tmp_path_factory, inputs):
    """The config of a run long enough to be caught, and the folder of the run nobody disturbs."""
    folder = tmp_path_factory.mktemp("straight")
    config = write_config(
        folder / "config.yaml",
        inputs,
        **PLAIN,
        training={"max_steps": STEPS, "checkpoint_every": EVERY, "keep_checkpoints": 2},
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
    ("name", "at"), [("SIGTERM", 2), ("SIGTERM", EVERY), ("SIGINT", 7), ("SIGTERM", STEPS)]
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


def test_a_second_signal_ends_at_once_and_names_the_newest_checkpoint(
    straight, tmp_path, monkeypatch, no_curves
):
    place, calls = steps.place_batch, []

    def place_batch(batch, mesh):
        calls.append(None)
        if len(calls) == 2 * EVERY + 2:  # the first is sealed before the second is begun
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return place(batch, mesh)

    monkeypatch.setattr(steps, "place_batch", place_batch)
    config, expected = straight
    workdir = tmp_path / "run"
    code, _, err = invoke("train", config, "--workdir", workdir)
    assert code == 3
    newest = checkpoint_folder.sealed_steps(workdir / "checkpoints")[-1]
    assert newest in (EVERY, 2 * EVERY)
    assert err.splitlines()[-1] == (
        f"balora: interrupted by SIGINT; {workdir / 'checkpoints' / str(newest)} is the newest "
        "whole checkpoint. Go on with --resume."
    )
    assert "Traceback" not in err
    monkeypatch.undo()
    finish(config, workdir, expected)


NOTHING = "nothing was written. Begin again."
NO_CHECKPOINT = "no checkpoint is saved yet. Begin again with --resume."
LAST = "is the newest whole checkpoint. Go on with --resume."


@pytest.mark.parametrize(
    ("name", "owner", "function", "truth"),
    [
        ("SIGTERM", training_sets, "load_rows", NOTHING),
        ("SIGINT", text_run.TextRun, "load", NOTHING),
        ("SIGTERM", loop.Training, "score_before", NO_CHECKPOINT),
        ("SIGINT", steps, "compile_step", NO_CHECKPOINT),
        ("SIGTERM", finetune, "export_trained", LAST),
        ("SIGINT", finetune, "summarise", LAST),
        ("SIGTERM", finetune, "write_results", LAST),
    ],
)
def test_a_signal_in_any_other_phase_ends_at_once_with_the_truth(
    straight, tmp_path, monkeypatch, no_curves, name, owner, function, truth
):
    config, expected = straight
    workdir = tmp_path / "run"

    def interrupted(*arguments, **options):
        signal.raise_signal(getattr(signal, name))
        pytest.fail("it went on")

    monkeypatch.setattr(owner, function, interrupted)
    code, _, err = invoke("train", config, "--workdir", workdir)
    assert code == 3
    message = err.splitlines()[-1]
    assert message.startswith(f"balora: interrupted by {name}; ")
    assert message.endswith(truth)
    if truth == LAST:
        assert str(workdir / "checkpoints" / str(STEPS)) in message
    assert workdir.exists() == (truth != NOTHING)
    assert err.count("balora: ") == 1
    monkeypatch.undo()
    again = ("--resume",) if workdir.exists() else ()
    outcome = invoke("train", config, "--workdir", workdir, *again)
    assert outcome.code == 0, outcome.err
    if truth == LAST:
        assert f"resumed at step {STEPS} " in outcome.out
    same_runs(workdir, expected)


@pytest.mark.parametrize("after", [0.0, 0.01, 0.03, 0.1])
def test_a_signal_in_a_callback_is_not_lost(straight, tmp_path, monkeypatch, after):
    """Python raises nothing out of a callback of the garbage collector; there is no traceback.

    A second signal comes while Python reports the first, before the first is delivered again, or
    after: the first is named, and none reaches the caller's handlers.
    """
    calls, late = [], []

    def second(caught):
        wait_for(lambda: caught.received, lambda: True)
        time.sleep(after)
        os.kill(os.getpid(), signal.SIGINT)

    def callback(phase, info):
        if not calls:
            calls.append(phase)
            threading.Thread(target=second, args=(signals.current(),)).start()
            signal.raise_signal(signal.SIGTERM)

    def load(self):
        gc.callbacks.append(callback)
        try:
            gc.collect()
            time.sleep(10)
        finally:
            gc.callbacks.remove(callback)
        pytest.fail("it went on")

    monkeypatch.setattr(text_run.TextRun, "load", load)
    hook = sys.unraisablehook
    before = {
        number: signal.signal(number, lambda number, _: late.append(number))
        for number in signals.WANTED
    }
    try:
        code, _, err = invoke("train", straight[0], "--workdir", tmp_path / "run")
        time.sleep(0.2)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert code == 3
    assert signal.SIGTERM not in late
    assert err == f"balora: interrupted by SIGTERM; {NOTHING}\n"
    assert sys.unraisablehook is hook


@pytest.mark.parametrize("error", [SystemError, ValueError, InputError, OSError])
def test_a_signal_that_native_code_makes_another_error_of(straight, tmp_path, monkeypatch, error):
    """``returned a result with an exception set``: C that called Python and looked at no error."""

    def load(self):
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt as interrupted:
            raise error("returned a result with an exception set") from interrupted

    monkeypatch.setattr(text_run.TextRun, "load", load)
    code, _, err = invoke("train", straight[0], "--workdir", tmp_path / "run")
    assert (code, err) == (3, f"balora: interrupted by SIGTERM; {NOTHING}\n")

    def wrong(self):
        raise error("its own fault")

    monkeypatch.setattr(text_run.TextRun, "load", wrong)
    if error is SystemError:  # without a signal it is what it is
        with pytest.raises(SystemError):
            invoke("train", straight[0], "--workdir", tmp_path / "run")


def test_a_signal_after_the_end_of_a_run_says_what_is_saved(straight, tmp_path, monkeypatch):
    """Between the end of the run and that of the command."""
    fit = finetune.fit

    def late(*args, **kwargs):
        fit(*args, **kwargs)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("balora_jax.fit", late)
    workdir = shutil.copytree(straight[1], tmp_path / "run")
    code, _, err = invoke("train", straight[0], "--workdir", workdir, "--resume")
    last = workdir / "checkpoints" / str(STEPS)
    assert code == 3
    assert err.splitlines()[-1] == (
        f"balora: interrupted by SIGTERM; {last} is the newest whole checkpoint. "
        "Go on with --resume."
    )


NOISY = """
import atexit, os, signal, time
from balora_jax.tasks.text.run import TextRun

def load(self):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
    finally:
        os.write(2, b"Event loop is closed\\n")

TextRun.load = load
atexit.register(os.kill, os.getpid(), signal.SIGTERM)
atexit.register(os.write, 2, b"and another library\\n")
"""


def test_nothing_but_the_sentence_is_said_of_a_signal(straight, tmp_path):
    """Libraries that are interrupted print tracebacks; one more signal comes at the very end."""
    (tmp_path / "noisy.py").write_text(NOISY)
    (tmp_path / "config.yaml").write_text(
        "extensions: [noisy.py]\n" + Path(straight[0]).read_text()
    )
    command = [sys.executable, ROOT / "train.py", tmp_path / "config.yaml", "--workdir", "run"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stderr) == (3, f"balora: interrupted by SIGTERM; {NOTHING}\n")


WAITING = """
import os, signal, threading, time
from balora_jax import signals
from balora_jax.tasks.text.run import TextRun

signals.PATIENCE = 0.5

def load(self):
    print("loading")
    threading.Thread(target=time.sleep, args=(600,)).start()
    os.kill(os.getpid(), signal.SIGTERM)

TextRun.load = load
"""


def test_a_thread_of_a_library_that_waits_for_ever_is_left_behind(straight, tmp_path):
    (tmp_path / "waiting.py").write_text(WAITING)
    (tmp_path / "config.yaml").write_text(
        "extensions: [waiting.py]\n" + Path(straight[0]).read_text()
    )
    command = [sys.executable, ROOT / "train.py", tmp_path / "config.yaml", "--workdir", "run"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stderr) == (3, f"balora: interrupted by SIGTERM; {NOTHING}\n")
    assert done.stdout.endswith("loading\n")  # all that was printed is there


def test_the_sentence_stands_below_the_bar_of_a_terminal(straight, tmp_path):
    """The bar's own end is not shown any more."""
    (tmp_path / "noisy.py").write_text(NOISY)
    (tmp_path / "config.yaml").write_text(
        "extensions: [noisy.py]\n" + Path(straight[0]).read_text()
    )
    command = [sys.executable, ROOT / "train.py", tmp_path / "config.yaml", "--workdir", "run"]
    seen, terminal = os.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, stderr=terminal, stdout=subprocess.DEVNULL
    )
    os.close(terminal)
    assert done.returncode == 3
    assert os.read(seen, 4096).endswith(
        f"\r\nbalora: interrupted by SIGTERM; {NOTHING}\r\n".encode()
    )
    os.close(seen)


def test_a_signal_ends_what_runs_no_handler(straight, tmp_path, cache_folder):
    """A thread of the command line ends the process, and says what is saved."""
    log, workdir = tmp_path / "log", tmp_path / "run"
    arguments = ["train", straight[0], "--workdir", str(workdir)]
    process = workers.start(workers.stuck, arguments, str(log), str(cache_folder))
    wait_for(lambda: log.exists() and "scoring" in log.read_text(), process.is_alive)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 3, log.read_text()
    assert log.read_text().splitlines()[-1] == f"balora: interrupted by SIGTERM; {NO_CHECKPOINT}"


def test_two_live_commands_on_one_workdir(straight, tmp_path):
    """The second is refused, names the first, and changes nothing."""
    config, _ = straight
    workdir = tmp_path / "run"
    for resume in ((), ("--resume",)):
        with lock.locked(workdir):
            before = tree_digest(tmp_path)
            code, out, err = invoke("train", config, "--workdir", workdir, *resume)
            assert (code, out) == (2, "")
            assert err.startswith(
                f"balora: --workdir {workdir}: expected a folder that no other run is using, got "
                f"one in use by process {os.getpid()} on {socket.gethostname()} since "
            )
            assert tree_digest(tmp_path) == before
        assert not workdir.exists()


def test_a_look_at_a_lock_leaves_none_behind(tmp_path, monkeypatch):
    """The run ends between the look at its file and the lock on it, which makes the file anew."""
    acquired = lock._acquired

    def late(folder):
        for name in (lock.HOLDER, lock.NAME):
            (folder / name).unlink()
        return acquired(folder)

    monkeypatch.setattr(lock, "_acquired", late)
    (tmp_path / lock.NAME).touch()
    (tmp_path / lock.HOLDER).write_text('{"host": "h", "process": 1, "start": "now"}\n')
    lock.check_not_held(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("after", [(), ("--resume",)])
@pytest.mark.parametrize(
    ("name", "text"),
    [(lock.NAME, "mine"), (lock.HOLDER, "mine"), (lock.HOLDER, "[" * 5000), (lock.HOLDER, "3")],
)
def test_a_file_of_a_user_that_has_the_name_of_a_lock(straight, tmp_path, name, text, after):
    config, run = straight
    workdir = tmp_path / "run"
    if after:
        shutil.copytree(run, workdir)
    else:
        workdir.mkdir()
    (workdir / name).write_text(text)
    before = tree_digest(tmp_path)
    code, out, err = invoke("train", config, "--workdir", workdir, *after)
    assert (code, out) == (2, "")
    assert err == (
        f"balora: {workdir / name}: expected the file by which a run locks its folder, got another "
        "one of that name. Move it elsewhere.\n"
    )
    assert tree_digest(tmp_path) == before


def finish(config, workdir, expected):
    outcome = invoke("train", config, "--workdir", workdir, "--resume")
    assert outcome.code == 0, outcome.err
    same_runs(workdir, expected)
    kept = [child.name for child in (workdir / "checkpoints").iterdir()]
    assert all(name.isdigit() for name in kept), kept
    files = {child.name for child in workdir.iterdir()}
    assert files | {"curves.png"} == {child.name for child in expected.iterdir()} | {"curves.png"}
    return outcome
