"""Bad inputs: one sentence, exit code 2, nothing written."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.tiny_run import (
    random_weights,
    sums,
    write_rows,
)

ROOT = Path(__file__).parents[2]


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
        ({"adapter.start": "pissa_niter_1000"}, ["adapter.start: expected", "'pissa_niter_1000'"]),
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
            [
                "mesh: expected data x fsdp x expert x sequence x tensor to be the",
                "got 1000 x 1 x 1 x 1 x 1",
            ],
        ),
        (
            {"training.trackers": "[toy, toy]"},
            ["trackers: expected each name once, got ['toy', 'to"],
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
        (
            "training.seed=[1",
            "--set training.seed: expected a YAML value, got: while parsing a flow sequence",
        ),
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


def test_only_weights_under_another_name(place):
    model = place.model()
    (model / "model.safetensors").rename(model / "pytorch_model.pt")
    place.refused(
        "expected model.safetensors, pytorch_model.bin or the index of either",
        "got only pytorch_model.pt",
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
            ["config.json: expected model_type to be one of gemma, gemma2", "got 'mamba'"],
        ),
        ({"hidden_size": None}, ["config.json: expected the key 'hidden_size', got none"]),
        ({"hidden_act": "swoosh"}, ["expected hidden_act to be one of", "got 'swoosh'"]),
        ({"max_position_embeddings": 8}, ["data.max_length: expected at most 8"]),
        ({"vocab_size": 12}, ["expected input_ids below vocab_size 12"]),
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
