"""What lies in the way of what a command writes: refused before the work, and never lost."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from balora_jax import finetune
from balora_jax.io import folders, lock, metrics, seals
from balora_jax.training.loop import Training
from tests.run.conftest import invoke, settings
from tests.tiny_run import adapter_bytes, sums, tree_digest, write_rows

pytestmark = pytest.mark.usefixtures("no_curves")


@pytest.fixture(scope="module")
def finished(finished_plain):
    return finished_plain


@pytest.fixture
def workdir(finished, tmp_path):
    """A copy of a finished run."""
    return Path(shutil.copytree(finished.workdir, tmp_path / "run"))


def refused(arguments, *phrases):
    code, out, err = invoke(*arguments)
    assert (code, out) == (2, ""), err
    assert len(err.splitlines()) == 1
    for phrase in phrases:
        assert phrase in err


def refused_to_resume(finished, workdir, *phrases):
    def state():
        return {
            path.relative_to(workdir): (os.lstat(path).st_mode, os.lstat(path).st_ino)
            for path in sorted(workdir.rglob("*"))
        }

    before = state()
    refused(["train", finished.config, "--workdir", workdir, "--resume"], *phrases)
    assert state() == before


# What a report and a picture may replace.


@pytest.mark.parametrize("kind", ["config", "rows", "device", "pipe", "link"])
def test_a_report_replaces_nothing_of_a_users(finished, tmp_path, kind):
    config = shutil.copy(finished.config, tmp_path / "config.yaml")
    file = tmp_path / "report.json"
    if kind == "config":
        file = config
    elif kind == "rows":
        write_rows(file, sums(3, 0))
    elif kind == "device":
        file = Path("/dev/null")
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        (tmp_path / "mine").write_text("{}\n")
        file.symlink_to("mine")
    before = os.lstat(file)
    refused(["eval", config, "--json", file], f"--json {file}: expected a new file", "Choose")
    assert os.lstat(file) == before


def test_an_earlier_report_is_replaced(finished, tmp_path):
    file = tmp_path / "report.json"
    for _ in range(2):
        assert invoke("eval", finished.config, "--json", file).code == 0
        assert json.loads(file.read_text())["rows"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_draft_is_never_what_lies_there(tmp_path, kind):
    """`X.partial` was written through where it was a link, and hung where it was a pipe."""
    mine = tmp_path / "x.json.partial"
    if kind == "link":
        (tmp_path / "mine").write_text("mine")
        mine.symlink_to("mine")
    elif kind == "pipe":
        os.mkfifo(mine)
    else:
        mine.mkdir()
    before = os.lstat(mine)
    folders.write_atomically(tmp_path / "x.json", "new")
    assert (tmp_path / "x.json").read_text() == "new"
    assert os.lstat(mine).st_mode == before.st_mode
    if kind == "link":
        assert (tmp_path / "mine").read_text() == "mine"


def test_a_failed_draft_leaves_what_was_there(tmp_path):
    file = tmp_path / "x.json"
    file.write_text("old")
    with contextlib.suppress(ZeroDivisionError), folders.replaced_file(file) as draft:
        draft.write_text("half")
        raise ZeroDivisionError
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"x.json": "old"}


# The folder of a run.


def link_of(path):
    away = path.with_name(f"mine-{path.name}")
    if path.exists():
        path.rename(away)
    else:
        away.write_text("mine\n")
    path.symlink_to(away.name)


STRANGE = {
    "adapter": link_of,
    "metrics.jsonl": link_of,
    "metrics.unread": link_of,
    "summary.json": link_of,
    ".summary.json.abcdefgh.partial": Path.mkdir,
    ".metrics.jsonl.abcdefgh.partial": os.mkfifo,
    ".adapter.abcdefgh.partial": Path.touch,
    ".adapter.old.abcdefgh.partial": link_of,
    ".hosts_see_this": Path.mkdir,
    "checkpoints/writing": Path.mkdir,
    "checkpoints/.removed-9": Path.touch,
    "checkpoints/.writing.abcdefgh.partial": link_of,
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_a_run_would_replace_or_remove_is_of_its_kind(finished, workdir, name):
    """Found before the training, not at its end."""
    STRANGE[name](workdir / name)
    refused_to_resume(finished, workdir, Path(name).name, "Move it elsewhere.")


def test_drafts_of_a_killed_run_go(finished, workdir):
    (workdir / ".summary.json.abcdefgh.partial").write_text("half")
    (workdir / ".adapter.old.abcdefgh.partial").mkdir()
    (workdir / "checkpoints" / ".writing.abcdefgh.partial").write_text("4\n")
    code, _, err = invoke("train", finished.config, "--workdir", workdir, "--resume")
    assert code == 0, err
    assert tree_digest(workdir / "checkpoints") == tree_digest(finished.workdir / "checkpoints")
    names = {path.name for path in finished.workdir.iterdir()}
    assert {path.name for path in workdir.iterdir()} == names


def test_checkpoints_may_lie_on_another_disk(finished, workdir):
    link_of(workdir / "checkpoints")
    code, out, err = invoke("train", finished.config, "--workdir", workdir, "--resume")
    assert code == 0, err
    assert "resumed at step 4" in out
    assert (workdir / "checkpoints").is_symlink()


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints/4/SHA256SUMS"])
def test_a_file_without_end_is_not_read(finished, workdir, name):
    os.truncate(workdir / name, 2**40)
    if name == "metrics.jsonl":
        refused_to_resume(finished, workdir, "expected at most 2 GiB of rows, got 1024 GiB")
        return
    code, out, err = invoke("train", finished.config, "--workdir", workdir, "--resume")
    assert code == 0, err
    assert "damaged, as SHA256SUMS is too large; put aside" in out


@pytest.mark.parametrize("value", ["[1]", "{}", '"x"', "true", "1" + "0" * 400])
def test_a_row_with_a_value_that_is_no_figure(finished, workdir, value):
    """It ended every resume in the drawing of the curves."""
    file = workdir / "metrics.jsonl"
    first, *others = file.read_text().splitlines()
    row = json.dumps(json.loads(first) | {"loss": "@"}).replace('"@"', value)
    file.write_text("\n".join([row, *others]) + "\n")
    code, out, err = invoke("train", finished.config, "--workdir", workdir, "--resume")
    assert code == 0, err
    assert "1 lines are no rows; moved to metrics.unread" in out
    assert file.read_text().splitlines() == others
    assert (workdir / "metrics.unread").read_text() == row + "\n"
    assert len(metrics.read_metrics(file)) == len(others)


@pytest.mark.parametrize("value", ["[1]", "null", "{}", "1e999", "1" + "0" * 400])
def test_a_first_score_that_is_none(finished, workdir, value):
    """A checkpoint of another program, sealed as ours are."""
    newest = workdir / "checkpoints" / "4"
    file = newest / "data" / "metadata"
    data = json.loads(file.read_text())
    file.write_text(json.dumps(data | {"before": {"exact_match": "@"}}).replace('"@"', value))
    (newest / "SHA256SUMS").unlink()
    seals.seal(newest, 4)
    refused_to_resume(finished, workdir, "expected a position in the data and a score")


@pytest.mark.parametrize("command", ["train", "export", "json"])
def test_nothing_new_in_a_sealed_checkpoint(finished, workdir, command):
    place = workdir / "checkpoints" / "4" / "mine"
    arguments = {
        "train": ["train", finished.config, "--workdir", place],
        "export": ["export", finished.config, "--workdir", workdir, "--out", place],
        "json": ["eval", finished.config, "--json", place],
    }[command]
    refused(arguments, "outside of a run's checkpoints", str(workdir / "checkpoints" / "4"))
    assert seals.damage(workdir / "checkpoints" / "4", 4) is None


# A folder that moves while its run works.


def test_the_end_of_a_lock_leaves_another_ones_alone(tmp_path):
    folder, moved = tmp_path / "run", tmp_path / "moved"
    with lock.locked(folder) as first_is_held:
        assert first_is_held()
        folder.rename(moved)
        assert not first_is_held()
        folder.mkdir()
        theirs = {lock.NAME: "", lock.HOLDER: '{"host": "h", "process": 1, "start": "now"}\n'}
        for name, text in theirs.items():
            (folder / name).write_text(text)
        assert not first_is_held()
    assert {path.name: path.read_text() for path in folder.iterdir()} == theirs
    assert moved.is_dir()


@pytest.mark.parametrize("when", ["steps", "end"])
def test_a_run_whose_folder_moved_writes_nothing_more(finished, tmp_path, monkeypatch, when):
    workdir, moved = tmp_path / "run", tmp_path / "moved"

    def move(*_):
        workdir.rename(moved)

    if when == "steps":
        take = Training.save_if_good

        def late(self, step, bar):
            if step == 4:
                self.store.wait()  # what is being written meanwhile, orbax writes anew
                move()
            take(self, step, bar)

        monkeypatch.setattr(Training, "save_if_good", late)
    else:
        export = finetune.export_trained
        monkeypatch.setattr(finetune, "export_trained", lambda *a: (export(*a), move())[0])
    code, _, err = invoke("train", finished.config, "--workdir", workdir)
    assert code == 3
    assert "expected the folder that this run has locked, got another or none" in err
    assert not workdir.exists()
    monkeypatch.undo()
    monkeypatch.setattr(finetune.drawing, "draw_curves", lambda rows, path: False)
    again = invoke("train", finished.config, "--workdir", moved, "--resume")
    assert again.code == 0, again.err
    assert adapter_bytes(moved) == adapter_bytes(finished.workdir)


# A run that goes on with another score.


def test_the_first_score_is_of_the_same_rows_and_settings(finished, workdir, tmp_path):
    """It was taken of trained weights, or was that of other rows."""
    other = settings({"data.validation": write_rows(tmp_path / "few.jsonl", sums(5, 3))})
    fresh = tmp_path / "fresh"
    assert invoke("train", finished.config, "--workdir", fresh, *other).code == 0
    found = invoke("train", finished.config, "--workdir", workdir, "--resume", *other)
    assert found.code == 0, found.err
    assert "resumed at step 4" in found.out
    for score in ("before", "after"):
        got, wanted = (
            json.loads((run / "summary.json").read_text())[score] for run in (workdir, fresh)
        )
        assert got == wanted
        assert got["rows"] == 5


# Exports.


def test_an_export_to_a_folder_that_nothing_can_take_the_place_of(
    workdir, finished, tmp_path, monkeypatch
):
    empty, link = tmp_path / "empty", tmp_path / "link"
    empty.mkdir()
    link.symlink_to("empty")
    monkeypatch.chdir(empty)
    for out in (".", link, empty):
        arguments = ["export", finished.config, "--workdir", workdir, "--out", out]
        refused(arguments, f"{out}: expected a folder that another can take the place of")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "link", "run"]
    assert list(empty.iterdir()) == []


def test_a_disk_that_fills_under_an_export_is_one_sentence(
    workdir, finished, tmp_path, monkeypatch
):
    def full(*_, **__):
        raise OSError(28, os.strerror(28), str(tmp_path / "x"))

    monkeypatch.setattr("balora_jax.pretrained.export.export_merged", full)
    code, _, err = invoke(
        "export", finished.config, "--workdir", workdir, "--format", "merged", "--out",
        tmp_path / "merged",
    )  # fmt: skip
    assert code == 3
    assert err.splitlines() == [
        f"balora: {tmp_path / 'x'}: expected to read and write there, got: {os.strerror(28)}. "
        "Correct that and start again."
    ]


# Text that is none, and streams that cannot be written.


@pytest.mark.parametrize(
    "more",
    [
        ["train", "CONFIG", "--workdir", "a\udcffb"],
        ["generate", "CONFIG", "--prompt", "a\udcffb"],
        ["train", "CONFIG", "--workdir", "new", "--set", "data.template=a\udcffb{question}"],
        ["train", "CONFIG", "--workdir", "new", "--set", 'data.template="\\ud800{question}"'],
    ],
    ids=["workdir", "prompt", "set", "half a character"],
)
def test_bytes_that_are_no_text(finished, tmp_path, monkeypatch, more):
    monkeypatch.chdir(tmp_path)
    refused([finished.config if part == "CONFIG" else part for part in more], "expected")
    assert list(tmp_path.iterdir()) == []


def started(arguments, environment, **streams):
    command = [sys.executable, "-m", "balora_jax", *map(str, arguments)]
    return subprocess.run(command, env=environment, check=False, timeout=120, **streams)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_streams_that_cannot_be_written(finished, process_environment, tmp_path):
    missing = ["eval", tmp_path / "none.yaml"]
    with open("/dev/full", "wb") as full:
        assert started(missing, process_environment, stderr=full).returncode == 2
        found = started(
            ["check", finished.config, "--no-memory"],
            process_environment,
            stdout=full,
            stderr=subprocess.PIPE,
        )
    assert found.returncode == 3
    assert found.stderr.decode().splitlines() == [
        f"balora: output: expected to read and write there, got: {os.strerror(28)}. Correct that "
        "and start again."
    ]


def test_an_output_whose_encoding_lacks_the_marks(finished, process_environment):
    environment = {**process_environment, "PYTHONIOENCODING": "ascii"}
    found = started(["check", finished.config, "--no-memory"], environment, capture_output=True)
    assert found.returncode == 0, found.stderr
    assert rb"\u27e6" in found.stdout


# YAML.


@pytest.mark.parametrize("number", ["1:30", "1" + ":59" * 100_000, "-1:30.5"])
def test_no_numbers_in_base_60(finished, number):
    refused(
        ["eval", finished.config, "--set", f"training.max_steps={number}"],
        "a number in base 60, '" if len(number) < 50 else "a number in base 60",
        "quote it",
    )
