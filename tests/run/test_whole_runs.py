"""Runs that train embeddings, a head and norms beside adapters, and what other tools make of them."""

import json
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from balora_jax.pretrained.load import load_pretrained
from tests.run import workers
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


def test_a_start_with_tables_that_nothing_names(tmp_path, inputs):
    """As PEFT saves them with ``save_embedding_layers=True``: the base's own, or refused."""
    base = AutoModelForCausalLM.from_pretrained(inputs / "model")
    adapter, file = tmp_path / "start", tmp_path / "start" / "adapter_model.safetensors"
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(adapter, save_embedding_layers=True)
    tensors = load_file(file)
    key = "base_model.model.model.embed_tokens.weight"
    config = write_config(
        tmp_path / "config.yaml", inputs, adapter={"start": str(adapter)}, training=TRAINING
    )
    train(config, tmp_path / "equal", **{"training.max_steps": 1})
    save_file({**tensors, key: tensors[key] + 1}, file)
    outcome = invoke("train", config, "--workdir", tmp_path / "other")
    assert outcome.code == 2
    assert "expected model.embed_tokens.weight to be the base's" in outcome.err
    assert "(adapter.modules_to_save: [embed_tokens])" in outcome.err
    assert not (tmp_path / "other").exists()
    train(
        config, tmp_path / "named",
        **{"training.max_steps": 1, "adapter.modules_to_save": "[embed_tokens]"},
    )  # fmt: skip
    found = load_file(tmp_path / "named" / "adapter" / "adapter_model.safetensors")[key]
    assert np.abs(found - tensors[key] - 1).max() < 0.1


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


ONE = {"data": 1, "fsdp": 1, "tensor": 1}
WIDE = ["fsdp", "sequence"]
# Whether the base ties; what trains whole; the mesh of four devices.
ON_MESHES = {
    "untied": (False, {"modules_to_save": SAVED}, {**ONE, "fsdp": 2, "tensor": 2}),
    "tied": (True, {"modules_to_save": SAVED}, {**ONE, "data": 2, "tensor": 2}),
    "tokens": (True, {"trainable_token_indices": [3, 4, 12]}, {**ONE, "fsdp": 2, "tensor": 2}),
}


@pytest.fixture(scope="module")
def on_meshes(tmp_path_factory, inputs, cache_folder):
    """Three steps of each on one device and on four."""
    folder = tmp_path_factory.mktemp("whole on meshes")
    commands = {1: [], 4: []}
    for name, (tied, adapter, mesh) in ON_MESHES.items():
        (folder / name).mkdir()
        config = config_of(folder / name, inputs, tied, **adapter)[1]
        for devices, sizes in ((1, ONE), (4, mesh)):
            axes = {f"mesh.{axis}": size for axis, size in sizes.items()}
            run = ["train", config, "--workdir", str(folder / name / str(devices))]
            run += settings({**axes, "training.max_steps": 3, "training.checkpoint_every": 0})
            commands[devices].append((run, str(folder / name / f"{devices}.json")))
    logs = {devices: folder / f"{devices}.log" for devices in commands}
    processes = [
        workers.start(workers.commands, wanted, str(logs[devices]), str(cache_folder), devices)
        for devices, wanted in commands.items()
    ]
    for process, log in zip(processes, logs.values(), strict=True):
        process.join()
        assert process.exitcode == 0, log.read_text()
    return folder


@pytest.mark.parametrize("name", ON_MESHES)
def test_a_mesh_trains_the_same_tables(on_meshes, name):
    one, four = (on_meshes / name / devices for devices in "14")
    assert json.loads((on_meshes / name / "4.json").read_text())["code"] == 0
    rows = metrics_of(one), metrics_of(four)
    assert [row["step"] for row in rows[1]] == [1, 2, 3]
    assert rows[0][-1]["consistency"] > 1e-4
    for kind in ("loss", "task_loss", "consistency", "diversity", "spectral", "grad_norm"):
        want, got = ([row[kind] for row in each] for each in rows)
        rtol = 1e-5 if kind == "loss" else 1e-4
        np.testing.assert_allclose(got, want, rtol=rtol, atol=2e-6, err_msg=kind)
    want, got = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, four))
    assert got.keys() == want.keys()
    assert sum("lora_" not in key for key in want) == (
        1 if name == "tokens" else 2 + 1 + 2 * LAYERS
    )
    for key, value in want.items():
        assert np.abs(got[key] - value).max() < 2e-4 * np.abs(value).max(), key
        before = random_weights().get(key.removeprefix("base_model.model."))
        assert before is None or np.abs(value - before).max() > 0.01, key


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_tables_that_train_are_split_as_frozen_ones(on_meshes, name):
    layouts = json.loads((on_meshes / name / "4.json").read_text())["layouts"]
    mesh = ON_MESHES[name][2]
    part = [VOCAB_SIZE // mesh["tensor"], WIDTH // mesh["fsdp"]]
    for table in ("embed_tokens.embedding", "lm_head.embedding"):
        found = {
            path: leaf
            for group in ("adapters", "opt_state")
            for path, leaf in layouts[group].items()
            if f"['{table}']" in path
        }
        assert len(found) == 3  # and its two moments
        for path, leaf in found.items():
            assert (leaf["axes"], leaf["local"]) == (["tensor", WIDE], part), path
