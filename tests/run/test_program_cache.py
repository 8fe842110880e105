"""Compiled programs that one run keeps for the next."""

import errno
import os
from collections import Counter

import jax
import pytest

from balora_jax.errors import InputError
from balora_jax.io import program_cache
from balora_jax.io.program_cache import Programs, kept
from tests.run.conftest import invoke
from tests.tiny_run import PLAIN, adapter_bytes, metrics_of, write_config

SEEN = Counter()
jax.monitoring.register_event_listener(lambda name, **_: SEEN.update([name.rpartition("/")[2]]))


@pytest.fixture
def kept_nowhere(monkeypatch, tmp_path):
    """No cache of JAX's own, as users have it, and a home that is not theirs."""
    before = jax.config.values["jax_compilation_cache_dir"]
    for name in ("BALORA_COMPILATION_CACHE", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    jax.config.update("jax_compilation_cache_dir", None)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()


@pytest.fixture
def train(kept_nowhere, no_curves, tmp_path, inputs):
    """A run of two steps, whose programs come from the folder or go there."""

    def run(name, cache="auto"):
        short = {"max_steps": 2, "checkpoint_every": 0, "compilation_cache": str(cache)}
        file = write_config(
            tmp_path / "c.yaml", inputs, **PLAIN, training=short, data={"validation": None}
        )
        SEEN.clear()
        code, _, err = invoke("train", file, "--workdir", tmp_path / name)
        assert code == 0, err
        result = metrics_of(tmp_path / name), adapter_bytes(tmp_path / name)
        return result, err, SEEN["cache_hits"], SEEN["cache_misses"]

    return run


def entries(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_the_second_run_compiles_nothing_and_is_the_same(train, tmp_path):
    folder = tmp_path / "home/.cache/balora_jax/compiled"
    before = {name: jax.config.values[name] for name in program_cache_settings()}
    first, said, _, written = train("first")
    assert written > 2
    assert len(entries(folder)) == written
    second, said_again, hits, missing = train("second")
    assert missing == 0
    assert hits > 2
    assert second == first
    assert "compilation cache" not in said + said_again
    assert {name: jax.config.values[name] for name in program_cache_settings()} == before


def program_cache_settings():
    return (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_enable_xla_caches",
    )


def compile_anew(number):
    """Compile a program that no other test has; its value."""
    return float(jax.jit(lambda x: x * number + 1)(2.0))


def test_none_keeps_nothing(kept_nowhere, tmp_path):
    SEEN.clear()
    with kept("none"):
        assert compile_anew(3.0) == 7.0
    assert SEEN["cache_hits"] == SEEN["cache_misses"] == 0
    assert not entries(tmp_path)


def test_a_folder_that_cannot_be_written_is_said_once(kept_nowhere, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    with kept(str(tmp_path / "file")):
        assert compile_anew(4.0) == 9.0
        assert compile_anew(5.0) == 11.0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"compilation cache {tmp_path / 'file'}/")
    assert "expected a folder to read and write in, got: Not a directory. Programs" in line


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:40] + b"?" + b[41:]])
def test_a_damaged_entry_is_as_if_it_were_not_there(kept_nowhere, tmp_path, capsys, damage):
    for _ in range(2):
        SEEN.clear()
        with kept(str(tmp_path)):
            assert compile_anew(6.0) == 13.0
        assert SEEN["cache_misses"] > 0
        for path in entries(tmp_path):
            path.write_bytes(damage(path.read_bytes()))
    assert capsys.readouterr().err == ""


def opened():
    """The folder that JAX is told inside."""
    return jax.config.values["jax_compilation_cache_dir"]


def test_what_names_the_folder(kept_nowhere, monkeypatch, tmp_path):
    mine = program_cache.machine()
    with kept("auto"):
        assert opened() == str(tmp_path / "home/.cache/balora_jax/compiled" / mine)
        with kept(str(tmp_path / "inner")):  # the outer one stands
            assert "inner" not in opened()
    assert opened() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    with kept("auto"):
        assert opened() == str(tmp_path / "xdg/balora_jax/compiled" / mine)
    monkeypatch.setenv("BALORA_COMPILATION_CACHE", str(tmp_path / "moved"))
    with kept("auto"):
        assert opened() == str(tmp_path / "moved" / mine)
    with kept("~/named"):
        assert opened() == str(tmp_path / "home/named" / mine)
    monkeypatch.setenv("BALORA_COMPILATION_CACHE", "none")
    with kept("auto"):
        assert opened() is None
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
    with kept(str(tmp_path / "ours")):
        assert opened() == str(tmp_path / "jax")
    assert not entries(tmp_path)


def test_another_machine_has_another_folder(monkeypatch):
    mine = program_cache.machine()
    assert program_cache.machine() == mine
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(977)), raising=False)
    other = program_cache.machine()
    assert other != mine
    monkeypatch.setattr(
        program_cache.Path, "read_text", lambda *_, **__: "flags\t\t: fpu avx2\nbogomips : 1\n"
    )
    assert program_cache.machine() not in (mine, other)


@pytest.mark.parametrize("name", ["gs://bucket/cache", "a\0b"])
def test_no_folder_of_this_system_is_refused(kept_nowhere, name, monkeypatch):
    with pytest.raises(InputError, match=r"training\.compilation_cache"), kept(name):
        pass
    if "\0" not in name:
        monkeypatch.setenv("BALORA_COMPILATION_CACHE", name)
        with pytest.raises(InputError, match="BALORA_COMPILATION_CACHE"), kept("auto"):
            pass


def test_what_was_longest_unused_goes_first(tmp_path):
    programs = Programs(tmp_path / "new", limit=3 * 116)  # each entry has a digest of 16 bytes
    for age, key in enumerate("abc"):
        programs.put(key, key.encode() * 100)
        os.utime(tmp_path / "new" / key, (1000 + age, 1000 + age))
    assert programs.get("a") == b"a" * 100  # now the newest
    Programs(tmp_path / "new", limit=3 * 116).put("d", b"d" * 100)
    assert {path.name for path in entries(tmp_path)} == {"a", "c", "d"}
    programs.put("e", b"e" * 1000)  # alone beyond the limit
    assert programs.get("e") is None
    assert {path.name for path in entries(tmp_path)} == {"a", "c", "d"}
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


def test_a_full_disk_leaves_no_half(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    programs = Programs(tmp_path, limit=1000)
    programs.put("a", b"a" * 100)
    monkeypatch.setattr(os, "replace", full)
    programs.put("b", b"b")
    programs.put("c", b"c")
    assert [path.name for path in entries(tmp_path)] == ["a"]
    assert programs.get("a") == b"a" * 100
    said = capsys.readouterr().err
    assert said.count("No space left on device") == 1
    assert said.count("\n") == 1
