"""Tied heads as files hold them: once under either name, twice and equal, twice and not equal."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_model
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from balora_jax import load_pretrained
from balora_jax.errors import InputError
from balora_jax.pretrained import tied
from balora_jax.pretrained.checkpoint import open_base
from balora_jax.pretrained.export import write_model
from tests import tiny_run
from tests.io.torch_side import adapted, close, exported, logits, shaken

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
SMALL = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
         "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
FAMILIES = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), "model.embed_tokens.weight"),
    "gemma": (lambda: GemmaForCausalLM(GemmaConfig(**SIZES)), "model.embed_tokens.weight"),
    "qwen2": (lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)), "model.embed_tokens.weight"),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(**SMALL)), "transformer.wte.weight"),
}
HEAD = "lm_head.weight"
IDS = np.random.default_rng(0).integers(3, tiny_run.VOCAB_SIZE, (2, 12))
SAID = "is not its embeddings, as tie_word_embeddings in config.json says; the stored head is used"


def check(folder, want=None):
    got = np.asarray(load_pretrained(str(folder))(IDS))
    close(got, logits(folder, IDS) if want is None else want)
    return got


@pytest.fixture(params=FAMILIES)
def base(request, tmp_path):
    """A folder with one table, the name of that table, and the tensors by name."""
    make, name = FAMILIES[request.param]
    shaken(make).save_pretrained(tmp_path / "base")
    state = load_file(tmp_path / "base" / "model.safetensors")
    assert HEAD not in state
    return tmp_path / "base", name, state


def variant(base, name, state, **config):
    folder = base.parent / name
    folder.mkdir()
    found = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**found, **config}))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_heads_of_every_file_are_those_of_transformers(base, capsys):
    folder, table, state = base
    alone = check(folder)
    noise = 0.2 * np.random.default_rng(1).standard_normal(state[table].shape, np.float32)
    equal = variant(folder, "equal", {**state, HEAD: state[table]})
    np.testing.assert_array_equal(check(equal), alone)
    only = variant(folder, "only", {HEAD if n == table else n: v for n, v in state.items()})
    np.testing.assert_array_equal(check(only), alone)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.save_pretrained(folder.parent / "saved")
    save_model(model, str(folder.parent / "saved" / "model.safetensors"), {"format": "pt"})
    np.testing.assert_array_equal(check(folder.parent / "saved"), alone)
    assert SAID not in capsys.readouterr().err
    other = variant(folder, "other", {**state, HEAD: state[table] + noise})
    got = check(other)
    assert np.abs(got - alone).max() > 0.1 * np.ptp(alone)
    assert f"{other}: its {HEAD} {SAID}\n" in capsys.readouterr().err
    # Names of the bare model, of which the head is no part.
    bare = {n.partition(".")[2] if n != HEAD else n: v for n, v in state.items()}
    check(variant(folder, "bare", {**bare, HEAD: state[table] + noise}), got)
    # As torch saves: both names, one storage.
    torch_folder = folder.parent / "torch"
    torch_folder.mkdir()
    shutil.copy(folder / "config.json", torch_folder)
    torch.save(model.state_dict(), torch_folder / "pytorch_model.bin")
    np.testing.assert_array_equal(check(torch_folder), alone)


def test_the_last_row_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(tied, "_ROWS", 7)
    weights = tiny_run.random_weights()
    table = weights["model.embed_tokens.weight"]
    for row in (0, 6, 7, len(table) - 1):
        head = table.copy()
        head[row, -1] += 1
        folder = tiny_run.write_model(
            tmp_path / str(row), tensors={**weights, HEAD: head}, tie_word_embeddings=True
        )
        base = open_base(str(folder))
        assert base.untied
        assert not base.config.tie_word_embeddings
    assert not open_base(str(folder), weights=False).untied


def test_a_head_of_another_size_is_named(tmp_path):
    weights = tiny_run.random_weights()
    weights[HEAD] = np.zeros((3, 4), np.float32)
    folder = tiny_run.write_model(tmp_path, tensors=weights, tie_word_embeddings=True)
    with pytest.raises(InputError, match=r"misshaped \(lm_head\.weight is \[3, 4\], expected"):
        load_pretrained(str(folder))


@pytest.fixture
def untied(tmp_path):
    """The inputs of a run whose base has a config that ties, and a head of its own."""
    inputs = tiny_run.write_inputs(tmp_path)
    model = inputs / "model"
    weights = load_file(model / "model.safetensors")
    weights[HEAD] = weights["model.embed_tokens.weight"][::-1].copy()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    found = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**found, "tie_word_embeddings": True}))
    return inputs


def test_a_merged_model_is_not_tied_either(untied, tmp_path):
    want = adapted(untied / "model", tmp_path / "run", IDS)
    adapter = str(tmp_path / "run" / "adapter")
    close(load_pretrained(str(untied / "model"), adapter=adapter)(IDS), want)
    exported(untied / "model", tmp_path / "run", tmp_path / "merged", "merged")
    raw = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert raw["tie_word_embeddings"] is False
    check(tmp_path / "merged", want)
    close(logits(tmp_path / "merged", IDS), want)


def test_a_fully_tuned_model_is_not_tied_either(untied, tmp_path):
    base = open_base(str(untied / "model"))
    write_model(tmp_path / "full", base, {"norm.scale": np.full(16, 2.0)}, dtype="float32")
    raw = json.loads((tmp_path / "full" / "config.json").read_text())
    assert raw["tie_word_embeddings"] is False
    before, after = (load_file(f / "model.safetensors") for f in (base.folder, tmp_path / "full"))
    assert {n for n in before if not np.array_equal(before[n], after[n])} == {"model.norm.weight"}
    check(tmp_path / "full")
