"""Embeddings, heads and norms that PEFT trained whole (`modules_to_save`), and rows of tokens."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file

from balora_jax.errors import InputError
from balora_jax.io.peft_reader import read_peft
from balora_jax.pretrained.load import load_pretrained
from tests.io import peft_table
from tests.io.torch_side import close, exported, logits, moved
from tests.models import tiny

IDS = np.random.default_rng(1).integers(0, 40, (2, 7))
SMALL = {"hidden_size": 16, "num_attention_heads": 4, "head_dim": 4, "num_hidden_layers": 2}


def made(folder, tied, **options):
    """A Llama, an adapter that PEFT trained on it, and what the two compute."""
    torch.manual_seed(0)
    model = tiny.llama(vocab_size=40, tie_word_embeddings=tied, **SMALL)
    model.save_pretrained(folder / "base")
    config = LoraConfig(
        r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options
    )
    adapted = moved(get_peft_model(model, config))
    adapted.save_pretrained(folder / "adapter")
    return logits(adapted, IDS)


def same(one, other):
    """The arrays of two adapters as we read them."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(other[name], value, name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", peft_table.CASES)
def test_an_adapter_of_peft_is_read_and_leaves_as_it_came(tmp_path, case):
    row, base, adapter = peft_table.ROWS[case], tmp_path / "base", tmp_path / "run" / "adapter"
    model, before = peft_table.make(row, tmp_path)
    ids = peft_table.ids(model)
    want = logits(model, ids)
    ours = load_pretrained(str(base), adapter=str(adapter))
    close(ours(ids), want)
    assert ours.config.vocab_size == model.config.vocab_size
    assert np.abs(before(ids) - want).max() > 0.05 * np.ptp(want)

    again = exported(base, tmp_path / "run", tmp_path / "peft", "peft")
    close(logits(peft_table.theirs(row, base, again), ids), want)
    first, second = read_peft(adapter), read_peft(again)
    same(first.saved, second.saved)
    for side in (0, 1):
        same(*({n: pair[side] for n, pair in p.tensors.items()} for p in (first, second)))
    assert first.scales == second.scales
    assert first.modules_to_save == second.modules_to_save

    merged = exported(base, tmp_path / "run", tmp_path / "merged", "merged")
    close(logits(peft_table.read(row, merged), ids), want)
    says = json.loads((merged / "config.json").read_text())
    assert says["vocab_size"] == model.config.vocab_size
    tied = row.vocabulary.startswith("tied") and row.saved in ("norms", "tokens")
    assert row.is_encoder or says["tie_word_embeddings"] == tied


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("given", [[3, 5, 39], {"embed_tokens": [39, 3]}])
def test_rows_of_tokens(tmp_path, tied, given):
    want = made(tmp_path, tied, trainable_token_indices=given)
    got = load_pretrained(str(tmp_path / "base"), adapter=str(tmp_path / "adapter"))
    close(got(IDS), want)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_weights_that_stay_tied(tmp_path, tied):
    want = made(tmp_path, tied, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    got = load_pretrained(str(tmp_path / "base"), adapter=str(tmp_path / "adapter"))
    close(got(IDS), want)


def test_what_has_no_place_is_refused(tmp_path):
    made(tmp_path, False, modules_to_save=["lm_head"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = load_file(file)
    key = "base_model.model.lm_head.weight"
    others = {name: value for name, value in whole.items() if name != key}

    def refusal(tensors, **config):
        save_file(tensors, file)
        path = tmp_path / "adapter" / "adapter_config.json"
        kept = json.loads(path.read_text())
        path.write_text(json.dumps(kept | config))
        with pytest.raises(InputError) as caught:
            load_pretrained(str(tmp_path / "base"), adapter=str(tmp_path / "adapter"))
        path.write_text(json.dumps(kept))
        return str(caught.value)

    strange = {**others, "base_model.model.other.lm_head.weight": whole[key]}
    assert "weights that the base has, got other.lm_head.weight" in refusal(strange)
    narrow = {**others, key: whole[key][:, :-1].copy()}
    assert "expected lm_head.weight of shape [40, 16], got [40, 15]" in refusal(narrow)
    short = {**others, key: whole[key][:-1].copy()}
    assert "embeddings and head of one vocabulary, got tables of 39, 40" in refusal(short)
    unnamed = {**others, "base_model.model.model.layers.0.mlp.down_proj.weight": whole[key]}
    assert "expected floating-point lora_A and lora_B weights" in refusal(unnamed)
    assert "expected trainable_token_indices" in refusal(whole, trainable_token_indices=[1])
    rows = {f"base_model.model.{table}.token_adapter.trainable_tokens_delta": np.full((1, 16), at, np.float32)
            for at, table in enumerate(("lm_head", "model.embed_tokens"))}  # fmt: skip
    apart = refusal({**whole, **rows}, trainable_token_indices=[1])
    assert "got base_model.model.lm_head.token_adapter.trainable_tokens_delta" in apart
    assert "in modules_to_save ('lm_head'), got none of lm_head.weight. Use" in refusal(others)
    infinite = {**whole, key: np.full_like(whole[key], np.inf)}
    assert f"finite numbers, got {key} with NaN or infinity" in refusal(infinite)

    del rows["base_model.model.lm_head.token_adapter.trainable_tokens_delta"]
    alone, table = {**whole, **rows}, "rows of model.embed_tokens"
    assert f"of one table, different ids with a row each in {file.name}, got None and {table}" in (
        refusal(alone)
    )
    other = refusal(alone, trainable_token_indices={"foo": [1]})
    assert f"got {{'foo': [1]}} and {table}" in other
    embedding = {"base_model.model.model.embed_tokens.weight": whole[key]}
    both = {"modules_to_save": ["embed_tokens", "lm_head"], "trainable_token_indices": [1]}
    assert "expected model.embed_tokens to train whole or by rows" in (
        refusal({**alone, **embedding}, **both)
    )


def test_a_layer_that_is_missing_is_refused_and_strange_keys_are_named(tmp_path, capsys):
    want = made(tmp_path, False)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"new_thing": 3, "other": None}))
    capsys.readouterr()
    got = load_pretrained(str(tmp_path / "base"), adapter=str(tmp_path / "adapter"))
    close(got(IDS), want)
    found = capsys.readouterr()
    assert found.err == (
        f"note: {config}: keys that this version does not know are not read: 'new_thing'.\n"
    )
    assert found.out == ""
    whole, kept = load_file(file), json.loads(config.read_text())

    def refused(sentence, **settings):
        config.write_text(json.dumps(kept | settings))
        with pytest.raises(InputError, match=sentence):
            load_pretrained(str(tmp_path / "base"), adapter=str(tmp_path / "adapter"))

    refused("got some of model.layers.1.self_attn.q_proj, model", layers_to_transform=[0])
    refused("got some of model.layers.0.self_attn.v_proj, model", target_modules=["q_proj"])
    refused("got none of model.layers.0.self_attn.o_proj, model",
            target_modules=["q_proj", "v_proj", "o_proj"])  # fmt: skip
    refused("layers_to_transform to be a number or a list of", layers_to_transform=["0"])
    save_file({k: v for k, v in whole.items() if "layers.1.self_attn.v_proj" not in k}, file)
    refused("got none of model.layers.1.self_attn.v_proj. Copy")
    save_file({k: v for k, v in whole.items() if "layers.1." not in k}, file)
    config.write_text(json.dumps(kept | {"layers_to_transform": 0}))
    load_pretrained(str(tmp_path / "base"), adapter=str(tmp_path / "adapter"))
