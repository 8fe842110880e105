"""Embeddings, heads and norms that PEFT trained whole (`modules_to_save`), and rows of tokens."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from balora_jax.config_file import parse_config
from balora_jax.errors import InputError
from balora_jax.pretrained.export import export_run
from balora_jax.pretrained.load import load_pretrained
from tests import tiny_run
from tests.io import peft_table
from tests.io.peft_table import close, logits, moved

IDS = np.random.default_rng(1).integers(0, 40, (2, 7))
SMALL = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
HEAD_DIM = {"head_dim": 4}
FAMILIES = {
    "llama": lambda tied: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=tied)),
    "qwen3": lambda tied: Qwen3ForCausalLM(
        Qwen3Config(**SMALL, **HEAD_DIM, tie_word_embeddings=tied)
    ),
    "gemma2": lambda tied: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, **HEAD_DIM, tie_word_embeddings=tied)
    ),
    "gpt2": lambda tied: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=32,
            tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2,
        )
    ),
}  # fmt: skip
TARGETS = {"gpt2": ["c_attn"]}
NAMES = {
    "gpt2": {"embeddings": "wte", "positions": "wpe", "norm": "ln_f", "norms": "ln_1"},
    "others": {"embeddings": "embed_tokens", "norm": "norm", "norms": "input_layernorm"},
}
SAVED = {
    "embeddings": ["embeddings"],
    "head": ["head"],
    "both": ["embeddings", "head"],
    "norms": ["norm"],  # PEFT matches ends: of the layers' norms too
    "all": ["embeddings", "head", "norms"],
}


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(torch.tensor(ids)).logits.float().numpy()


def close(got, want):
    assert got.shape == want.shape
    assert np.abs(np.asarray(got) - want).max() <= 1e-4 * (want.max() - want.min())


def moved(model):
    """What trains, away from where it began."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                step = 0.3 * torch.randn(parameter.shape, generator=generator)
                parameter.add_(step if "lora" not in name else 0.3 * step)
    return model.eval()


def names_of(family, kinds):
    known = NAMES.get(family, NAMES["others"])
    return ["lm_head" if kind == "head" else known[kind] for kind in kinds]


def made(folder, family, tied, **options):
    """A base, an adapter that PEFT trained on it, and what the two compute."""
    torch.manual_seed(0)
    model = randomised(FAMILIES[family](tied))
    model.save_pretrained(folder / "base")
    config = LoraConfig(
        r=2, lora_alpha=3, target_modules=TARGETS.get(family, ["q_proj", "v_proj"]),
        task_type="CAUSAL_LM", **options,
    )  # fmt: skip
    adapted = moved(get_peft_model(model, config))
    adapted.save_pretrained(folder / "adapter")
    return logits(adapted)


def exported(row, folder, form):
    """Our export of the adapter of ``folder/run``."""
    tree = tiny_run.config_tree(folder)
    tree["model"]["name_or_path"] = str(folder / "base")
    config = parse_config(tree, "test")
    export_run(config, folder / "run", folder / form, format=form, rank=None)
    return folder / form


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", peft_table.CASES)
def test_an_adapter_of_peft_is_read_and_leaves_as_it_came(tmp_path, case):
    row, base, adapter = peft_table.ROWS[case], tmp_path / "base", tmp_path / "run" / "adapter"
    peft_table.make(row, tmp_path)
    model = peft_table.theirs(row, base, adapter)
    ids = peft_table.ids(row, model)
    want = logits(model, ids)
    ours = load_pretrained(str(base), adapter=str(adapter))
    close(ours(ids), want)
    assert ours.config.vocab_size == model.config.vocab_size
    before = logits(peft_table.read(row, base), ids)
    assert np.abs(before - want).max() > 0.05 * np.ptp(want)

    again = exported(row, tmp_path, "peft")
    close(logits(peft_table.theirs(row, base, again), ids), want)
    for one, other in zip(ours.parts, load_pretrained(str(base), adapter=str(again)).parts, strict=True):  # fmt: skip
        assert one.keys() == other.keys()
        for path, value in one.items():
            np.testing.assert_array_equal(other[path], value, path)

    merged = exported(row, tmp_path, "merged")
    unresized = row._replace(vocabulary="untied")
    close(logits(peft_table.read(unresized, merged), ids), want)
    says = json.loads((merged / "config.json").read_text())
    assert says["vocab_size"] == model.config.vocab_size
    if not row.is_encoder:
        trained = {"embeddings", "head", "all"}
        tied = row.vocabulary.startswith("tied") and row.saved not in trained
        assert says["tie_word_embeddings"] == tied


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("given", [[3, 5, 39], {"embed_tokens": [39, 3]}])
def test_rows_of_tokens(tmp_path, tied, given):
    want = made(tmp_path, "llama", tied, trainable_token_indices=given)
    got = load_pretrained(str(tmp_path / "base"), adapter=str(tmp_path / "adapter"))
    close(got(IDS), want)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_weights_that_stay_tied(tmp_path, tied):
    want = made(tmp_path, "llama", tied, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    got = load_pretrained(str(tmp_path / "base"), adapter=str(tmp_path / "adapter"))
    close(got(IDS), want)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_resized_vocabulary(tmp_path, tied, named):
    torch.manual_seed(0)
    model = randomised(FAMILIES["llama"](tied))
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(46, mean_resizing=False)
    more = {"modules_to_save": ["embed_tokens", "lm_head"]} if named else {}
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **more)
    moved(get_peft_model(model, config)).save_pretrained(
        tmp_path / "adapter", save_embedding_layers=True
    )
    got = load_pretrained(str(tmp_path / "base"), adapter=str(tmp_path / "adapter"))
    ids = np.array([[3, 45, 40, 7]])
    again = PeftModel.from_pretrained(resized(tmp_path / "base"), tmp_path / "adapter")
    close(got(ids), logits(again, ids))
    assert got(ids).shape[-1] == 46


def resized(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(46, mean_resizing=False)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("saved", [["word_embeddings"], ["LayerNorm"]])
def test_an_encoder(tmp_path, saved):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_labels=3, max_position_embeddings=32,
    )  # fmt: skip
    model = randomised(BertForSequenceClassification(config))
    model.save_pretrained(tmp_path / "base")
    lora = LoraConfig(
        r=2, target_modules=["query"], task_type="SEQ_CLS", modules_to_save=[*saved, "classifier"]
    )
    moved(get_peft_model(model, lora)).save_pretrained(tmp_path / "adapter")
    base = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    got = load_pretrained(str(tmp_path / "base"), adapter=str(tmp_path / "adapter"))
    # What PEFT makes of its own file.
    close(got(IDS), logits(PeftModel.from_pretrained(base, tmp_path / "adapter")))


def test_what_has_no_place_is_refused(tmp_path):
    made(tmp_path, "llama", False, modules_to_save=["lm_head"])
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


def test_a_layer_that_is_missing_is_refused_and_strange_keys_are_named(tmp_path, capsys):
    want = made(tmp_path, "llama", False)
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
    tensors = {k: v for k, v in load_file(file).items() if "layers.1.self_attn.v_proj" not in k}
    save_file(tensors, file)
    with pytest.raises(InputError, match=r"got none of model.layers.1.self_attn.v_proj. Copy"):
        load_pretrained(str(tmp_path / "base"), adapter=str(tmp_path / "adapter"))
