"""A store: whole objects by name; one holder at a time."""

import threading

import fsspec
import pytest

from balora_jax.errors import InputError
from balora_jax.io import lease as leases
from balora_jax.io.lease import leased
from balora_jax.io.store import Store
from tests import bucket

ADDRESS = "gs://b/runs/a"


@pytest.fixture
def store(a_bucket):
    return Store(ADDRESS, "here")


def test_objects_are_written_read_and_removed(store):
    assert store.names() == []
    assert store.read("x/y") is None
    store.write("x/y", b"1")
    store.write("x/y", b"22")
    assert (store.names(), store.read("x/y")) == (["x/y"], b"22")
    store.remove(["x/y", "x/y"])
    assert store.names() == []


def test_names_are_those_below_the_address(store):
    Store("gs://b/runs/ab", "here").write("c", b"")
    Store("gs://b/runs", "here").write("d", b"")
    store.write("e", b"")
    assert store.names() == ["e"]


def test_one_of_many_creates(store):
    won, barrier = [], threading.Barrier(8)

    def create(number):
        barrier.wait()
        if store.create("lock", b"%d" % number):
            won.append(number)

    threads = [threading.Thread(target=create, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.read("lock") == b"%d" % won[0]


def test_files_are_copied_both_ways(store, tmp_path):
    (tmp_path / "here" / "a").mkdir(parents=True)
    (tmp_path / "here" / "a" / "b").write_bytes(b"3")
    store.put(["a/b"], tmp_path / "here")
    store.get(["a/b"], tmp_path / "there")
    assert (tmp_path / "there" / "a" / "b").read_bytes() == b"3"


def test_a_name_that_leads_out_is_refused(store):
    store.write("../../x", b"")
    with pytest.raises(OSError, match="holds an object with the name"):
        Store("gs://b", "here").names()


def test_a_missing_library_is_named(monkeypatch):
    def missing(*_, **__):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(InputError) as refused:
        Store(ADDRESS, "--workdir gs://b/runs/a")
    assert str(refused.value) == (
        "--workdir gs://b/runs/a: expected the library for such an address, got none (Please "
        'install gcsfs). Install it: pip install "balora_jax[gcs]".'
    )


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(leases, "BEAT", 0.05)
    monkeypatch.setattr(leases, "DEAD", 0.4)


def nothing(*_):
    pass


def test_a_living_holder_refuses_others(store, quick):
    beats = []
    with leased(store, lambda: beats.append(1), nothing) as held:
        said = []
        with pytest.raises(InputError, match=r"got one in use by process [0-9]+ on "):
            leased(store, nothing, said.append).__enter__()
        assert "waiting" in said[0]
        assert held.is_own()
        assert beats
    assert store.names() == []
    with leased(store, nothing, nothing):
        pass


def test_a_dead_holder_gives_way(store, quick):
    with leased(store, nothing, nothing) as first:
        left = store.read("run.lock.json")
    assert not first.lost
    store.write("run.lock.json", left)  # as a kill leaves it
    with leased(store, nothing, nothing) as second:
        assert second.is_own()
        assert not first.is_own()


def test_a_holder_that_was_silent_notices_that_another_came(store, quick):
    with leased(store, nothing, nothing) as first:
        store.remove(["run.lock.json"])
        other = Store(ADDRESS, "here")
        with leased(other, nothing, nothing) as second:
            first._thread.join(5)
            assert first.lost
            assert second.is_own()
    assert store.names() == []


def test_a_users_object_of_that_name_stays(store, quick):
    store.write("run.lock.json", b"mine")
    with pytest.raises(InputError, match=r"a/run\.lock\.json: expected the object by which a run"):
        leased(store, nothing, nothing).__enter__()
    assert store.read("run.lock.json") == b"mine"


def test_a_store_that_does_not_answer_is_bad_input(store, monkeypatch):
    def broken(*_, **__):
        raise PermissionError("403 Forbidden")

    monkeypatch.setattr(bucket.Bucket, "cat_file", broken)
    with pytest.raises(InputError) as refused:
        leased(store, nothing, nothing).__enter__()
    assert str(refused.value) == (
        "--workdir gs://b/runs/a: expected a folder of a bucket that can be read and written, got: "
        "gs://b/runs/a: 403 Forbidden. Check the name and the permissions, and log in (gcloud auth "
        "application-default login)."
    )
