"""Predictions and samples of a run: what they hold, and that a resume neither doubles nor loses."""

import json
import shutil
from pathlib import Path

import pytest

from balora_jax.training.records import Records, beside_each_other
from balora_jax.training.run import Scored
from tests.run.conftest import invoke
from tests.tiny_run import PLAIN, tree_digest, write_config

pytestmark = pytest.mark.usefixtures("no_curves")


def rows_of(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


@pytest.fixture(scope="module")
def sampled(tmp_path_factory, inputs):
    """A run with a question of one's own and two rows, and what it printed."""
    folder = tmp_path_factory.mktemp("sampled")
    asks = {"task": "exact_match", "samples": 2, "prompts": ["2+2"]}
    config = write_config(folder / "config.yaml", inputs, **PLAIN, eval=asks)
    code, out, err = invoke("train", config, "--workdir", folder / "run")
    assert code == 0, err
    return config, folder / "run", out


def test_samples_are_the_answers_of_the_scores(sampled, inputs):
    _, run, out = sampled
    samples = rows_of(run / "samples.jsonl")
    asked = rows_of(inputs / "validation.jsonl")[:2]
    assert [row["step"] for row in samples] == [0] * 3 + [4] * 3
    for title, part in (("before", samples[:3]), ("after", samples[3:])):
        assert [row["prompt"] for row in part] == ["2+2", *(row["question"] for row in asked)]
        assert "gold" not in part[0]
        known = rows_of(run / "predictions" / f"{title}.jsonl")[:2]
        assert [row["answer"] for row in part[1:]] == [row["text"] for row in known]
        assert [row["gold"] for row in part[1:]] == [row["gold"] for row in known]
    assert [row["answer"] for row in samples[:3]] != [row["answer"] for row in samples[3:]]
    last = out[out.rindex("samples, all in") :]
    for row in samples:
        assert f"    step {row['step']}: {' '.join(row['answer'].split())}\n" in last
    assert last.count("    right: ") == 2


def test_predictions_give_the_figures_of_the_summary(sampled, inputs):
    _, run, _ = sampled
    summary = json.loads((run / "summary.json").read_text())
    for title in ("before", "after"):
        rows = rows_of(run / "predictions" / f"{title}.jsonl")
        asked = rows_of(inputs / "validation.jsonl")
        assert [row["question"] for row in rows] == [row["question"] for row in asked]
        assert [row["gold"] for row in rows] == [row["answer"].strip("#") for row in asked]
        right = [row["answer"] == row["gold"] for row in rows]  # plain digits
        assert right == [row["right"] for row in rows]
        assert summary[title]["exact_match"] == sum(right) / len(rows)
        answered = [row["answer"] is not None for row in rows]
        assert summary[title]["answered"] == sum(answered) / len(rows)


def test_a_resumed_run_has_every_row_once(sampled, tmp_path):
    config, run, _ = sampled
    again = tmp_path / "run"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "4")
    (again / "predictions" / "after.jsonl").unlink()
    (again / "predictions" / "step_3.jsonl").write_text("of a step that comes again")
    (again / "predictions" / ".after.jsonl.abcdefgh.partial").write_text("half")
    with (again / "samples.jsonl").open("a") as file:
        file.write('{"step": 3, "prompt": "1", "answer": "2"}\nmine\n')
    code, out, err = invoke("train", config, "--workdir", again, "--resume")
    assert code == 0, err
    assert "resumed at step 2" in out
    assert tree_digest(again / "predictions") == tree_digest(run / "predictions")
    lines = (again / "samples.jsonl").read_text().splitlines()
    whole = (run / "samples.jsonl").read_text().splitlines()
    assert lines == [*whole[:3], "mine", *whole[3:]]


def test_other_prompts_on_a_resume_are_asked_of_the_start_as_well(sampled, tmp_path):
    config, run, _ = sampled
    again = tmp_path / "run"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "4")
    fewer = ["--set", "eval.samples=0", "eval.prompts=['2+2']"]
    code, _, err = invoke("train", config, "--workdir", again, "--resume", *fewer)
    assert code == 0, err
    before = rows_of(run / "samples.jsonl")
    assert rows_of(again / "samples.jsonl") == [before[0], before[3]]


def test_samples_of_a_run_without_a_score(tmp_path, inputs):
    asks = {"task": "none", "samples": 1}
    config = write_config(
        tmp_path / "c.yaml", inputs, **PLAIN, training={"max_steps": 1}, eval=asks
    )
    code, _, err = invoke("train", config, "--workdir", tmp_path / "run")
    assert code == 0, err
    (first, last) = rows_of(tmp_path / "run" / "samples.jsonl")
    asked = rows_of(inputs / "validation.jsonl")[0]
    for row, step in ((first, 0), (last, 1)):
        assert (row["step"], row["prompt"], row["gold"]) == (step, *asked.values())
    assert not (tmp_path / "run" / "predictions").exists()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["before"] == {}
    code, _, err = invoke("train", config, "--workdir", tmp_path / "run", "--resume")
    assert code == 0, err
    assert rows_of(tmp_path / "run" / "samples.jsonl") == [first, last]


def test_prompts_without_rows_are_refused(place):
    tree = {"data": {"validation": None}, "eval": {"samples": 2}}
    place.refused(
        "eval.samples: expected 0 without data.validation, got 2", config=place.config(**tree)
    )
    place.refused(
        "prompt 1: expected prompt and answer within the 64 positions",
        config=place.config(eval={"prompts": ["1" * 80]}),
    )


@pytest.mark.parametrize("value", ["samples: 1", "prompts: ['a']"])
def test_labels_have_no_samples(tmp_path, value):
    from balora_jax.config_file import parse_config
    from balora_jax.errors import InputError
    from tests.tiny_labels_run import label_config_tree

    name, _, given = value.partition(": ")
    asks = {name: json.loads(given.replace("'", '"'))}
    with pytest.raises(InputError, match=rf"eval\.{name}: .*: labels do not read it"):
        parse_config(label_config_tree(tmp_path, eval=asks), "config")


def test_nothing_is_written_before_the_folder_is_the_runs(tmp_path, capsys):
    records = Records(tmp_path)
    records.keep("before", 0, Scored({}, [{"row": 1}], [{"prompt": "a\x1b", "answer": "\ud800"}]))
    assert list(tmp_path.iterdir()) == []
    records.begin(0)
    assert rows_of(tmp_path / "predictions" / "before.jsonl") == [{"row": 1}]
    kept = [{"step": 0, "prompt": "a\x1b", "answer": "\ud800"}]
    assert rows_of(tmp_path / "samples.jsonl") == kept
    assert capsys.readouterr().out == "samples, before\n  a\\x1b\n    \\ud800\n"
    records.keep("step 2", 2, Scored({}, [{"row": 2}], [{"prompt": "a", "answer": "c"}]))
    records.keep("step 1", 1, Scored({}, (), [{"prompt": "a", "answer": "b"}]))
    assert [row["step"] for row in rows_of(tmp_path / "samples.jsonl")] == [0, 1, 2]
    assert rows_of(tmp_path / "predictions" / "step_2.jsonl") == [{"row": 2}]
    assert beside_each_other(tmp_path)[1:] == [
        *("  a\\x1b", "    step 0: \\ud800", "  a", "    step 2: c")
    ]
    Records(tmp_path).begin(1)
    assert [row["step"] for row in rows_of(tmp_path / "samples.jsonl")] == [0, 1]
    assert not (tmp_path / "predictions" / "step_2.jsonl").exists()


@pytest.mark.parametrize("name", ["predictions/before.jsonl", "samples.jsonl", "predictions"])
def test_a_users_thing_of_such_a_name_is_refused(sampled, tmp_path, name):
    config, run, _ = sampled
    again = tmp_path / "run"
    shutil.copytree(run, again)
    kept = again / name
    kept.rename(tmp_path / "mine")
    kept.symlink_to(tmp_path / "mine")
    before = tree_digest(tmp_path)
    code, out, err = invoke("train", config, "--workdir", again, "--resume")
    assert (code, out) == (2, "")
    assert f"expected {Path(name).name} to be a" in err
    assert tree_digest(tmp_path) == before
