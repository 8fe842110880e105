"""Paths: what the package prefix means, and what it may not reach."""

from pathlib import Path

import pytest

import balora_jax
import balora_jax.errors
from balora_jax.errors import InputError
from balora_jax.paths import check_local, resolve_path
from tests.run.conftest import invoke

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
        ("a\0b", "a character that no path can have"),
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


ADDRESSES = ["gs://b/x", "s3://b/x", "hdfs://h:1/x", "https://h/x.jsonl", "file:///x", "hf://d/x"]


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses_are_refused_by_their_scheme(address):
    scheme = address.split(":")[0]
    here = {"gs": "Copy it here (gcloud storage cp --recursive) or mount the bucket (gcsfuse)"}.get(
        scheme, "Mount it or copy it here"
    )
    for refused in (lambda: resolve_path(address), lambda: check_local(Path(address), address)):
        with pytest.raises(InputError) as caught:
            refused()
        assert str(caught.value) == (
            f"{address}: expected a path on this machine, got an address with the scheme "
            f"{scheme}://. {here}, and give that path."
        )


@pytest.mark.parametrize("path", ["a:b", "C:/x", "./gs:/x", "a/b://c", "balora_jax:x", ":/x"])
def test_a_colon_makes_no_address(path):
    check_local(path, path)


CONFIG = str(PACKAGE.parent / "configs" / "quickstart.yaml")
ASKED = ("--prompt", "x")


@pytest.mark.parametrize(
    ("where", "arguments"),
    [
        ("gs://b/c.yaml", ["train", "gs://b/c.yaml", "--workdir", "run"]),
        ("--workdir s3://b/run", ["train", CONFIG, "--workdir", "s3://b/run"]),
        ("--workdir gs://", ["train", CONFIG, "--workdir", "gs://"]),
        ("--workdir gs://b/run", ["study", CONFIG, "--workdir", "gs://b/run"]),
        ("--workdir gs://b/run", ["export", CONFIG, "--workdir", "gs://b/run", "--out", "o"]),
        ("--out s3://b/o", ["export", CONFIG, "--workdir", "run", "--out", "s3://b/o"]),
        ("--json gs://b/j", ["eval", CONFIG, "--json", "gs://b/j"]),
        ("--adapter gs://b/a", ["eval", CONFIG, "--adapter", "gs://b/a"]),
        ("--adapter gs://b/a", ["generate", CONFIG, *ASKED, "--adapter", "gs://b/a"]),
        ("--picture gs://b/p.png", ["plan", CONFIG, "--picture", "gs://b/p.png"]),
        ("--picture gs://b/p.png", ["bench", CONFIG, "--picture", "gs://b/p.png"]),
        ("gs://b/m", ["train", CONFIG, "--workdir", "run", "--set", "model.name_or_path=gs://b/m"]),
        (
            "gs://b/t.jsonl",
            ["train", CONFIG, "--workdir", "run", "--set", "data.train=gs://b/t.jsonl"],
        ),
        ("gs://b/v.jsonl", ["eval", CONFIG, "--set", "data.validation=gs://b/v.jsonl"]),
        ("gs://b/a", ["train", CONFIG, "--workdir", "run", "--set", "adapter.start=gs://b/a"]),
        ("extensions: gs://b/e.py", ["eval", CONFIG, "--set", "extensions=['gs://b/e.py']"]),
    ],
)
def test_no_command_takes_an_address_for_a_path(tmp_path, monkeypatch, where, arguments):
    monkeypatch.chdir(tmp_path)
    code, out, err = invoke(*arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert f"{where}: expected a path on this machine, got an address with the scheme" in err
    assert list(tmp_path.iterdir()) == []


def test_a_run_from_python_takes_no_address_either(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="--workdir s3://b: expected a path on this machine"):
        balora_jax.fit(balora_jax.load_config(CONFIG), workdir="s3://b")
    assert list(tmp_path.iterdir()) == []
