"""Damaged checkpoints, which are never taken for whole, and full disks."""

import errno
import hashlib
import os
import resource
import shutil
import subprocess

import numpy as np
import pytest

from balora_jax.errors import InputError
from balora_jax.io import checkpoint, metrics
from tests.run.conftest import invoke
from tests.tiny_run import adapter_bytes, checkpoint_steps, metrics_of

pytestmark = pytest.mark.usefixtures("no_curves")


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def unfinished(finished, tmp_path):
    """A copy of the run with its two checkpoints, as before its export."""
    workdir = tmp_path / "run"
    shutil.copytree(finished.workdir, workdir)
    shutil.rmtree(workdir / "adapter")
    (workdir / "summary.json").unlink()
    assert checkpoint_steps(workdir) == [2, 4]
    return workdir


def break_file(file, kind, rng):
    data = bytearray(file.read_bytes())
    if kind == "truncate":
        file.write_bytes(data[: int(rng.integers(len(data)))])
    elif kind == "remove":
        file.unlink()
    else:
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        file.write_bytes(data)


def test_the_seal_is_what_sha256sum_reads(finished):
    for step in ("2", "4"):
        folder = finished.workdir / "checkpoints" / step
        lines = (folder / "SHA256SUMS").read_text().splitlines()
        names = {line.split("  ", 1)[1] for line in lines}
        everything = {str(path.relative_to(folder)) for path in files_of(folder)}
        assert names == everything - {"SHA256SUMS"}
        for line in lines:
            digest, name = line.split("  ", 1)
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
        if shutil.which("sha256sum"):
            subprocess.run(
                ["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=True
            )


@pytest.mark.parametrize("trial", range(20))
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(finished, tmp_path, trial):
    rng = np.random.default_rng(trial)
    folder = unfinished(finished, tmp_path) / "checkpoints"
    files = [path for path in files_of(folder / "4") if path.stat().st_size]
    file = files[trial % len(files)]
    break_file(file, ("truncate", "flip a bit", "remove")[trial % 3], rng)
    step, (said,) = checkpoint.newest_whole(folder)
    assert step == 2
    assert said.startswith(f"{folder / '4'}: damaged, as ")
    assert str(file.relative_to(folder / "4")) in said or file.name == "SHA256SUMS"
    assert "put aside as damaged-4" in said
    assert sorted(path.name for path in folder.iterdir()) == ["2", "damaged-4"]


def test_a_run_goes_on_from_the_checkpoint_before(finished, tmp_path):
    workdir = unfinished(finished, tmp_path)
    largest = max(files_of(workdir / "checkpoints" / "4"), key=lambda path: path.stat().st_size)
    break_file(largest, "flip a bit", np.random.default_rng(0))
    outcome = invoke("train", finished.config, "--workdir", workdir, "--resume")
    assert outcome.code == 0, outcome.err
    assert "damaged, as " in outcome.out
    assert "resumed at step 2 " in outcome.out
    assert metrics_of(workdir) == metrics_of(finished.workdir)
    assert adapter_bytes(workdir) == adapter_bytes(finished.workdir)
    assert (workdir / "checkpoints" / "damaged-4").is_dir()


def test_one_that_was_cut_short_is_put_aside(finished, tmp_path):
    folder = unfinished(finished, tmp_path) / "checkpoints"
    (folder / "4" / "SHA256SUMS").unlink()
    step, (said,) = checkpoint.newest_whole(folder)
    assert step == 2
    assert said.startswith(f"{folder / '4'}: writing it was cut short")
    assert said.endswith("put aside as unsealed-4")
    assert checkpoint_steps(folder.parent) == [2]
    (folder / "2" / "SHA256SUMS").unlink()
    assert checkpoint.newest_whole(folder)[0] is None
    checkpoint.discard(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["unsealed-2", "unsealed-4"]


def test_only_damaged_ones_are_an_error(finished, tmp_path):
    """Beginning again would cost what was done so far, and nobody asked for it."""
    workdir = unfinished(finished, tmp_path)
    for step in ("2", "4"):
        (workdir / "checkpoints" / step / "SHA256SUMS").write_text("")
    code, _, err = invoke("train", finished.config, "--workdir", workdir, "--resume")
    assert code == 2
    assert "expected a whole checkpoint, got only damaged ones" in err
    assert "SHA256SUMS is cut short" in err


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(finished, tmp_path, monkeypatch):
    workdir = unfinished(finished, tmp_path)
    shutil.rmtree(workdir / "checkpoints" / "4")
    save, (soft, hard) = checkpoint.Checkpoints.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_on_a_full_disk(self, *arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            save(self, *arguments)
            self.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", save_on_a_full_disk)
        code, _, err = invoke("train", finished.config, "--workdir", workdir, "--resume")
    assert code == 3
    message = err.splitlines()[-1]
    assert f"expected room for a checkpoint, got: {os.strerror(errno.EFBIG)}" in message
    assert f"{workdir / 'checkpoints' / '2'} is whole" in message
    assert "Traceback" not in err
    assert checkpoint_steps(workdir) == [2]
    outcome = invoke("train", finished.config, "--workdir", workdir, "--resume")
    assert outcome.code == 0, outcome.err
    assert adapter_bytes(workdir) == adapter_bytes(finished.workdir)


def test_a_log_that_cannot_be_written_ends_the_run(finished, tmp_path, monkeypatch):
    def write(self, row):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(metrics.MetricsLog, "write", write)
    workdir = tmp_path / "run"
    code, _, err = invoke("train", finished.config, "--workdir", workdir)
    assert code == 3
    assert err.splitlines()[-1] == (
        f"balora: {workdir}: expected to read and write there, got: "
        f"{os.strerror(errno.ENOSPC)}. Correct that and go on with --resume."
    )


def test_nothing_there_is_nothing_to_resume(tmp_path):
    assert checkpoint.newest_whole(tmp_path / "checkpoints") == (None, [])
    folder = tmp_path / "checkpoints" / "7"
    folder.mkdir(parents=True)
    (folder / "SHA256SUMS").write_text("0" * 64 + "  gone\n")
    with pytest.raises(InputError, match="only damaged"):
        checkpoint.newest_whole(tmp_path / "checkpoints")
