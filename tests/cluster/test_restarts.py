"""The restart loop of a JobSet, by the rules of the manifest itself.

``BALORA_RESTARTS=1`` runs it for real: two processes on the loopback, one of them preempted.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from urllib.parse import quote

import pytest

from tests import bucket, compiler
from tests.cluster.jobset import CONFIGS, JobSet
from tests.tiny_run import FEW, adapter_bytes, metrics_of, write_config, write_inputs

PATIENCE = 240.0
ADDRESS = "gs://b/runs/one"
ROOT = CONFIGS.parents[1]


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

    def __init__(self, jobs, config, folder, workdir=None):
        self.jobs, self.config, self.folder = jobs, config, folder
        self.workdir = workdir or str(folder / "run")
        self.port, self.starts = 0, 0
        folder.mkdir()
        # Read by every Python at its start.
        (folder / "sitecustomize.py").write_text(
            f"from tests import bucket\nbucket.install({str(folder / 'bucket')!r})\n"
        )

    def start(self, index):
        if index == 0:
            self.starts += 1
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.port = free.getsockname()[1]
        arguments = [self.here(text) for text in self.jobs.arguments(index)]
        command = [sys.executable, "-m", "balora_jax", *arguments]
        paths = [str(self.folder), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, **compiler.on_cpu(), "PYTHONPATH": os.pathsep.join(paths)}
        log = (self.folder / f"{self.starts}-{index}.log").open("w")
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

    def left(self):
        """What the run left, as a folder."""
        if self.workdir == ADDRESS:
            return bucket.unpacked(self.folder / "bucket", ADDRESS, self.folder / "seen")
        return self.folder / "run"

    def rows(self):
        file = self.folder / "run" / "metrics.jsonl"
        if self.workdir == ADDRESS:
            file = (
                self.folder / "bucket" / quote(f"{ADDRESS.removeprefix('gs://')}/metrics.jsonl", "")
            )
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def wait_for_rows(self, count, pods):
        end = time.monotonic() + PATIENCE
        while self.rows() < count:
            assert all(pod.poll() is None for pod in pods), self.text()
            assert time.monotonic() < end, self.text()
            time.sleep(0.01)

    def text(self):
        return "\n".join(log.read_text() for log in sorted(self.folder.glob("*.log")))


def undisturbed(attempt, pods):
    """Nothing happens to the pods."""


@pytest.mark.skipif("BALORA_RESTARTS" not in os.environ, reason="takes minutes")
def test_a_disturbed_set_ends_with_the_bytes_of_an_undisturbed_one(tmp_path):
    inputs = write_inputs(tmp_path)
    training = {"max_steps": 40, "checkpoint_every": 10}
    config = write_config(
        tmp_path / "c.yaml", inputs, adapter=FEW, training=training, mesh={"data": 2}
    )
    jobs = JobSet("jobset_gpu.yaml")
    quiet = Pods(jobs, config, tmp_path / "quiet")
    found = jobs.run(quiet.start, disturb=undisturbed)
    assert (found.completed, found.codes) == (True, [[0, 0]]), quiet.text()

    for name, workdir, number, victim, codes in (
        ("preempted", None, signal.SIGTERM, 1, [3, 3]),
        ("preempted_bucket", ADDRESS, signal.SIGTERM, 1, [3, 3]),
        ("killed_bucket", ADDRESS, signal.SIGKILL, 0, [-signal.SIGKILL, 3]),
    ):
        run = Pods(jobs, config, tmp_path / name, workdir)

        def disturb(attempt, pods, run=run, number=number, victim=victim):
            if attempt == 0:
                run.wait_for_rows(12 if run.workdir != ADDRESS else 10, pods)
                pods[victim].send_signal(number)

        found = jobs.run(run.start, disturb=disturb)
        # On a busy machine the CPU's own collectives may fail once more; then all start again.
        assert (found.completed, found.codes[0], found.codes[-1]) == (True, codes, [0, 0]), (
            run.text()
        )
        assert "resumed at step" in run.text()
        assert adapter_bytes(run.left()) == adapter_bytes(quiet.left())
        assert metrics_of(run.left()) == metrics_of(quiet.left())

    bad = Pods(
        jobs, write_config(tmp_path / "bad.yaml", inputs, mesh={"data": 3}), tmp_path / "bad"
    )
    refused = jobs.run(bad.start)
    assert (refused.completed, len(refused.codes)) == (False, 1), bad.text()
    # The one that is later is told to end, and may say so.
    assert sorted(refused.codes[0]) in ([2, 2], [2, 3]), bad.text()
    assert not bad.left().exists()
