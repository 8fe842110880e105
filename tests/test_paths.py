"""Paths: what the package prefix means, and what it may not reach."""

from pathlib import Path

import pytest

import balora_jax.errors
from balora_jax.errors import InputError
from balora_jax.paths import resolve_path

PACKAGE = Path(balora_jax.errors.__file__).parent


def test_a_package_path_is_inside_the_package():
    assert Path(resolve_path("balora_jax:errors.py")).samefile(PACKAGE / "errors.py")


@pytest.mark.parametrize("text", ["a/b.jsonl", "/a/b", "org/name", "org/name:config", "./x y"])
def test_other_texts_stay(text):
    assert resolve_path(text) == text


def test_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert resolve_path("~/model") == "/home/someone/model"


@pytest.mark.parametrize("inside", ["../secret", "a/../../b", "/etc/hosts", "", "."])
def test_paths_out_of_the_package_are_refused(inside):
    with pytest.raises(InputError, match="expected a relative path inside the package"):
        resolve_path(f"balora_jax:{inside}")


@pytest.mark.parametrize("text", ["", "  "])
def test_empty_text_is_refused(text):
    with pytest.raises(InputError, match="path: expected a path or a hub name, got empty text"):
        resolve_path(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x" * 300, "File name too long"),
        ("x/" * 3000, "File name too long"),
        ("a\0b", "embedded null byte"),
        ("~nobody_of_this_name/a", "Could not determine home directory."),
        ("loop", "Too many levels of symbolic links"),
    ],
)
def test_what_is_no_path_here_is_refused(text, reason, tmp_path, monkeypatch):
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as refused:
        resolve_path(text)
    assert str(refused.value) == (
        f"{text[:200]}: expected a path or a hub name, got: {reason}. Correct it."
    )
