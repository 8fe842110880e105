"""Runs on several hosts against the run on one, and hosts that go.

Hosts are processes here, which meet on the loopback; the mesh has four devices throughout.
``BALORA_HOST_TRIALS=50`` kills one of two processes fifty times instead of once, and
``BALORA_HOST_CHAINS=1`` runs eight devices as one, two and four processes that go on from each other.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from balora_jax.parallel import child
from tests.run import workers
from tests.tiny_run import (
    FEW,
    VOCAB_SIZE,
    adapter_bytes,
    checkpoint_steps,
    metrics_of,
    write_config,
)

STEPS, DEVICES = 24, 4
TRIALS = int(os.environ.get("BALORA_HOST_TRIALS", "1"))
PATIENCE = 240.0
LOSSES = ("loss", "task_loss", "consistency", "diversity", "spectral")


@pytest.fixture(scope="module")
def config(tmp_path_factory, inputs):
    folder = tmp_path_factory.mktemp("hosts")
    return write_config(
        folder / "config.yaml",
        inputs,
        adapter=FEW,
        training={"max_steps": STEPS, "checkpoint_every": 4, "keep_checkpoints": 2},
        mesh={"data": 1, "fsdp": 2, "tensor": 2},
        eval={"task": "exact_match"},
    )


def _received(parent):
    try:
        return parent.recv(2**16)
    except (BlockingIOError, ConnectionError):
        return b""


class Hosts:
    """One run by some processes, each with its log."""

    def __init__(self, config, workdir, cache, processes, *more, all_devices=DEVICES):
        self.workdir = Path(workdir)
        arguments = ["train", config, "--workdir", str(workdir), *more]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        devices = all_devices // processes
        self.logs = [Path(f"{workdir}.{i}.log") for i in range(processes)]
        for log in self.logs:
            log.unlink(missing_ok=True)
        if processes == 1:
            self.processes = [
                workers.start(workers.command, arguments, str(self.logs[0]), str(cache), devices)
            ]
            return
        pairs = [socket.socketpair() for _ in self.logs]
        self.parents = [ours for ours, _ in pairs]
        self.processes = [
            workers.start(
                *(workers.host, arguments, str(log), str(cache), devices, port, processes, i),
                theirs,
            )
            for i, (log, (_, theirs)) in enumerate(zip(self.logs, pairs, strict=True))
        ]
        for _, theirs in pairs:
            theirs.close()

    def wait_for_rows(self, count):
        """Until all processes have met and so many steps are logged."""
        file = self.workdir / "metrics.jsonl"
        self.wait_for(
            lambda: self._met() and file.exists() and file.read_bytes().count(b"\n") >= count
        )

    def wait_for(self, condition):
        end = time.monotonic() + PATIENCE
        while not condition():
            assert all(process.is_alive() for process in self.processes), self.text()
            assert time.monotonic() < end, self.text()
            time.sleep(0.005)

    def _met(self):
        return self.logs[0].exists() and "devices: " in self.logs[0].read_text()

    def codes(self):
        """Exit codes, when all have ended by themselves."""
        end = time.monotonic() + PATIENCE
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        found = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        return found

    def told(self, process):
        """What a process has told its parent so far, one fact after the other."""
        parent, text = self.parents[process], b""
        parent.setblocking(False)
        while part := _received(parent):
            text += part
        return [json.loads(line) for line in text.splitlines()]

    def text(self):
        return "\n".join(log.read_text() for log in self.logs)

    def succeed(self):
        assert self.codes() == [0] * len(self.processes), self.text()
        return self


@pytest.fixture(scope="module")
def one(config, tmp_path_factory, cache_folder):
    """The run by one process."""
    return Hosts(config, tmp_path_factory.mktemp("one") / "run", cache_folder, 1).succeed()


@pytest.fixture(scope="module")
def two(config, tmp_path_factory, cache_folder):
    """The run by two processes with half of the devices each."""
    return Hosts(config, tmp_path_factory.mktemp("two") / "run", cache_folder, 2).succeed()


# Consistency is T² = 4 times a small difference of two logarithms of sums of V numbers, each rounded
# at the size of log V, for student and teacher; sums over other devices round in another order.
ROUNDING = {"consistency": 4 * 2 * np.finfo(np.float32).eps * np.log(VOCAB_SIZE)}


def agree(left, right, steps=STEPS):
    """Losses to 1e-6 of themselves, adapters nearly as well."""
    rows = list(zip(metrics_of(left), metrics_of(right), strict=True))
    assert len(rows) == steps
    for a, b in rows:
        for name in LOSSES:
            close = pytest.approx(a[name], rel=1e-6, abs=ROUNDING.get(name, 1e-7))
            assert b[name] == close, (a["step"], name)
    name = "adapter/adapter_model.safetensors"
    first, second = load_file(left / name), load_file(right / name)
    assert first.keys() == second.keys()
    for key, value in first.items():
        np.testing.assert_allclose(second[key], value, atol=2e-5 * np.abs(value).max())


def test_two_processes_give_the_run_of_one(one, two):
    agree(one.workdir, two.workdir)


def test_everything_is_said_and_written_once(two):
    first, second = (log.read_text() for log in two.logs)
    for phrase in ("2 processes", "first example", "before: exact match", "after: exact match"):
        assert first.count(phrase) == 1, phrase
        assert phrase not in second, phrase
    assert "training: " not in second
    assert [row["step"] for row in metrics_of(two.workdir)] == list(range(1, STEPS + 1))
    assert {path.name for path in two.workdir.iterdir()} == {
        "config.yaml", "metrics.jsonl", "checkpoints", "adapter", "summary.json", "predictions",
    }  # fmt: skip


def without_the_last(source, target):
    """A copy of a finished run as it was some steps before its end."""
    shutil.copytree(source, target)
    shutil.rmtree(target / "checkpoints" / str(STEPS))
    shutil.rmtree(target / "adapter")
    (target / "summary.json").unlink()


def test_one_process_writes_and_two_go_on(config, one, tmp_path, cache_folder):
    without_the_last(one.workdir, tmp_path / "run")
    found = Hosts(config, tmp_path / "run", cache_folder, 2, "--resume").succeed()
    assert f"resumed at step {STEPS - 4} " in found.text()
    agree(one.workdir, found.workdir)


def test_a_signal_to_one_saves_in_all_and_one_goes_on(config, one, tmp_path, cache_folder):
    """The first process has not got the signal; one process then goes on with another mesh."""
    run = Hosts(config, tmp_path / "run", cache_folder, 2)
    run.wait_for_rows(3)
    os.kill(run.processes[1].pid, signal.SIGTERM)
    assert run.codes() == [3, 3], run.text()
    ends = [log.read_text().splitlines()[-1] for log in run.logs]
    assert ends[0] == ends[1]
    found = re.fullmatch(r"balora: interrupted by SIGTERM after step (\d+); .*", ends[0])
    assert found, ends[0]
    assert checkpoint_steps(run.workdir)[-1] == int(found[1]) < STEPS
    assert not (run.workdir / "adapter").exists()
    more = ("--resume", "--set", "mesh.fsdp=4", "mesh.tensor=1")
    found = Hosts(config, run.workdir, cache_folder, 1, *more).succeed()
    agree(one.workdir, found.workdir)


def test_a_host_that_is_told_to_end_ends_the_others(config, tmp_path, cache_folder):
    """While they start: there is no step to wait for. Nobody waits for a heart that beats no more."""
    run = Hosts(config, tmp_path / "run", cache_folder, 2)
    run.wait_for(run._met)
    run.parents[1].send(child.END + b"process 1 of 2 was ended by SIGTERM")
    # Where the runtime aborts a process first, its parent makes 3 of that.
    assert set(run.codes()) <= {3, -signal.SIGABRT}, run.text()
    facts = run.told(0)
    heard = {"end": "process 1 of 2 was ended by SIGTERM"} in facts
    # On a busy machine the connection of the devices may be cut before the reason is heard.
    assert heard or "balora: " in run.text(), run.text()
    waits = [fact["wait"] for fact in facts if "wait" in fact]
    assert waits[0].startswith("the other processes at 127.0.0.1:")
    assert set(waits[1::2]) <= {None}  # each wait has an end
    assert {"name": "process 0 of 2"} in facts


def test_a_run_tells_its_parent_of_its_steps(two):
    facts = two.told(1)
    assert [fact["step"] for fact in facts if "step" in fact] == list(range(STEPS + 1))
    steady = [i for i, fact in enumerate(facts) if "steady" in fact]
    first, last = (facts.index({"step": step}) for step in (0, STEPS))
    assert first < steady[0] < last < steady[1]
    assert [facts[i]["steady"] for i in steady] == [True, False]
    waits = [fact["wait"] for fact in facts if "wait" in fact]
    assert "the other hosts' part of a computation" in waits[:-1]
    assert waits[-1] is None


def test_a_host_that_nobody_joins_says_so_and_ends(config, tmp_path, process_environment):
    command = [sys.executable, "-m", "balora_jax", "train", config]
    command += ["--workdir", tmp_path / "run", "--start-timeout", "5"]
    command += ["--coordinator", "127.0.0.1:1", "--processes", "2", "--process", "1"]
    done = subprocess.run(command, env=process_environment, capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stderr == (
        "balora: process 1 of 2 waited 5 s for the other processes at 127.0.0.1:1, in vain: check "
        "that every host runs the same command and can reach that address, or raise "
        "--start-timeout. Start all processes again: nothing was written. Begin again.\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif("BALORA_HOST_CHAINS" not in os.environ, reason="takes minutes")
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_host_that_is_stopped_ends_the_run(config, tmp_path, process_environment, stopped):
    """Both name the newest whole checkpoint, and say no more than that."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "balora_jax", "train", config, "--workdir", tmp_path / "run"]
    command += ["--set", "training.max_steps=100000", "mesh={data: 2}"]
    command += ["--host-timeout", "10", "--stall-timeout", "15", "--processes", "2"]
    command += ["--coordinator", f"127.0.0.1:{port}", "--process"]
    log = tmp_path / "log"
    with log.open("w") as out:
        streams = {"stdout": out, "stderr": subprocess.PIPE, "text": True}
        both = [
            subprocess.Popen([*command, str(i)], env=process_environment, **streams)
            for i in range(2)
        ]
    end = time.monotonic() + PATIENCE
    while not (tmp_path / "run" / "checkpoints" / "8" / "SHA256SUMS").exists():
        assert time.monotonic() < end
        time.sleep(0.1)
    children = Path(f"/proc/{both[stopped].pid}/task/{both[stopped].pid}/children").read_text()
    os.kill(int(children.split()[0]), signal.SIGSTOP)
    for process in both:
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 3, err
        said = [line for line in err.splitlines() if line.startswith("balora: ")]
        assert len(said) == 1, err
        assert re.search(r"Start all processes again: .*checkpoints/\d+ is the newest", said[0])
        assert "*** Check failure" not in err


def test_killed_hosts(config, two, tmp_path, cache_folder):
    """One process is killed at a random moment, again and again; the other stops by itself.

    In the end the adapter is that of the run that nobody disturbed, bit for bit.
    """
    rng = np.random.default_rng(TRIALS)
    workdir, kills = tmp_path / "run", 0
    while kills < TRIALS:
        shutil.rmtree(workdir, ignore_errors=True)
        kills += _kill_until_done(config, workdir, cache_folder, rng, TRIALS - kills)
        if (workdir / "adapter").exists():
            assert adapter_bytes(workdir) == adapter_bytes(two.workdir)
    found = Hosts(config, workdir, cache_folder, 2, "--resume").succeed()
    assert metrics_of(workdir) == metrics_of(two.workdir)
    assert adapter_bytes(workdir) == adapter_bytes(two.workdir)
    assert "resumed at step" in found.text()


def _kill_until_done(config, workdir, cache, rng, most):
    """Kill and resume one run until it is far, or often enough; how often it was killed."""
    for count in range(most):
        run = Hosts(config, workdir, cache, 2, "--resume")
        done = len(metrics_of(workdir)) if (workdir / "metrics.jsonl").exists() else 0
        if done > STEPS - 8:
            run.succeed()
            return count
        run.wait_for_rows(int(rng.integers(max(done, 5), STEPS - 5)))
        time.sleep(rng.exponential(0.1))
        victim = int(rng.integers(2))
        began = time.monotonic()
        run.processes[victim].kill()
        codes = run.codes()
        assert codes[victim] == -signal.SIGKILL, run.text()
        # 3, or the runtime's abort, which the watching process of a real run turns into 3.
        assert codes[1 - victim] in (3, -signal.SIGABRT), run.text()
        assert time.monotonic() - began < 60
    return most


@pytest.fixture(scope="module")
def eight(inputs, tmp_path_factory, cache_folder):
    """Twenty steps on eight devices by chains of processes, and the run by one of them.

    Top-K entropy is left out of the comparison: at equal logits rounding decides which token is the
    K-th, and at this learning rate such a choice can be seen in the losses after it.
    """
    folder = tmp_path_factory.mktemp("eight")
    config = write_config(
        folder / "config.yaml",
        inputs,
        regularizers={"top_k": 0},
        training={"max_steps": 20, "checkpoint_every": 7, "batch_size": 16},
        mesh={"data": 2, "fsdp": 2, "tensor": 2},
        eval={"task": "none"},
    )

    def run(name, *chain):
        for number, processes in enumerate(chain, start=1):
            more = ["--resume"] if number > 1 else []
            if number < len(chain):
                more += ["--set", f"training.stop_at={7 * number}"]
            Hosts(config, folder / name, cache_folder, processes, *more, all_devices=8).succeed()
        return folder / name

    return run, run("one", 1)


@pytest.mark.skipif("BALORA_HOST_CHAINS" not in os.environ, reason="takes minutes")
@pytest.mark.parametrize("chain", [(4,), (1, 2, 4), (4, 2, 1)])
def test_eight_devices_in_one_two_and_four_processes(eight, chain):
    run, expected = eight
    agree(expected, run("-".join(map(str, chain)), *chain), steps=20)
