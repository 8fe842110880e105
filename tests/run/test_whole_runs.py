"""Runs that train embeddings, a head and norms beside adapters, and what other tools make of them."""

import json
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from balora_jax.pretrained.load import load_pretrained
from tests.run.conftest import invoke, settings
from tests.tiny_run import (
    FEW,
    LAYERS,
    LINEAR,
    VOCAB_SIZE,
    WIDTH,
    adapter_bytes,
    metrics_of,
    random_weights,
    write_config,
    write_model,
)

pytestmark = [
    pytest.mark.usefixtures("no_curves"),
    pytest.mark.filterwarnings("ignore"),
]

SAVED = ["embed_tokens", "lm_head", "norm"]
RANK = 2
IDS = np.random.default_rng(1).integers(3, 40, (2, 9))
TRAINING = {"learning_rate": 0.02, "max_steps": 4, "checkpoint_every": 2, "weight_decay": 0.0}


def train(config, workdir, *more, **overrides):
    outcome = invoke("train", config, "--workdir", workdir, *more, *settings(overrides))
    assert outcome.code == 0, outcome.err
    return outcome


def torch_logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(IDS)).logits.float().numpy()


def close(got, want):
    assert np.abs(np.asarray(got) - want).max() <= 1e-4 * (want.max() - want.min())


def config_of(folder, inputs, tied, **adapter):
    tensors = random_weights()
    if tied:
        del tensors["lm_head.weight"]
    model = write_model(folder / "model", tensors=tensors, tie_word_embeddings=tied)
    return model, write_config(
        folder / "config.yaml", inputs, model={"name_or_path": str(model)},
        adapter={**FEW, **adapter}, training=TRAINING,
    )  # fmt: skip


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_modules_to_save_from_start_to_servers(tmp_path, inputs, tied):
    model, config = config_of(tmp_path, inputs, tied, modules_to_save=SAVED)
    run = tmp_path / "run"
    train(config, run)
    rows = metrics_of(run)
    # The teacher is the base, its own tables included.
    assert abs(rows[0]["consistency"]) < 1e-6
    assert rows[-1]["consistency"] > 1e-4
    summary = json.loads((run / "summary.json").read_text())
    tables, norms = 2 * VOCAB_SIZE * WIDTH, 5 * WIDTH
    layers = LAYERS * RANK * sum(sum(LINEAR[f"{n}"]) for n in ("self_attn.q_proj", "mlp.down_proj"))
    assert summary["trainable_parameters"] == layers + tables + norms

    config = config_of(tmp_path, inputs, tied, modules_to_save=SAVED)[1]
    if not tied:
        check_other_ways(config, tmp_path, run)

    # PEFT, ours and a merged checkpoint compute the same.
    ours = np.asarray(load_pretrained(str(model), adapter=str(run / "adapter"))(IDS))
    base = AutoModelForCausalLM.from_pretrained(model)
    before = torch_logits(base)
    close(ours, torch_logits(PeftModel.from_pretrained(base, run / "adapter")))
    assert np.abs(ours - before).max() > 0.01 * (before.max() - before.min())
    written = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert written["modules_to_save"] == SAVED
    export = ["export", config, "--workdir", run, "--format", "merged", "--out"]
    found = invoke(*export, tmp_path / "merged")
    assert found.code == 0, found.err
    assert not json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]
    close(ours, torch_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")))
    close(np.asarray(load_pretrained(str(tmp_path / "merged"))(IDS)), ours)

    if tied:
        return
    # A run that goes on from the adapter begins where it ended, and measures from the base.
    again = tmp_path / "again"
    train(config, again, **{"adapter.start": run / "adapter", "adapter.modules_to_save": "[]"})
    assert metrics_of(again)[0]["consistency"] > 1e-4
    assert json.loads((again / "adapter" / "adapter_config.json").read_text())[
        "modules_to_save"
    ] == SAVED  # fmt: skip


def check_other_ways(config, folder, run):
    """The plain head, and two halves, are the same run."""
    train(config, folder / "plain", **{"training.head": "plain"})
    for one, other in zip(metrics_of(run), metrics_of(folder / "plain"), strict=True):
        for name in ("loss", "consistency", "diversity", "spectral", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=2e-5, abs=2e-6), name
    train(config, folder / "half", **{"training.stop_at": 2})
    train(config, folder / "half", "--resume")
    assert adapter_bytes(folder / "half") == adapter_bytes(run)
    assert metrics_of(folder / "half") == metrics_of(run)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_rows_of_tokens_from_start_to_servers(tmp_path, inputs, tied):
    model, config = config_of(tmp_path, inputs, tied, trainable_token_indices=[3, 4, 12])
    run = tmp_path / "run"
    train(config, run)
    ours = np.asarray(load_pretrained(str(model), adapter=str(run / "adapter"))(IDS))
    base = AutoModelForCausalLM.from_pretrained(model)
    close(ours, torch_logits(PeftModel.from_pretrained(base, run / "adapter")))
    for kind in ("merged", "peft"):
        out = tmp_path / kind
        found = invoke("export", config, "--workdir", run, "--format", kind, "--out", out)
        assert found.code == 0, found.err
    found = invoke("export", config, "--workdir", run, "--format", "gguf", "--out", tmp_path / "g")
    assert found.code == 2
    assert "expected an adapter of linear layers alone, got " in found.err
    assert not (tmp_path / "g").exists()
    close(ours, torch_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")))
    again = np.asarray(load_pretrained(str(model), adapter=str(tmp_path / "peft"))(IDS))
    close(again, ours)
    table = random_weights()["model.embed_tokens.weight"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    moved = np.any(merged.get_input_embeddings().weight.detach().numpy() != table, axis=1)
    assert np.flatnonzero(moved).tolist() == [3, 4, 12]


@pytest.mark.parametrize(
    ("overrides", "phrases"),
    [
        ({"modules_to_save": "[embed_token]"}, ["got 'embed_token'", "embed_tokens"]),
        ({"modules_to_save": "[down_proj]"}, ["got the linear layer model.layers.0.mlp.down_proj"]),
        ({"modules_to_save": "[layers.0.input_layernorm]"}, ["of some layers only"]),
        ({"trainable_token_indices": "[3, 3]"}, ["different ids from 0 to 47"]),
        ({"trainable_token_indices": "[48]"}, ["different ids from 0 to 47"]),
        (
            {"trainable_token_indices": "[3]", "modules_to_save": "[embed_tokens]"},
            ["expected none where adapter.modules_to_save names the embeddings"],
        ),
        ({"method": "full", "modules_to_save": "[norm]"}, ["every weight trains"]),
    ],
)
def test_what_cannot_train_whole(place, overrides, phrases):
    place.refused(*phrases, overrides={f"adapter.{k}": v for k, v in overrides.items()})


def test_a_nuclear_norm_of_a_head_that_trains_wants_the_plain_head(place):
    place.refused(
        "or the head trains, got nuclear",
        overrides={"adapter.modules_to_save": "[lm_head]", "regularizers.norm": "nuclear"},
    )


def test_a_full_fine_tuning_trains_the_head_and_keeps_the_teacher(tmp_path, inputs):
    """Its head had no gradient, and the teacher's was the student's."""
    shutil.rmtree(tmp_path / "model", ignore_errors=True)
    _, config = config_of(tmp_path, inputs, False, method="full", target_modules=["q_proj"])
    runs = {}
    for head in ("plain", "fused"):
        train(config, tmp_path / head, **{"training.head": head})
        runs[head] = metrics_of(tmp_path / head)
    for one, other in zip(*runs.values(), strict=True):
        for name in ("loss", "consistency", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=2e-5, abs=2e-6), name
    new = load_file(tmp_path / "fused" / "model" / "model.safetensors")["lm_head.weight"]
    assert np.abs(new - random_weights()["lm_head.weight"]).max() > 0.01
