"""Damaged checkpoints, which are never taken for whole, and full disks."""

import errno
import hashlib
import json
import os
import resource
import shutil
import subprocess

import numpy as np
import pytest

from balora_jax import finetune
from balora_jax.errors import InputError
from balora_jax.io import checkpoint, checkpoint_folder, folders, metrics, peft_writer, seals
from balora_jax.training import loop
from tests.run.conftest import invoke
from tests.tiny_run import adapter_bytes, checkpoint_steps, metrics_of, tree_digest

pytestmark = pytest.mark.usefixtures("no_curves")


@pytest.fixture(scope="module")
def finished(finished_plain):
    return finished_plain


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
        *lines, last = (folder / "SHA256SUMS").read_text().splitlines()
        assert last.startswith(f"# step {step}, {len(lines)} files, sha256 ")
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
    found = checkpoint_folder.look(folder)
    assert checkpoint_steps(folder.parent) == [2, 4]  # to look changes nothing
    assert found.step == 2
    (said,) = found.said
    assert said.startswith(f"{folder / '4'}: ")
    if file.name != "SHA256SUMS":
        assert str(file.relative_to(folder / "4")) in said
    aside = "unsealed-4" if not (folder / "4" / "SHA256SUMS").exists() else "damaged-4"
    assert f"put aside as {aside}" in said
    checkpoint_folder.tidy(folder, found)
    assert sorted(path.name for path in folder.iterdir()) == ["2", aside]


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


def test_one_without_a_seal_is_put_aside(finished, tmp_path):
    """It may be of another version; what was put aside before stays."""
    folder = unfinished(finished, tmp_path) / "checkpoints"
    (folder / "4" / "SHA256SUMS").unlink()
    (folder / "unsealed-4").mkdir()
    found = checkpoint_folder.look(folder)
    assert found.step == 2
    assert found.said == [f"{folder / '4'}: it has no SHA256SUMS; put aside as unsealed-4-2"]
    checkpoint_folder.tidy(folder, found)
    assert sorted(path.name for path in folder.iterdir()) == ["2", "unsealed-4", "unsealed-4-2"]


@pytest.mark.parametrize("name", ["4", "4.orbax-checkpoint-tmp", "4.orbax-checkpoint-tmp-17"])
def test_one_that_a_kill_cut_short_is_removed(finished, tmp_path, name):
    """The file ``writing`` proves that it is one."""
    folder = unfinished(finished, tmp_path) / "checkpoints"
    (folder / "4" / "SHA256SUMS").unlink()
    (folder / "4").rename(folder / name)
    (folder / "writing").write_text("4\n")
    (folder / "4.bak").mkdir()
    found = checkpoint_folder.look(folder)
    assert found.step == 2
    checkpoint_folder.tidy(folder, found)
    assert sorted(path.name for path in folder.iterdir()) == ["2", "4.bak"]


def test_one_that_was_being_removed_is_removed(finished, tmp_path):
    folder = unfinished(finished, tmp_path) / "checkpoints"
    (folder / "2").rename(folder / ".removed-2")
    checkpoint_folder.tidy(folder, checkpoint_folder.look(folder))
    assert [path.name for path in folder.iterdir()] == ["4"]


FOREIGN = ["best", "checkpoint-500", "2.bak", "3.orbax-checkpoint-tmp", "².bak", ".hidden"]


def test_what_is_not_of_the_run_stays(finished, tmp_path):
    """Whether there is a checkpoint to go on from or not, and whatever is kept."""
    workdir = unfinished(finished, tmp_path)
    for name in FOREIGN:
        (workdir / "checkpoints" / name).mkdir()
        (workdir / "checkpoints" / name / "thesis.txt").write_text("mine")
    (workdir / "checkpoints" / "notes.txt").write_text("mine")
    for step in ("2", "4"):
        shutil.rmtree(workdir / "checkpoints" / step)
    once = ("--set", "training.keep_checkpoints=1")
    outcome = invoke("train", finished.config, "--workdir", workdir, "--resume", *once)
    assert outcome.code == 0, outcome.err
    assert "resumed" not in outcome.out
    left = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert left == {*FOREIGN, "notes.txt", "4"}
    assert all((workdir / "checkpoints" / n / "thesis.txt").exists() for n in FOREIGN)
    assert adapter_bytes(workdir) == adapter_bytes(finished.workdir)


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_has_the_name_of_a_checkpoint_is_refused_by_name(finished, tmp_path, kind):
    workdir = unfinished(finished, tmp_path)
    path = workdir / "checkpoints" / "500"
    if kind == "folder":
        path.mkdir()
        (path / "model.safetensors").write_text("mine")
    elif kind == "file":
        path.write_text("mine")
    else:
        path.symlink_to(workdir / "checkpoints" / "4")
    before = tree_digest(tmp_path)
    code, out, err = invoke("train", finished.config, "--workdir", workdir, "--resume")
    assert (code, out) == (2, "")
    assert f"balora: {path}: expected a " in err
    assert tree_digest(tmp_path) == before


def test_another_step_under_its_name_is_damaged(finished, tmp_path):
    workdir = unfinished(finished, tmp_path)
    (workdir / "checkpoints" / "4").rename(workdir / "checkpoints" / "3")
    found = checkpoint_folder.look(workdir / "checkpoints")
    assert found.step == 2
    assert "damaged, as it is the checkpoint of step 4 under another name" in found.said[0]


def reseal(folder, item, change):
    """Change what orbax wrote as JSON, and seal the folder again."""
    file = folder / item / "metadata"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    seals.seal(folder, int(folder.name))


@pytest.mark.parametrize(
    ("item", "change", "phrase"),
    [
        (
            "run",
            lambda run: {**run, "format": 1},
            "expected a checkpoint of format 3, got format 1",
        ),
        ("run", lambda run: {k: run[k] for k in ("config", "base")}, "got format None"),
        ("run", lambda run: {**run, "version": "9"}, "expected the config and the base of a run"),
        ("run", lambda run: {**run, "config": None}, "expected the config and the base of a run"),
        ("run", lambda run: [run], "expected a JSON object"),
        ("data", lambda data: [data], "expected a JSON object"),
        ("data", lambda data: {**data, "batches": None}, "expected a position in the data"),
        ("data", lambda data: {**data, "more": {}}, "expected a position in the data"),
        (
            "data",
            lambda data: {**data, "batches": {**data["batches"], "position": {"next_index": -5}}},
            "expected the place of an iterator",
        ),
        (
            "data",
            lambda data: {**data, "batches": {**data["batches"], "position": None}},
            "expected the place of an iterator",
        ),
        (
            "data",
            lambda data: {**data, "batches": {**data["batches"], "seed": 7}},
            "data position: expected seed = 42, got 7",
        ),
    ],
)
def test_a_sealed_one_of_another_program_is_refused(finished, tmp_path, item, change, phrase):
    workdir = unfinished(finished, tmp_path)
    reseal(workdir / "checkpoints" / "4", item, change)
    before = tree_digest(tmp_path)
    code, out, err = invoke("train", finished.config, "--workdir", workdir, "--resume")
    assert (code, out) == (2, "")
    assert phrase in err
    assert len(err.splitlines()) == 1
    assert tree_digest(tmp_path) == before


@pytest.mark.parametrize(
    ("file", "phrase"),
    [
        ("_METADATA", "_METADATA: expected JSON"),
        ("manifest.ocdbt", ": expected the arrays of this run"),
        (None, ": expected the arrays of this run"),
    ],
)
def test_sealed_arrays_of_another_program_are_refused(finished, tmp_path, file, phrase):
    workdir = unfinished(finished, tmp_path)
    folder = workdir / "checkpoints" / "4"
    if file is None:
        shutil.rmtree(folder / "state")
    else:
        (folder / "state" / file).write_bytes(b"{")
    seals.seal(folder, 4)
    before = tree_digest(tmp_path)
    code, _, err = invoke("train", finished.config, "--workdir", workdir, "--resume")
    assert code == 2
    assert str(folder) in err.splitlines()[-1]
    assert phrase in err.splitlines()[-1]
    assert "Traceback" not in err
    assert tree_digest(tmp_path) == before


def test_only_damaged_ones_are_an_error(finished, tmp_path):
    """Beginning again would cost what was done so far, and nobody asked for it."""
    workdir = unfinished(finished, tmp_path)
    for step in ("2", "4"):
        (workdir / "checkpoints" / step / "SHA256SUMS").write_text("")
    code, _, err = invoke("train", finished.config, "--workdir", workdir, "--resume")
    assert code == 2
    assert "expected a whole checkpoint, got only damaged ones" in err
    assert "SHA256SUMS is cut short" in err
    assert checkpoint_steps(workdir) == [2, 4]


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
        f"{os.strerror(errno.ENOSPC)}. Correct that; no checkpoint is saved yet. Begin again with "
        "--resume."
    )


@pytest.mark.parametrize(
    ("owner", "function"),
    [
        (loop, "write_atomically"),
        (finetune, "write_atomically"),
        (finetune.drawing, "draw_curves"),
        (metrics.MetricsLog, "write"),
        (peft_writer, "_save"),
        (folders.os, "rename"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_disk_that_fills_anywhere_names_the_newest_checkpoint(
    finished, tmp_path, monkeypatch, owner, function
):
    workdir = unfinished(finished, tmp_path)
    shutil.rmtree(workdir / "checkpoints" / "4")

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(owner, function, full)
        code, _, err = invoke("train", finished.config, "--workdir", workdir, "--resume")
    assert code == 3
    newest = (
        workdir / "checkpoints" / str(checkpoint_folder.sealed_steps(workdir / "checkpoints")[-1])
    )
    said = err.splitlines()[-1]
    assert os.strerror(errno.ENOSPC) in said
    assert str(newest) in said
    assert "Traceback" not in err
    outcome = invoke("train", finished.config, "--workdir", workdir, "--resume")
    assert outcome.code == 0, outcome.err
    assert adapter_bytes(workdir) == adapter_bytes(finished.workdir)
    left = {path.name for path in workdir.iterdir()}
    assert left - {"curves.png"} == {p.name for p in finished.workdir.iterdir()} - {"curves.png"}


def test_nothing_there_is_nothing_to_resume(tmp_path):
    assert checkpoint_folder.look(tmp_path / "checkpoints") == (None, [], [], [])
    folder = tmp_path / "checkpoints" / "7"
    folder.mkdir(parents=True)
    (folder / "SHA256SUMS").write_text("0" * 64 + "  gone\n")
    with pytest.raises(InputError, match="only damaged"):
        checkpoint_folder.look(tmp_path / "checkpoints")
