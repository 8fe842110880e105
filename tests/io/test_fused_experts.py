"""Experts of a layer in one tensor, as transformers 5 saves them on demand."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from balora_jax import load_pretrained
from balora_jax.errors import InputError
from balora_jax.io import hf_weights
from balora_jax.models.structure import structure
from balora_jax.pretrained.checkpoint import open_base
from tests import tiny_run
from tests.io.torch_side import adapted, close, exported, logits, shaken

IDS = np.random.default_rng(0).integers(3, tiny_run.VOCAB_SIZE, (2, 9))
SIZES = {
    "vocab_size": tiny_run.VOCAB_SIZE, "hidden_size": 24, "intermediate_size": 36,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_local_experts": 5, "num_experts_per_tok": 2, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same weights by expert, and fused."""
    folder = tmp_path_factory.mktemp("experts")
    model = shaken(lambda: MixtralForCausalLM(MixtralConfig(**SIZES)))
    model.save_pretrained(folder / "apart")
    model.save_pretrained(folder / "fused", save_original_format=False)
    names = set(load_file(folder / "fused" / "model.safetensors"))
    assert "model.layers.1.mlp.experts.gate_up_proj" in names
    assert not any("block_sparse_moe" in name for name in names)
    return folder


def arrays(folder):
    base = open_base(str(folder))
    return base.load(structure(base.config).frozen)


@pytest.mark.parametrize("piece", [None, 3 * 24 * 4])
def test_they_are_read_as_those_that_lie_apart(folders, monkeypatch, piece):
    if piece:
        monkeypatch.setattr(hf_weights, "_PIECE_BYTES", piece)
        monkeypatch.setattr(hf_weights, "_SMALLEST_PIECE_BYTES", piece)
    apart, fused = arrays(folders / "apart"), arrays(folders / "fused")
    assert set(apart) == set(fused)
    for path, value in apart.items():
        np.testing.assert_array_equal(fused[path], value, path)


def test_logits_are_those_of_transformers(folders):
    close(load_pretrained(str(folders / "fused"))(IDS), logits(folders / "fused", IDS))


def test_torch_files_and_names_of_the_bare_model(folders, tmp_path):
    state = load_file(folders / "fused" / "model.safetensors")
    shutil.copy(folders / "fused" / "config.json", tmp_path)
    bare = {n.removeprefix("model."): torch.tensor(v) for n, v in state.items()}
    torch.save(bare, tmp_path / "pytorch_model.bin")
    apart, fused = arrays(folders / "apart"), arrays(tmp_path)
    for path, value in apart.items():
        np.testing.assert_array_equal(fused[path], value, path)


def test_a_merged_model_has_them_apart(folders, tmp_path):
    want = adapted(folders / "fused", tmp_path / "run", IDS)
    exported(folders / "fused", tmp_path / "run", tmp_path / "merged", "merged")
    apart = load_file(folders / "apart" / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert set(merged) == set(apart)
    changed = {name for name in apart if not np.array_equal(apart[name], merged[name])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
    close(logits(tmp_path / "merged", IDS), want)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda v: v[:4], r"3 missing \(model\.layers\.0\.block_sparse_moe\.experts\.4\.w1"),
        (lambda v: v[:, :-2], "10 misshaped"),
        (lambda v: v[:, :-1], r"1 unexpected \(model\.layers\.0\.mlp\.experts\.gate_up_proj\)"),
        (lambda v: v[0], r"1 unexpected \(model\.layers\.0\.mlp\.experts\.gate_up_proj\)"),
    ],
)
def test_fused_experts_that_do_not_fit(folders, tmp_path, change, reason):
    state = load_file(folders / "fused" / "model.safetensors")
    for name in ("gate_up_proj", "down_proj")[: 2 if "3 missing" in reason else 1]:
        key = f"model.layers.0.mlp.experts.{name}"
        state[key] = np.ascontiguousarray(change(state[key]))
    save_file(state, tmp_path / "model.safetensors")
    shutil.copy(folders / "fused" / "config.json", tmp_path)
    with pytest.raises(InputError, match=reason):
        arrays(tmp_path)
