"""The restart loop of a JobSet, by the rules of the manifest itself.

``BALORA_RESTARTS=1`` runs it for real: two processes on the loopback, one of them preempted.
"""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests import compiler
from tests.cluster.jobset import JobSet
from tests.tiny_run import FEW, adapter_bytes, metrics_of, write_config, write_inputs

PATIENCE = 240.0


class Ended:
    """A pod whose process has ended."""

    def __init__(self, code):
        self.returncode = code

    def poll(self):
        return self.returncode


@pytest.mark.parametrize(
    ("ends", "completed"),
    [
        ([(0, 0)], True),
        ([(3, 3), (0, 0)], True),
        ([(137, 3), (1, 3), (0, 0)], True),
        ([(2, 2)], False),
        ([(3, 3), (2, 2)], False),
    ],
)
def test_3_starts_again_and_2_does_not(ends, completed):
    left = [list(codes) for codes in ends]

    def start(index):
        code = left[0][index]
        if index == 1:
            left.pop(0)
        return Ended(code)

    found = JobSet("jobset_gpu.yaml").run(start)
    assert found.completed is completed
    assert found.codes == [list(codes) for codes in ends]


def test_restarts_have_an_end():
    jobs = JobSet("jobset_gpu.yaml")
    jobs.policy["maxRestarts"] = 2
    found = jobs.run(lambda index: Ended(3))
    assert not found.completed
    assert len(found.codes) == 3


def test_pods_that_are_left_are_ended():
    found = JobSet("jobset_gpu.yaml").run(
        lambda index: Ended(2) if index else subprocess.Popen(["sleep", "60"])
    )
    assert found.codes == [[-signal.SIGTERM, 2]]


class Pods:
    """Starts the container of a manifest as processes here, on a tiny config."""

    def __init__(self, jobs, config, workdir, logs):
        self.jobs, self.config, self.workdir, self.logs = jobs, config, workdir, logs
        self.port, self.starts = 0, 0

    def start(self, index):
        if index == 0:
            self.starts += 1
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.port = free.getsockname()[1]
        arguments = [self.here(text) for text in self.jobs.arguments(index)]
        command = [sys.executable, "-m", "balora_jax", *arguments]
        environment = {**os.environ, **compiler.on_cpu()}
        log = (self.logs / f"{self.starts}-{index}.log").open("w")
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def here(self, text):
        """An argument with what is to be changed in the manifest, changed."""
        if text.startswith("configs/"):
            return str(self.config)
        if text.startswith("--workdir="):
            return f"--workdir={self.workdir}"
        if text.startswith("--coordinator="):
            return f"--coordinator=127.0.0.1:{self.port}"
        return text

    def text(self):
        return "\n".join(log.read_text() for log in sorted(self.logs.iterdir()))


@pytest.mark.skipif("BALORA_RESTARTS" not in os.environ, reason="takes a minute")
def test_a_preempted_set_ends_with_the_bytes_of_an_undisturbed_one(tmp_path):
    inputs = write_inputs(tmp_path)
    training = {"max_steps": 40, "checkpoint_every": 10}
    config = write_config(
        tmp_path / "c.yaml", inputs, adapter=FEW, training=training, mesh={"data": 2}
    )
    jobs, found = JobSet("jobset_gpu.yaml"), {}

    def preempt(attempt, pods, workdir):
        end = time.monotonic() + PATIENCE
        while attempt == 0 and not _rows(workdir) >= 12:
            assert all(pod.poll() is None for pod in pods)
            assert time.monotonic() < end
            time.sleep(0.01)
        if attempt == 0:
            pods[1].send_signal(signal.SIGTERM)

    for name, disturb in (
        ("quiet", lambda attempt, pods: None),
        ("preempted", lambda attempt, pods: preempt(attempt, pods, tmp_path / "preempted")),
    ):
        (tmp_path / f"{name}.logs").mkdir()
        pods = Pods(jobs, config, tmp_path / name, tmp_path / f"{name}.logs")
        found[name] = jobs.run(pods.start, disturb=disturb)
        assert found[name].completed, pods.text()
    assert found["quiet"].codes == [[0, 0]]
    assert found["preempted"].codes == [[3, 3], [0, 0]]
    assert "resumed at step" in pods.text()
    assert adapter_bytes(tmp_path / "preempted") == adapter_bytes(tmp_path / "quiet")
    assert metrics_of(tmp_path / "preempted") == metrics_of(tmp_path / "quiet")

    bad = write_config(tmp_path / "bad.yaml", inputs, mesh={"data": 3})
    (tmp_path / "bad.logs").mkdir()
    pods = Pods(jobs, bad, tmp_path / "bad", tmp_path / "bad.logs")
    refused = jobs.run(pods.start)
    assert (refused.completed, refused.codes) == (False, [[2, 2]]), pods.text()
    assert not (tmp_path / "bad").exists()


def _rows(workdir):
    file = workdir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0
