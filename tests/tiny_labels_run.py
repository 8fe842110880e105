"""The smallest run on labels: a random BERT, a tokenizer, rows and a config."""

import copy
import json
from pathlib import Path

import numpy as np
import yaml
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tests.tiny_run import write_rows

LAYERS, WIDTH, INNER, HEADS, POSITIONS, VOCAB_SIZE = 2, 32, 48, 4, 40, 40
GOOD, BAD = ("joy", "sun", "gold", "song"), ("woe", "rain", "rust", "moan")
OTHER = ("the", "of", "and", "a", "it", "is", "was", "to", "in", "that")
SPECIAL = ("[CLS]", "[SEP]", "[UNK]")

MODEL = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}


def random_weights(seed=0):
    """All tensors of a pretrained BERT by name; it has a pooler and no classifier.

    The words of ``GOOD`` (ids 4 to 7) and ``BAD`` (8 to 11) lie on two sides.
    """
    rng = np.random.default_rng(seed)
    tensors = {}

    def linear(name, d_in, d_out):
        tensors[f"bert.{name}.weight"] = 0.3 * rng.standard_normal((d_out, d_in))
        tensors[f"bert.{name}.bias"] = 0.1 * rng.standard_normal(d_out)

    def norm(name):
        tensors[f"bert.{name}.LayerNorm.weight"] = 1 + 0.1 * rng.standard_normal(WIDTH)
        tensors[f"bert.{name}.LayerNorm.bias"] = 0.1 * rng.standard_normal(WIDTH)

    for name, rows in (("word", VOCAB_SIZE), ("position", POSITIONS), ("token_type", 2)):
        table = (1.0 if name == "word" else 0.1) * rng.standard_normal((rows, WIDTH))
        if name == "word":  # what a text says can be read from its features
            said = 2.0 * rng.standard_normal(WIDTH)
            table[4:8] += said
            table[8:12] -= said
        tensors[f"bert.embeddings.{name}_embeddings.weight"] = table
    norm("embeddings")
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}"
        for name in ("query", "key", "value"):
            linear(f"{layer}.attention.self.{name}", WIDTH, WIDTH)
        linear(f"{layer}.attention.output.dense", WIDTH, WIDTH)
        linear(f"{layer}.intermediate.dense", WIDTH, INNER)
        linear(f"{layer}.output.dense", INNER, WIDTH)
        norm(f"{layer}.attention.output")
        norm(f"{layer}.output")
    linear("pooler.dense", WIDTH, WIDTH)
    return {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}


def write_model(folder, *, tensors=None, seed=0, **config):
    """A checkpoint folder in Hugging Face layout; keywords replace keys of its config."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(random_weights(seed) if tensors is None else tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**MODEL, **config}))
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder, *, pad_id=0, extra=0):
    """One token for each word; texts and pairs are joined as BERT joins them.

    ``extra`` unused words come in front of the others, so that every id is higher by as much.
    """
    words = [*SPECIAL, *(f"unused{i}" for i in range(extra)), *GOOD, *BAD, *OTHER]
    words.insert(pad_id, "[PAD]")
    ids = {word: i for i, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, ids[name]) for name in ("[CLS]", "[SEP]")],
    )
    core.add_special_tokens(["[PAD]", *SPECIAL])
    core.save(str(Path(folder) / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        "model_max_length": POSITIONS,
    }
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps(settings))


def reviews(count, seed):
    """Rows whose label is the kind of most of their telling words, with a score from 0 to 5."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        good = i % 2 == 0
        telling = rng.choice(GOOD if good else BAD, rng.integers(1, 4))
        words = [*telling, *rng.choice(OTHER, rng.integers(1, 5))]
        rng.shuffle(words)
        share = len(telling) / 3
        rows.append(
            {
                "text": " ".join(words),
                "kind": "good" if good else "bad",
                "score": round(2.5 + (2.5 if good else -2.5) * share, 2),
            }
        )
    return rows


def write_label_inputs(folder, *, seed=0, **model):
    """Checkpoint, training and validation rows under one folder."""
    folder = Path(folder)
    write_model(folder / "model", seed=seed, **model)
    write_rows(folder / "train.jsonl", reviews(27, seed))
    write_rows(folder / "validation.jsonl", reviews(21, seed + 1))
    return folder


def label_config_tree(inputs, **overrides):
    """The config of a tiny run; keywords are ``section={key: value}``, merged in."""
    inputs = Path(inputs)
    tree = {
        "task": "labels",
        "model": {"name_or_path": str(inputs / "model"), "remat": "none"},
        "adapter": {
            "start": "pissa",
            "rank": 2,
            "alpha": 3.0,
            "target_modules": ["query", "value"],
        },
        "regularizers": {"consistency": 0.02, "diversity": 0.001, "spectral": 0.01, "k": 1},
        "data": {
            "train": str(inputs / "train.jsonl"),
            "validation": str(inputs / "validation.jsonl"),
            "text_columns": ["text"],
            "label_column": "kind",
            "labels": ["bad", "good"],
        },
        "training": {
            "max_steps": 12,
            "batch_size": 8,
            "accumulation": 2,
            "learning_rate": 0.02,
            "warmup": 0.0,
            "checkpoint_every": 0,
        },
        "eval": {"batch_size": 8},
    }
    for section, values in overrides.items():
        tree.setdefault(section, {}).update(copy.deepcopy(values))
    return tree


SCORES = {"label_column": "score", "labels": [], "regression": True}
"""Settings of ``data`` that make the rows a regression."""


def write_label_config(file, inputs, **overrides):
    """``label_config_tree`` as a YAML file; returns its path as text."""
    tree = label_config_tree(inputs, **overrides)
    Path(file).write_text(yaml.safe_dump(tree, sort_keys=False))
    return str(file)
