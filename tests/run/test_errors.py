"""Does every bad input end in one sentence and exit code 2, with nothing written?"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.run.conftest import invoke, settings
from tests.tiny_run import (
    random_weights,
    sums,
    tree_digest,
    write_config,
    write_inputs,
    write_model,
    write_rows,
)

ROOT = Path(__file__).parents[2]


class Place:
    """A folder of a test's own: whatever it holds must be as it was after a refused command."""

    def __init__(self, folder, inputs):
        self.folder, self.inputs = folder, inputs
        self.workdir = folder / "out" / "run"
        self.workdir.parent.mkdir()

    def config(self, **sections):
        return write_config(self.folder / "config.yaml", self.inputs, **sections)

    def model(self, **keys):
        return write_model(self.folder / "model", **keys)

    def refused(self, *phrases, arguments=None, config=None, overrides=None, workdir=None):
        """Run the command and check all that holds for every bad input."""
        if arguments is None:
            arguments = ["train", config or self.config(), "--workdir", workdir or self.workdir]
        before = tree_digest(self.folder), tree_digest(self.inputs)
        code, out, err = invoke(*arguments, *settings(overrides or {}))
        lines = err.splitlines()
        assert len(lines) == 1, err
        assert lines[0].startswith("balora: ")
        for phrase in phrases:
            assert phrase in lines[0]
        assert code == 2
        assert out == ""
        assert (tree_digest(self.folder), tree_digest(self.inputs)) == before


@pytest.fixture
def place(tmp_path, inputs):
    return Place(tmp_path, inputs)


@pytest.mark.parametrize(
    ("overrides", "phrases"),
    [
        (
            {"training.learing_rate": 1},
            ["training.learing_rate: unknown key in training.", "Did you mean 'learning_rate'?"],
        ),
        ({"trainin.seed": 1}, ["trainin: unknown key", "Did you mean 'training'?"]),
        ({"training.zzz": 1}, ["training.zzz: unknown key", "It knows max_steps"]),
        ({"training.batch_size": "many"}, ["training.batch_size: expected", "got 'many'"]),
        ({"training.batch_size": 0}, ["training.batch_size: expected", "greater than 0", "got 0"]),
        ({"training.optimizer": "adam"}, ["training.optimizer: expected", "'adamw'", "got 'adam'"]),
        ({"training.learning_rate": ".nan"}, ["training.learning_rate: expected", "got nan"]),
        ({"training.learning_rate": ".inf"}, ["training.learning_rate: expected", "got inf"]),
        ({"training.clip_norm": ".nan"}, ["training.clip_norm: expected", "got nan"]),
        ({"regularizers.spectral": ".nan"}, ["regularizers.spectral: expected", "got nan"]),
        ({"adapter.alpha": ".inf"}, ["adapter.alpha: expected", "got inf"]),
        ({"training.epochs": 1}, ["training: expected either max_steps or epochs, got both"]),
        ({"training.max_steps": "null"}, ["expected either max_steps or epochs, got neither"]),
        ({"training.batch_size": 9}, ["training.accumulation: expected a divisor of batch_size 9"]),
        ({"adapter.dropout": 0.1}, ["adapter.dropout: expected 0 with start 'pissa', got 0.1"]),
        ({"adapter.start": "pisa"}, ["adapter.start: expected 'lora', 'pissa'", "got 'pisa'"]),
        (
            {"adapter.target_modules": "[q_prj]"},
            ["adapter.target_modules: 'q_prj' matches no linear layer", "Did you mean 'q_proj'?"],
        ),
        ({"adapter.target_modules": "[]"}, ["adapter.target_modules: expected at least one layer"]),
        ({"adapter.target_modules": "'*('"}, ["adapter.target_modules: expected a regular expr"]),
        (
            {"adapter.exclude_modules": "all-linear"},
            ["adapter.exclude_modules: expected to leave some target layer"],
        ),
        ({"adapter.rank_pattern": "{q_prj: 1}"}, ["rank_pattern", "'q_prj' matches no adapted"]),
        (
            {"adapter.rank": 9},
            ["adapter.rank: expected at most 8 for model.layers.0.self_attn.k_proj", "got 9"],
        ),
        ({"data.response_column": "anser"}, ["row 1: expected a column 'anser'", "'answer'?"]),
        (
            {"data.prompt_column": "ask", "data.template": "plain"},
            ["row 1: expected a column 'ask', got the columns question, answer"],
        ),
        ({"data.max_length": 4}, ["expected prompts shorter than max_length = 4 tokens, got none"]),
        ({"data.train": "nowhere.jsonl"}, ["nowhere.jsonl: expected a data file, found none"]),
        (
            {"data.validation": "no.jsonl", "eval.task": "exact_match"},
            ["no.jsonl: expected a data"],
        ),
        ({"data.template": "alpca"}, ["template: expected alpaca", "Did you mean 'alpaca'?"]),
        (
            {"mesh.data": 1000},
            ["mesh: expected data x fsdp x tensor to be the", "got 1000 x 1 x 1"],
        ),
        ({"mesh.data": 0}, ["mesh: expected positive sizes with at most one -1, got data=0"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_config_value(place, overrides, phrases):
    place.refused(*phrases, overrides=overrides)


@pytest.mark.parametrize(
    ("override", "phrase"),
    [
        ("training.max_steps", "--set: expected key.path=value, got 'training.max_steps'"),
        ("=3", "--set: expected key.path=value, got '=3'"),
        ("training.seed=[1", "--set training.seed: expected a YAML value, got '[1'"),
        ("model.name_or_path.x=1", "'name_or_path' is not a section"),
    ],
)
def test_a_set_option(place, override, phrase):
    arguments = ["train", place.config(), "--workdir", place.workdir, "--set", override]
    place.refused(phrase, arguments=arguments)


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("model: [1", "expected YAML, got: while parsing a flow sequence"),
        ("a: b: c", "expected YAML, got: mapping values are not allowed here"),
        ("just text", "expected sections such as 'model:', got 'just text'"),
        ("", "expected sections such as 'model:', got None"),
        ("model:\n  name_or_path: x\n", "data: expected a value, got none"),
        ("model: here\n", "model: expected"),
    ],
)
def test_a_config_file_that_is_no_config(place, text, phrase):
    file = place.folder / "broken.yaml"
    file.write_text(text)
    place.refused(f"{file}: {phrase}", config=file)


def test_no_config_file(place):
    file = place.folder / "no.yaml"
    place.refused(f"{file}: expected a config file, found none", config=file)


def test_a_config_that_is_no_text(place):
    file = place.folder / "binary.yaml"
    file.write_bytes(b"\xff\xfe\x00model")
    place.refused(f"{file}: expected YAML, got:", config=file)


# The model.


def test_no_model_folder(place):
    missing = place.folder / "nowhere"
    place.refused(
        f"{missing}: expected a checkpoint folder, got nothing",
        overrides={"model.name_or_path": missing},
    )


def test_a_model_folder_without_config(place):
    empty = place.folder / "empty"
    empty.mkdir()
    place.refused(
        f"{empty}: expected config.json, got none", overrides={"model.name_or_path": empty}
    )


@pytest.mark.parametrize("kept", [5, 100, -3])
def test_truncated_weights(place, kept):
    model = place.model()
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    place.refused(
        f"{file}: expected a complete safetensors file", overrides={"model.name_or_path": model}
    )


def test_weights_that_do_not_fit_are_reported_together(place):
    tensors = random_weights()
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.k_proj.weight"] = np.zeros((16, 16), np.float32)
    tensors["lm_head.weight"] = np.zeros((47, 16), np.float32)
    tensors["model.layers.0.self_attn.extra.weight"] = np.zeros((1,), np.float32)
    model = place.model(tensors=tensors)
    place.refused(
        "2 missing",
        "model.layers.1.mlp.up_proj.weight",
        "model.norm.weight",
        "1 unexpected (model.layers.0.self_attn.extra.weight)",
        "2 misshaped",
        "model.layers.0.self_attn.k_proj.weight is [16, 16], expected [8, 16]",
        "lm_head.weight is [47, 16], expected [48, 16]",
        overrides={"model.name_or_path": model},
    )


def test_weights_of_whole_numbers(place):
    tensors = random_weights()
    tensors["model.norm.weight"] = np.ones(16, np.int32)
    place.refused(
        "model.norm.weight is I32", overrides={"model.name_or_path": place.model(tensors=tensors)}
    )


def test_only_pickled_weights(place):
    model = place.model()
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    place.refused(
        "expected model.safetensors",
        "got only pytorch_model.bin",
        "safe_serialization=True",
        overrides={"model.name_or_path": model},
    )


@pytest.mark.parametrize("target", ["../secret.safetensors", "/etc/hostname"])
def test_an_index_that_points_outside(place, target):
    model = place.model()
    (model / "model.safetensors").rename(place.folder / "secret.safetensors")
    index = {"weight_map": {name: target for name in random_weights()}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    place.refused(
        f"expected files of its own folder, got {target!r}",
        "points outside",
        overrides={"model.name_or_path": model},
    )


def test_an_index_without_its_shard(place):
    model = place.model()
    (model / "model.safetensors").unlink()
    index = {"weight_map": {name: "a.safetensors" for name in random_weights()}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    place.refused("1 missing (a.safetensors)", overrides={"model.name_or_path": model})


@pytest.mark.parametrize(
    ("keys", "phrases"),
    [
        (
            {"model_type": "mamba"},
            ["config.json: expected model_type to be one of llama, mistral", "got 'mamba'"],
        ),
        ({"hidden_size": None}, ["config.json: expected the key 'hidden_size', got none"]),
        ({"hidden_act": "swoosh"}, ["expected hidden_act to be one of", "got 'swoosh'"]),
        ({"max_position_embeddings": 8}, ["data.max_length: expected at most 8"]),
        ({"vocab_size": 12}, ["expected token ids below vocab_size 12"]),
        ({"rope_scaling": {"rope_type": "spiral"}}, ["expected the rope type to be one of"]),
    ],
)
def test_a_model_config(place, keys, phrases):
    place.refused(*phrases, overrides={"model.name_or_path": place.model(**keys)})


def test_a_model_config_that_is_no_json(place):
    model = place.model()
    (model / "config.json").write_text('{"model_type": ')
    place.refused("config.json: expected JSON", overrides={"model.name_or_path": model})


def test_no_tokenizer(place):
    model = place.model()
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    place.refused(f"{model}: expected a tokenizer", overrides={"model.name_or_path": model})


# The data.


def test_an_empty_data_set(place):
    empty = write_rows(place.folder / "empty.jsonl", [])
    place.refused(
        f"{empty}: expected at least one row, got an empty data set",
        overrides={"data.train": empty},
    )


def test_a_later_row_without_the_column(place):
    rows = [*sums(3, 0), {"question": "1+1", "reply": "2"}]
    file = write_rows(place.folder / "rows.jsonl", rows)
    place.refused("row 4: expected", "'answer'", overrides={"data.train": file})


def test_broken_json_names_the_line(place):
    file = write_rows(place.folder / "rows.jsonl", sums(2, 0))
    file.write_text(file.read_text() + '{"question": \n')
    place.refused("broken JSON", "in line 3", overrides={"data.train": file})


@pytest.mark.parametrize(
    ("row", "phrase"),
    [({"question": "1+1", "reply": "2"}, "'answer'"), ({"ask": "1", "answer": "2"}, "'question'")],
)
def test_a_validation_row_without_the_column(place, row, phrase):
    file = write_rows(place.folder / "rows.jsonl", [row])
    place.refused(phrase, overrides={"data.validation": file, "eval.task": "exact_match"})


# The folder of the run.


def test_a_workdir_that_holds_a_run(place, finished):
    shutil.copytree(finished.workdir, place.workdir)
    place.refused(f"--workdir {place.workdir}", "one that holds a run", "--resume")


def test_a_workdir_that_is_a_file(place):
    place.workdir.write_text("")
    place.refused(f"--workdir {place.workdir}: expected a folder, got a file")


def test_a_workdir_below_a_file(place):
    (place.folder / "file").write_text("")
    workdir = place.folder / "file" / "run"
    place.refused(f"--workdir {workdir}", "Not a directory", workdir=workdir)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_a_workdir_that_cannot_be_written(place):
    place.refused("--workdir /proc/balora", "that can be written", workdir="/proc/balora")


def resumed(place, finished, **overrides):
    if not place.workdir.exists():
        shutil.copytree(finished.workdir, place.workdir)
    return [
        "train", finished.config, "--workdir", place.workdir, "--resume", *settings(overrides)
    ]  # fmt: skip


def test_resume_on_another_base(place, finished):
    other = place.model(seed=7)
    arguments = resumed(place, finished, **{"model.name_or_path": other})
    place.refused("--resume: expected the base model this run began with", arguments=arguments)


def test_resume_on_a_base_with_another_config(place, finished):
    other = place.model(rope_theta=500.0)
    arguments = resumed(place, finished, **{"model.name_or_path": other})
    place.refused("--resume: expected the base model this run began with", arguments=arguments)


@pytest.mark.parametrize(
    ("key", "value", "phrase"),
    [
        ("adapter.rank", 3, "expected adapter.rank to stay 2, got 3"),
        ("adapter.start", "lora", "expected adapter.start to stay 'pissa', got 'lora'"),
        ("regularizers.spectral", 0.5, "expected regularizers.spectral to stay 0.05, got 0.5"),
        ("training.learning_rate", 0.5, "training.learning_rate to stay 0.05, got 0.5"),
        ("training.seed", 1, "expected training.seed to stay 42, got 1"),
        ("training.max_steps", 8, "expected training.max_steps to stay 4, got 8"),
        ("training.max_steps", 3, "expected training.max_steps to stay 4, got 3"),
        ("training.batch_size", 16, "expected training.batch_size to stay 8, got 16"),
        ("data.packing", "true", "expected data.packing to stay False, got True"),
    ],
)
def test_resume_with_another_config(place, finished, key, value, phrase):
    place.refused(phrase, arguments=resumed(place, finished, **{key: value}))


def test_resume_with_other_rows_in_the_same_file(tmp_path):
    inputs = write_inputs(tmp_path / "inputs")
    config = write_config(tmp_path / "c.yaml", inputs, training={"stop_at": 2})
    workdir = tmp_path / "run"
    assert invoke("train", config, "--workdir", workdir).code == 0
    write_rows(inputs / "train.jsonl", sums(24, seed=9))
    before = tree_digest(tmp_path)
    code, _, err = invoke("train", config, "--workdir", workdir, "--resume")
    assert code == 2
    assert "data position: expected examples" in err.splitlines()[-1]
    assert tree_digest(tmp_path) == before


# The other commands.


@pytest.mark.parametrize("format", ["peft", "merged"])
def test_export_without_an_adapter(place, format):
    out = place.folder / "new"
    arguments = [
        "export", place.config(), "--workdir", place.workdir, "--format", format, "--out", out
    ]  # fmt: skip
    place.refused("expected the folder of a finished run with adapter/ in it", arguments=arguments)


@pytest.mark.parametrize(
    ("more", "phrase"),
    [
        (["--rank", "0"], "rank: expected at least 1, got 0"),
        (["--rank", "1", "--format", "merged"], "--rank: expected --format peft, got merged"),
    ],
)
def test_export_with_a_bad_rank(place, finished, more, phrase):
    arguments = ["export", finished.config, "--workdir", finished.workdir]
    place.refused(phrase, arguments=[*arguments, "--out", place.folder / "new", *more])


@pytest.mark.parametrize("format", ["peft", "merged"])
def test_export_over_something_else(place, finished, format):
    (place.folder / "full").mkdir()
    (place.folder / "full" / "thesis.txt").write_text("mine")
    arguments = [
        "export", finished.config, "--workdir", finished.workdir, "--format", format,
        "--out", place.folder / "full",
    ]  # fmt: skip
    place.refused("expected a new or empty folder, got one with other files", arguments=arguments)


@pytest.mark.parametrize("command", ["eval", "generate", "export"])
@pytest.mark.parametrize("target", ["file/x.json", "missing/x.json"])
def test_figures_that_cannot_be_written(place, finished, command, target):
    (place.folder / "file").write_text("")
    figures = place.folder / target
    arguments = {
        "eval": [],
        "generate": ["--prompt", "1+1"],
        "export": ["--workdir", finished.workdir, "--out", place.folder / "new"],
    }[command]
    place.refused(
        f"--json {figures}: expected a file that can be written",
        arguments=[command, finished.config, *arguments, "--json", figures],
    )


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_no_adapter_there(place, command):
    more = ["--prompt", "1+1"] if command == "generate" else []
    config = place.config(eval={"task": "exact_match"})
    arguments = [command, config, "--adapter", place.folder / "no", *more]
    place.refused(
        "expected a PEFT adapter folder with adapter_config.json, got none", arguments=arguments
    )


def test_eval_without_a_task(place):
    """The rows are there, so the sentence must not ask for them."""
    place.refused("eval.task: expected", "got 'none'", arguments=["eval", place.config()])


def test_eval_without_rows(place):
    place.refused(
        "data.validation: expected rows to score, got none",
        arguments=["eval", place.config(eval={"task": "exact_match"})],
        overrides={"data.validation": "null"},
    )


def test_a_process_of_its_own_says_one_line(place, process_environment):
    """The command as a person runs it: what libraries say while they load must not be there."""
    arguments = ["--workdir", place.workdir, "--set", "data.response_column=anser"]
    found = subprocess.run(
        [sys.executable, ROOT / "train.py", place.config(), *arguments],
        env=process_environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 2
    assert found.stdout == ""
    assert len(found.stderr.splitlines()) == 1, found.stderr
    assert found.stderr.startswith("balora: row 1: expected a column 'anser'")
    assert not place.workdir.exists()
