"""A mirror cut short before any of its changes leaves a folder to go on with."""

import json
import shutil
from contextlib import suppress

import pytest

from balora_jax.errors import InputError, RunStoppedError
from balora_jax.io import checkpoint_folder, seals
from balora_jax.io.store import Store
from balora_jax.training.mirror import Mirror
from balora_jax.training.workdir import HEADER, check_workdir, remove_leftovers
from tests import bucket
from tests.tiny_run import tree_digest

ADDRESS = "gs://b/run"


class Held:
    """A lease that nobody takes."""

    lost = False

    def is_own(self):
        return True


class Killed(BaseException):
    """The process is gone."""


def mirror(folder, *, resume):
    """A mirror of what is in the bucket now."""
    shutil.rmtree(folder, ignore_errors=True)
    found = Mirror(Store(ADDRESS, "here"), folder)
    found.lease = Held()
    found.fetch(resume=resume)
    return found


def begin(folder):
    (folder / "config.yaml").write_text(HEADER + "task: text\n")
    (folder / "metrics.jsonl").write_text("")
    (folder / "checkpoints").mkdir(exist_ok=True)


def save(found, step, keep=2):
    """What ``Checkpoints`` does for a step."""
    folder = found.folder / "checkpoints"
    for old in checkpoint_folder.sealed_steps(folder)[:-keep]:
        shutil.rmtree(folder / str(old))
    with (found.folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step}) + "\n")
    (folder / "writing").write_text(f"{step}\n")
    (folder / str(step) / "state").mkdir(parents=True)
    (folder / str(step) / "_CHECKPOINT_METADATA").write_text("{}")
    (folder / str(step) / "state" / "d").write_text(f"weights of {step}")
    found.push()
    seals.seal(folder / str(step), step)
    (folder / "writing").unlink()
    found.push()


def export(found, text):
    shutil.rmtree(found.folder / "adapter", ignore_errors=True)
    (found.folder / "adapter").mkdir()
    (found.folder / "adapter" / "README.md").write_text("card")
    (found.folder / "adapter" / "adapter_config.json").write_text("{}")
    (found.folder / "adapter" / "adapter_model.safetensors").write_text(text)
    (found.folder / "summary.json").write_text("{}")
    found.push()


def life(found, done):
    """A run that goes on to step 9 and exports; notes the steps that it knows to be kept."""
    begin(found.folder)
    found.push()
    first = checkpoint_folder.look(found.folder / "checkpoints").step or 0
    for step in range(first + 3, 12, 3):
        save(found, step)
        done.append(step)
    export(found, "trained")


def gone_on(folder):
    """A mirror of what was left, checked and tidied as a run that goes on does."""
    found = mirror(folder, resume=True)
    check_workdir(folder, resume=True)
    whole = checkpoint_folder.look(folder / "checkpoints")
    remove_leftovers(folder)
    checkpoint_folder.tidy(folder / "checkpoints", whole)
    return found, whole


CHANGES = ("pipe_file", "put_file", "rm_file")


def killed_before(monkeypatch, number):
    """Let the change of that number, counted from 1, be the end."""
    counted = []
    for name in CHANGES:
        change = getattr(bucket.Bucket, name)

        def counting(self, *arguments, change=change, **options):
            counted.append(1)
            if len(counted) >= number:
                raise Killed
            return change(self, *arguments, **options)

        monkeypatch.setattr(bucket.Bucket, name, counting)
    return counted


def test_a_kill_before_any_change_loses_nothing_that_was_kept(a_bucket, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    with monkeypatch.context() as patch:
        counted = killed_before(patch, 10**6)
        life(mirror(whole, resume=True), [])
    expected = tree_digest(bucket.unpacked(a_bucket, ADDRESS, tmp_path / "seen"))
    assert expected == tree_digest(whole)
    assert len(counted) > 20
    for number in range(1, len(counted) + 1):
        shutil.rmtree(a_bucket)
        bucket.install(a_bucket)
        kept, met = [], []
        with monkeypatch.context() as patch:
            killed_before(patch, number)
            with pytest.raises(Killed):
                life(mirror(tmp_path / "first", resume=True), kept)
        found, left = gone_on(tmp_path / "second")
        assert (left.step or 0) >= max(kept, default=0), number
        assert not left.damaged, number
        if left.step is not None:
            rows = (found.folder / "metrics.jsonl").read_text().splitlines()
            assert left.step in [json.loads(row)["step"] for row in rows], number
        # A second kill, while it goes on, and then to the end.
        with monkeypatch.context() as patch:
            killed_before(patch, 1 + number % 7)
            with suppress(Killed):  # little may be left to do
                life(found, met)
        found, _ = gone_on(tmp_path / "third")
        life(found, met)
        seen = bucket.unpacked(a_bucket, ADDRESS, tmp_path / "seen")
        names = {name for name in tree_digest(seen) if not name.startswith("checkpoints/")}
        assert names == {name for name in expected if not name.startswith("checkpoints/")}
        assert checkpoint_folder.look(seen / "checkpoints").step == 9
        assert not (seen / "checkpoints" / "writing").exists()


def test_a_new_run_is_refused_where_one_is(a_bucket, tmp_path):
    life(mirror(tmp_path / "first", resume=False), [])
    mirror(tmp_path / "second", resume=False)
    with pytest.raises(InputError, match=r"got one that holds a run\. Add --resume"):
        check_workdir(tmp_path / "second", resume=False)
    assert not (tmp_path / "second" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("metrics.jsonl", "got one with metrics.jsonl that no run"),
        ("adapter/x", "got one with adapter that no run"),
        ("config.json", "got one that holds a model"),
    ],
)
def test_a_users_objects_refuse_a_new_run(a_bucket, tmp_path, name, phrase):
    Store(ADDRESS, "here").write(name, b"mine")
    mirror(tmp_path / "run", resume=False)
    with pytest.raises(InputError, match=phrase):
        check_workdir(tmp_path / "run", resume=False)


def test_other_objects_of_a_users_stay(a_bucket, tmp_path):
    store = Store(ADDRESS, "here")
    store.write("notes/mine.txt", b"mine")
    life(mirror(tmp_path / "first", resume=False), [])
    found, _ = gone_on(tmp_path / "second")
    (found.folder / "metrics.jsonl").write_text("")
    found.push()
    assert store.read("notes/mine.txt") == b"mine"


def test_a_damaged_checkpoint_is_put_aside_in_the_bucket_too(a_bucket, tmp_path):
    life(mirror(tmp_path / "first", resume=False), [])
    store = Store(ADDRESS, "here")
    store.write("checkpoints/9/state/d", b"not what it was")
    found, left = gone_on(tmp_path / "second")
    assert left.step == 6
    found.push()
    names = [name for name in store.names() if name.startswith("checkpoints/")]
    assert {name.split("/")[1] for name in names} == {"3", "6", "damaged-9"}
    assert store.read("checkpoints/damaged-9/state/d") == b"not what it was"


def test_what_did_not_change_is_not_sent_again(a_bucket, tmp_path, monkeypatch):
    found = mirror(tmp_path / "first", resume=False)
    life(found, [])
    found, _ = gone_on(tmp_path / "second")
    counted = killed_before(monkeypatch, 10**6)
    found.push()
    assert counted == []
    (found.folder / "summary.json").write_text('{"a": 1}')
    found.push()
    assert len(counted) == 1


def test_an_adapter_is_never_seen_half_new(a_bucket, tmp_path, monkeypatch):
    """Without its adapter_config.json nobody loads it; it goes first, and comes last."""
    life(mirror(tmp_path / "first", resume=False), [])
    for number in range(1, 5):
        found, _ = gone_on(tmp_path / "second")
        with monkeypatch.context() as patch:
            killed_before(patch, number + 1)
            with pytest.raises(Killed):
                export(found, f"other {number}")
        names = Store(ADDRESS, "here").names()
        assert ("adapter/adapter_config.json" in names) is (number == 4)
        export(gone_on(tmp_path / "third")[0], "trained")


def test_rows_are_brought_between_checkpoints(a_bucket, tmp_path):
    found = mirror(tmp_path / "first", resume=False)
    found.push_metrics()
    assert Store(ADDRESS, "here").names() == []
    begin(found.folder)
    found.push()
    with (found.folder / "metrics.jsonl").open("a") as file:
        file.write("{}\n")
    found.push_metrics()
    assert found.store.read("metrics.jsonl") == b"{}\n"


def test_a_run_whose_address_was_taken_writes_nothing_more(a_bucket, tmp_path):
    found = mirror(tmp_path / "first", resume=False)
    begin(found.folder)
    found.lease.lost = True
    for refused in (found.push, found.check):
        with pytest.raises(RunStoppedError, match="expected the lease that this run holds, got"):
            refused()
    assert found.store.names() == []
