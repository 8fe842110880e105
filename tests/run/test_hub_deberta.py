"""A folder laid out as the hub's ``microsoft/deberta-v3-base``, trained by its config."""

import io
import json
import random
from pathlib import Path

import jax
import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.numpy import load_file
from transformers import AutoTokenizer, DebertaV2ForSequenceClassification

from balora_jax import load_pretrained
from balora_jax.cli import main
from balora_jax.errors import InputError
from balora_jax.pretrained.checkpoint import open_encoder
from balora_jax.pretrained.tokenizer import open_tokenizer
from tests import tiny_run
from tests.models.tiny_encoders import relative_error

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "deberta_v3_base_mrpc.yaml"
WORDS = [
    "the",
    "of",
    "and",
    "a",
    "is",
    "was",
    "in",
    "that",
    "company",
    "said",
    "shares",
    "year",
    "percent",
    "market",
    "he",
    "they",
    "it",
    "profit",
    "rose",
    "fell",
    "1996",
    "city",
    "council",
    ",",
    ".",
    "'",
    '"',
    "-",
]
# As it lies on the hub, in its own words and order, but for the sizes.
HUB_CONFIG = {
    "model_type": "deberta-v2",
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "relative_attention": True,
    "position_buckets": 16,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "layer_norm_eps": 1e-7,
    "max_relative_positions": -1,
    "position_biased_input": False,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "type_vocab_size": 0,
    "vocab_size": 80,
}


def text(rng):
    return " ".join(rng.choices(WORDS, k=rng.randint(4, 12)))


def spm_model():
    """A unigram model with DeBERTa's special tokens at their places; [MASK] is added behind."""
    rng, written = random.Random(0), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text(rng) for _ in range(400)]),
        model_writer=written,
        vocab_size=70,
        hard_vocab_limit=False,
        model_type="unigram",
        pad_id=0, bos_id=1, eos_id=2, unk_id=3,
        pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]", unk_piece="[UNK]",
        minloglevel=2,
    )  # fmt: skip
    return written.getvalue()


def hub_state():
    """Half precision under the hub's names: the encoder and the heads of its pretraining."""
    width, inner, rows = HUB_CONFIG["hidden_size"], HUB_CONFIG["intermediate_size"], 80
    generator, state = torch.Generator().manual_seed(0), {}

    def put(name, *shape, scale=0.3, mean=0.0):
        value = mean + scale * torch.randn(shape, generator=generator)
        state[name] = value.half()

    def linear(name, d_in, d_out):
        put(f"{name}.weight", d_out, d_in)
        put(f"{name}.bias", d_out, scale=0.1)

    def norm(name):
        put(f"{name}.weight", width, scale=0.1, mean=1.0)
        put(f"{name}.bias", width, scale=0.1)

    put("deberta.embeddings.word_embeddings.weight", rows, width, scale=1.0)
    put("deberta.embeddings.word_embeddings._weight", rows, width)
    put("deberta.embeddings.position_embeddings.weight", 64, width)
    put("deberta.embeddings.position_embeddings._weight", 64, width)
    norm("deberta.embeddings.LayerNorm")
    for i in range(HUB_CONFIG["num_hidden_layers"]):
        layer = f"deberta.encoder.layer.{i}"
        for name in ("query_proj", "key_proj", "value_proj"):
            linear(f"{layer}.attention.self.{name}", width, width)
        linear(f"{layer}.attention.output.dense", width, width)
        norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", width, inner)
        linear(f"{layer}.output.dense", inner, width)
        norm(f"{layer}.output.LayerNorm")
    put("deberta.encoder.rel_embeddings.weight", 32, width)
    norm("deberta.encoder.LayerNorm")
    linear("lm_predictions.lm_head.dense", width, width)
    norm("lm_predictions.lm_head.LayerNorm")
    put("lm_predictions.lm_head.bias", rows)
    linear("mask_predictions.dense", width, width)
    norm("mask_predictions.LayerNorm")
    linear("mask_predictions.classifier", width, 1)
    return state


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deberta-v3-base")
    (folder / "config.json").write_text(json.dumps(HUB_CONFIG, indent=2))
    settings = {"do_lower_case": False, "vocab_type": "spm"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "spm.model").write_bytes(spm_model())
    torch.save(hub_state(), folder / "pytorch_model.bin")
    # What else lies there.
    (folder / "pytorch_model.generator.bin").write_bytes(b"not read")
    (folder / "tf_model.h5").write_bytes(b"not read")
    return folder


def rows(count, seed):
    rng = random.Random(seed)
    for i in range(count):
        first = text(rng)
        second = first if i % 2 else text(rng)
        yield {"sentence1": first, "sentence2": second, "label": i % 2, "idx": i}


def settings(hub, folder):
    tiny_run.write_rows(folder / "train.jsonl", rows(16, 1))
    tiny_run.write_rows(folder / "validation.jsonl", rows(8, 2))
    changes = {
        "model.name_or_path": hub, "data.train": folder / "train.jsonl",
        "data.validation": folder / "validation.jsonl", "data.max_length": 48,
        "training.max_steps": 2, "training.batch_size": 8, "training.log_every": 1,
        "training.epochs": "null", "eval.batch_size": 8,
    }  # fmt: skip
    return [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]


def test_it_trains_from_its_config(hub, tmp_path, capsys):
    workdir = tmp_path / "run"
    code = main(["train", str(CONFIG), "--workdir", str(workdir), *settings(hub, tmp_path)])
    assert code == 0, capsys.readouterr().err
    found = tiny_run.metrics_of(workdir)
    assert [row["step"] for row in found] == [1, 2]
    assert np.isfinite([row["loss"] for row in found]).all()
    assert found[0]["consistency"] == 0.0
    adapter = workdir / "adapter"
    saved = load_file(adapter / "adapter_model.safetensors")
    assert sum("lora_A" in name for name in saved) == 2 * 3
    # The trained model in our words and in those of transformers and peft.
    from peft import PeftModel

    texts = [row["sentence1"] for row in rows(5, 3)], [row["sentence2"] for row in rows(5, 3)]
    tokens = AutoTokenizer.from_pretrained(hub)(*texts, padding=True, return_tensors="np")
    base = DebertaV2ForSequenceClassification.from_pretrained(
        hub, num_labels=2, dtype=torch.float32
    )
    theirs = PeftModel.from_pretrained(base, adapter).eval()
    arrays = {name: tokens[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.no_grad():
        want = theirs(**{name: torch.tensor(value) for name, value in arrays.items()}).logits
    got = load_pretrained(str(hub), adapter=str(adapter))(**arrays)
    assert relative_error(got, want.numpy()) < 1e-4


def test_every_weight_is_the_hubs(hub):
    base = open_encoder(str(hub), num_labels=2)
    theirs = DebertaV2ForSequenceClassification.from_pretrained(hub, dtype=torch.float32)
    state = {name: value.numpy() for name, value in theirs.state_dict().items()}
    names = {rule.path: rule for rule in base.rules}
    from balora_jax.models.structure import structure

    loaded = base.load(structure(base.config).frozen)
    assert set(loaded) == set(names)
    for path, value in loaded.items():
        rule = names[path]
        stored = np.stack([state[name] for name in rule.names(base.config.num_layers)])
        stored = np.swapaxes(stored, -1, -2) if rule.transpose else stored
        np.testing.assert_array_equal(value, stored if rule.stacked else stored[0], path)
    assert not base.stored_head()
    assert base.load_head(jax.random.key(0))["head.out.kernel"].shape == (32, 2)


def test_the_tokenizer_is_that_of_sentencepiece(hub):
    model = sentencepiece.SentencePieceProcessor(model_file=str(hub / "spm.model"))
    tokenizer = open_tokenizer(hub)
    for row in rows(6, 4):
        first, second = model.encode(row["sentence1"]), model.encode(row["sentence2"])
        found = tokenizer(row["sentence1"], row["sentence2"])
        assert found["input_ids"] == [1, *first, 2, *second, 2]
        assert found["token_type_ids"] == [0] * (len(first) + 2) + [1] * (len(second) + 1)
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (0, 3)


@pytest.mark.parametrize("missing", ["sentencepiece", "google.protobuf"])
def test_a_missing_package_is_named_with_its_remedy(hub, monkeypatch, missing):
    import sys

    for name in list(sys.modules):
        if name.startswith(("sentencepiece", "google.protobuf")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError) as caught:
        open_tokenizer(hub)
    said = str(caught.value)
    assert said.startswith(
        f"{hub}: expected sentencepiece and a protobuf that fits it, to read spm.model, got: "
    )
    assert missing in said
    assert said.endswith("Install both: pip install 'sentencepiece<0.2.3' protobuf.")
