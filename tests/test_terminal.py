"""The command line as it is typed: nothing, settings in any order, the Tab key."""

import itertools
import shutil
import subprocess
import sys

import pytest

from balora_jax import cli
from balora_jax.config_file import dump_changes, load_config

WORDS = (["run.yaml"], ["--set", "a.b=1", "c=[x,y]"], ["--workdir", "w"], ["--set", "d=e=f"])


@pytest.mark.parametrize("order", list(itertools.permutations(WORDS)), ids=str)
def test_settings_stand_in_any_order(order):
    options = cli.make_parser().parse_args(["train", *itertools.chain(*order)])
    assert (options.config, options.workdir) == ("run.yaml", "w")
    assert sorted(options.set) == ["a.b=1", "c=[x,y]", "d=e=f"]


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        (["--set", "oops", "runs/lr=1.yaml"], ["oops"]),  # refused where the config is read
        (["--set=a.b=1", "c-d=2", "runs/lr=1.yaml"], ["a.b=1", "c-d=2"]),
        (["runs/lr=1.yaml", "--set", "a.b=--set", "--set", "c="], ["a.b=--set", "c="]),
    ],
)
def test_what_is_a_setting(words, settings):
    options = cli.make_parser().parse_args(["train", "--workdir", "w", *words])
    assert (options.config, options.set) == ("runs/lr=1.yaml", settings)


def test_the_bare_name_says_what_can_be_done(capsys):
    assert cli.main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert 9 <= len(lines) <= 13
    assert [line.split()[1] for line in lines[1:-1]] == [verb.name for verb in cli.VERBS]
    assert max(map(len, lines)) <= 100


def script(shell, capsys):
    pytest.importorskip("shtab")
    assert cli.main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("balora tr", {"train"}),
        ("balora train --work", {"--workdir"}),
        (
            "balora train c.yaml --set training.max_s",
            {"training.max_steps=", "training.max_skipped="},
        ),
        ("balora export --format g", {"gguf"}),
        ("balora train here/", {"here/run.yaml", "here/more"}),
    ],
)
def test_bash_completes(typed, found, capsys, tmp_path):
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    (tmp_path / "here" / "more").mkdir(parents=True)
    (tmp_path / "here" / "run.yaml").touch()
    (tmp_path / "script").write_text(script("bash", capsys))
    words = typed.split()
    asked = (
        f"source ./script; COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; "
        "$(complete -p balora | sed 's/.*-F \\([^ ]*\\).*/\\1/') balora; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", asked], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert found <= {line.strip() for line in done.stdout.splitlines()}, done


def test_zsh_reads_its_script(capsys, tmp_path):
    text = script("zsh", capsys)
    assert text.startswith("#compdef balora")
    assert "training.max_steps=" in text
    if shutil.which("zsh") is not None:
        (tmp_path / "_balora").write_text(text)
        subprocess.run(["zsh", "-n", str(tmp_path / "_balora")], check=True)


def test_completion_without_its_package_is_refused(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 2
    assert capsys.readouterr() == (
        "",
        "balora: completion: expected the package shtab, which is not installed. Run pip install "
        "'balora-jax[completion]'.\n",
    )


def test_only_what_was_changed_is_said(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "model: {name_or_path: m, remat: none}\ndata: {train: t.jsonl}\n"
        "regularizers: {consistency: 0.5}\ntraining: {max_steps: 3, batch_size: 32}\n"
    )
    said = dump_changes(load_config(tmp_path / "c.yaml", ["eval.limit=3", "training.seed=42"]))
    assert said == (
        "model:\n  name_or_path: m\n  remat: none\nregularizers:\n  consistency: 0.5\n"
        "data:\n  train: t.jsonl\ntraining:\n  max_steps: 3\neval:\n  limit: 3\n"
    )
