"""``--workdir gs://…``: the run of a folder, kept in a bucket."""

import pytest

from balora_jax.config_file import parse_config
from balora_jax.errors import InputError
from balora_jax.finetune import check_hosts
from balora_jax.io import lease
from balora_jax.io.store import Store
from tests import bucket
from tests.run.conftest import invoke, settings
from tests.tiny_run import (
    PLAIN,
    adapter_bytes,
    checkpoint_steps,
    config_tree,
    metrics_of,
    tree_digest,
)

ADDRESS = "gs://b/runs/one"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.1)
    monkeypatch.setattr(lease, "DEAD", 0.5)


def train(config, *more, **overrides):
    return invoke("train", config, "--workdir", ADDRESS, *more, *settings(overrides))


def test_a_run_stopped_and_resumed_in_a_bucket_is_that_of_a_folder(
    finished_plain, a_bucket, tmp_path, no_curves
):
    code, _, err = train(finished_plain.config, **{"training.stop_at": 2})
    assert code == 0, err
    again = train(finished_plain.config)
    assert again.code == 2
    assert f"balora: --workdir {ADDRESS}: expected a new or empty folder, got one that" in again.err
    code, out, err = train(finished_plain.config, "--resume")
    assert code == 0, err
    assert f"resumed at step 2 from {ADDRESS}/checkpoints/2" in out
    assert f"adapter: {ADDRESS}/adapter (PEFT, " in out
    seen = bucket.unpacked(a_bucket, ADDRESS, tmp_path / "seen")
    expected = finished_plain.workdir
    assert adapter_bytes(seen) == adapter_bytes(expected)
    assert metrics_of(seen) == metrics_of(expected)
    assert checkpoint_steps(seen) == checkpoint_steps(expected)
    assert set(tree_digest(seen / "adapter")) == set(tree_digest(expected / "adapter"))
    names = {path.name for path in seen.iterdir()}
    assert names == {path.name for path in expected.iterdir()} - {"curves.png"}
    # What came out is an ordinary folder: another command takes it.
    out = invoke(
        "export",
        finished_plain.config,
        "--workdir",
        seen,
        "--format",
        "peft",
        "--out",
        tmp_path / "o",
    )
    assert out.code == 0, out.err


def test_bad_input_leaves_no_object(finished_plain, a_bucket, no_curves):
    found = train(finished_plain.config, **{"data.train": "nowhere.jsonl"})
    assert found.code == 2
    assert Store(ADDRESS, "here").names() == []


def test_a_held_address_is_refused(finished_plain, a_bucket):
    store = Store(ADDRESS, "here")
    with lease.leased(store, lambda: None, lambda text: None):
        found = train(finished_plain.config)
    assert found.code == 2
    assert f"balora: --workdir {ADDRESS}: expected a folder that no other run is using" in found.err
    assert store.names() == []


def test_a_bucket_that_fails_ends_the_run_with_3(finished_plain, a_bucket, monkeypatch, no_curves):
    put = bucket.Bucket.put_file

    def full(self, lpath, rpath, **options):
        if rpath.endswith("SHA256SUMS"):
            raise OSError("507 no room")
        put(self, lpath, rpath, **options)

    monkeypatch.setattr(bucket.Bucket, "put_file", full)
    code, _, err = train(finished_plain.config)
    assert code == 3
    assert "507 no room" in err
    assert "Traceback" not in err
    names = Store(ADDRESS, "here").names()
    assert "metrics.jsonl" in names
    assert not any(name.endswith("SHA256SUMS") for name in names)
    monkeypatch.undo()
    monkeypatch.setattr(lease, "DEAD", 0.5)


@pytest.mark.parametrize(
    ("section", "key", "value", "where"),
    [
        ("regularizers", "teacher_cache", True, "regularizers.teacher_cache=true"),
        ("adapter", "method", "full", "adapter.method=full"),
    ],
)
def test_what_hosts_must_share_is_refused_with_a_bucket(
    inputs, monkeypatch, section, key, value, where
):
    tree = config_tree(inputs)
    bad = {**tree, section: {**(tree[section] if section != "adapter" else {}), key: value}}
    if section == "adapter":
        bad["regularizers"] = PLAIN["regularizers"]
    check_hosts(parse_config(bad, "here"))
    monkeypatch.setattr("jax.process_count", lambda: 2)
    check_hosts(parse_config(tree, "here"))
    with pytest.raises(InputError, match=f"{where}: expected a --workdir that all hosts share"):
        check_hosts(parse_config(bad, "here"))
