"""What people bring as text, in whole runs: sets, rows left out, conversations, another day."""

import datetime
import json
import shutil

import pytest
import yaml

from balora_jax import finetune
from balora_jax.data import chat
from tests.run.conftest import invoke
from tests.tiny_run import (
    PLAIN,
    adapter_bytes,
    checkpoint_steps,
    metrics_of,
    sums,
    tree_digest,
    write_config,
    write_inputs,
    write_rows,
)

pytest.importorskip("jinja2")

DATED = (
    "{{ strftime_now('%d.%m.%Y').replace('.', ' ') }}:{% for m in messages %}"
    "{{ '=' if m.role == 'assistant' else '*' }}{{ m.content }}"
    "{{ eos_token if m.role == 'assistant' else '' }}{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)


def run(config, workdir, *more):
    code, out, err = invoke("train", config, "--workdir", workdir, *more)
    assert code == 0, err
    return out


def halves(config, workdir, *more):
    """The same run with a stop after two of its four steps."""
    run(config, workdir, "--set", "training.stop_at=2")
    assert checkpoint_steps(workdir)[-1] == 2
    return run(config, workdir, "--resume", *more)


def same(left, right):
    assert metrics_of(left) == metrics_of(right)
    assert adapter_bytes(left) == adapter_bytes(right)


@pytest.fixture
def inputs(tmp_path):
    """The tiny inputs, with a second set under other columns and a bad row in it."""
    folder = write_inputs(tmp_path / "in")
    other = [{"p": row["question"], "r": row["answer"]} for row in sums(6, 7)]
    other[3]["r"] = ""
    write_rows(folder / "other.jsonl", other)
    return folder


def test_sets_with_weights_and_rows_left_out(tmp_path, inputs):
    train = [
        {"path": str(inputs / "train.jsonl"), "weight": 1},
        {"path": str(inputs / "other.jsonl"), "weight": 3, "template": "{p}=",
         "prompt_column": "p", "response_column": "r"},
    ]  # fmt: skip
    data = {"train": train, "bad_rows": "skip"}
    config = write_config(tmp_path / "c.yaml", inputs, **PLAIN, data=data)
    out = run(config, tmp_path / "whole")
    assert "29 examples of 30 rows (1 that cannot be read, " in out
    assert f"set {inputs / 'other.jsonl'}: 5 examples of 6 rows" in out
    halves(config, tmp_path / "halves")
    same(tmp_path / "whole", tmp_path / "halves")
    (line,) = (tmp_path / "halves" / "skipped_rows.jsonl").read_text().splitlines()
    bad = json.loads(line)
    assert (bad["set"], bad["row"]) == (str(inputs / "other.jsonl"), 4)
    assert bad["reason"].startswith("row 4: expected text in the column 'r', got an empty cell")
    changed = [{**train[0], "weight": 2}, train[1]]
    text = yaml.safe_load((tmp_path / "c.yaml").read_text())
    text["data"]["train"] = changed
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(text))
    before = tree_digest(tmp_path / "halves")
    code, _, err = invoke("train", config, "--workdir", tmp_path / "halves", "--resume")
    assert (code, "data.train" in err) == (2, True), err
    assert tree_digest(tmp_path / "halves") == before


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([], "data.train: expected"),
        ([{"path": "a", "pth": 1}], "data.train.0.pth: unknown key in data.train.0. Did you mean"),
        ([{"weight": 1}], "data.train.0.path: expected a value, got none"),
        ([{"path": "a", "weight": -1}], "data.train.0.weight: expected"),
        (["in/train.jsonl", {"path": "in/train.jsonl", "weight": 1}], "expected a weight for each"),
        ({"a": 1}, "data.train: expected"),
        (5, "data.train: expected"),
    ],
)
def test_sets_that_are_none(tmp_path, inputs, monkeypatch, train, message):
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path / "c.yaml", inputs, data={"train": train})
    code, out, err = invoke("train", config, "--workdir", tmp_path / "run")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


@pytest.fixture
def dated(tmp_path, inputs):
    """A config of conversations under a template that writes the date."""
    rows = [
        {"m": [{"role": "user", "content": row["question"]},
               {"role": "assistant", "content": row["answer"]}]}
        for row in sums(12, 3)
    ]  # fmt: skip
    write_rows(inputs / "chat.jsonl", rows)
    write_rows(inputs / "chat_validation.jsonl", rows[:3])
    (inputs / "dated.jinja").write_text(DATED)
    data = {
        "train": str(inputs / "chat.jsonl"), "validation": str(inputs / "chat_validation.jsonl"),
        "template": "chat", "messages_column": "m", "chat_template": str(inputs / "dated.jinja"),
        "max_length": 32,
    }  # fmt: skip
    evaluation = {"task": "exact_match", "marker": "#"}
    return write_config(tmp_path / "c.yaml", inputs, **PLAIN, data=data, eval=evaluation)


def clock(monkeypatch, year, month, day):
    """Another day, for every module that asks for it."""

    class Day(datetime.date):
        @classmethod
        def today(cls):
            return cls(year, month, day)

    for module in (finetune.datetime, chat.datetime):
        monkeypatch.setattr(module, "date", Day)


def test_a_run_goes_on_tomorrow_as_if_it_were_today(tmp_path, dated, monkeypatch):
    """The template writes the date: after midnight the run was refused as one of other data."""
    with monkeypatch.context() as day:
        clock(day, 2026, 1, 31)
        out = run(dated, tmp_path / "whole")
        assert "31 01 2026:*" in out
        run(dated, tmp_path / "halves", "--set", "training.stop_at=2")
    with monkeypatch.context() as day:
        clock(day, 2026, 2, 1)
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        day.chdir(elsewhere)
        day.setenv("TZ", "Pacific/Kiritimati")
        assert "31 01 2026:*" in run(dated, tmp_path / "halves", "--resume")
        same(tmp_path / "whole", tmp_path / "halves")
        recorded = yaml.safe_load((tmp_path / "halves" / "config.yaml").read_text())
        assert recorded["data"]["today"] == "2026-01-31"
        # The config of the run is asked again on that day; a new run has the new one.
        asked = invoke("generate", tmp_path / "whole" / "config.yaml", "--prompt", "1+1")
        new = run(dated, tmp_path / "new", "--set", "training.max_steps=1")
        assert "01 02 2026:*" in new
    with monkeypatch.context() as day:
        clock(day, 2026, 1, 31)
        again = invoke("generate", tmp_path / "whole" / "config.yaml", "--prompt", "1+1")
    assert asked.out == again.out
    assert again.code == 0


def test_validation_and_prompts_of_conversations(tmp_path, dated, monkeypatch):
    """The right answer is the last turn; a prompt is a question."""
    clock(monkeypatch, 2026, 1, 31)
    out = run(dated, tmp_path / "run", "--set", "training.max_steps=1")
    first = sums(12, 3)[0]["answer"].removeprefix("#")
    assert f"(right: {first})" in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["before"]["rows"] == 3
    code, out, err = invoke("generate", dated, "--prompt", "12+3")
    assert code == 0, err
    shutil.rmtree(tmp_path / "run")
    text = "31 01 2026:*12+3="
    code, raw, err = invoke("generate", dated, "--raw", "--prompt", text, "--prompt", f"<s>{text}")
    assert code == 0, err
    lines = [line for line in raw.splitlines() if line.strip()]
    # A start of text that is there already is not put there again.
    assert len(lines) % 2 == 0
    half = len(lines) // 2
    assert [line.replace("<s>", "") for line in lines[:half]] == [
        line.replace("<s>", "") for line in lines[half:]
    ]
