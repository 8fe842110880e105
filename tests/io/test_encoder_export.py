"""Files of a run on labels against the logits of ``peft`` and ``transformers``."""

import jax
import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForSequenceClassification

import balora_jax
from balora_jax import finetune
from balora_jax.cli import main
from balora_jax.config_file import parse_config
from balora_jax.pretrained.checkpoint import open_encoder
from tests.models import tiny_encoders
from tests.tiny_labels_run import label_config_tree, reviews, write_tokenizer
from tests.tiny_run import write_rows

SIZES = {"num_hidden_layers": 2, "vocab_size": 40}
PAD = {"bert": 2, "roberta": 3, "deberta": 0, "distilbert": 2, "modernbert": 2}
# Of BERT every linear layer, so that one called as the pooler's (dense) is among them.
TARGETS = {
    "bert": "all-linear",
    "roberta": ["query", "value", "attention.output.dense"],
    "deberta": ["query_proj", "value_proj"],
    "distilbert": ["q_lin", "out_lin", "lin1"],
    "modernbert": ["Wqkv", "Wo"],
}
CASES = [
    ("bert", "lora", "pissa"),
    ("bert", "dora", "lora"),
    ("roberta", "lora", "pissa"),
    ("deberta", "lora", "pissa"),
    ("distilbert", "lora", "pissa"),
    ("modernbert", "lora", "pissa"),
]
IDS = np.random.default_rng(3).integers(4, 20, (5, 9))
MASK = (np.arange(9) < np.array([[9], [5], [7], [9], [3]])).astype(int)


def write_base(folder, family, *, save=lambda model, folder: model.save_pretrained(folder)):
    model = getattr(tiny_encoders, family)(**SIZES, num_labels=2)
    save(model, folder)
    write_tokenizer(folder, pad_id=PAD[family])
    return folder


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr(finetune.drawing, "draw_curves", lambda rows, path: False)


def tree_of(folder, base, family, **overrides):
    """Three classes where the base's own head has two: the classifier is new."""
    write_rows(folder / "train.jsonl", reviews(8, 0))
    tree = label_config_tree(
        folder,
        adapter={"target_modules": TARGETS[family], "alpha": 6.0},
        regularizers={"consistency": 0.0, "diversity": 0.0, "spectral": 0.0},
        data={"labels": ["bad", "good", "neither"]},
        eval={"task": "none"},
        training={"max_steps": 2, "accumulation": 1, "learning_rate": 0.05},
    )
    tree["model"]["name_or_path"] = str(base)
    for section, values in overrides.items():
        tree[section] |= values
    return tree


def run(folder, tree, monkeypatch):
    """Train, and give back the logits of the state that the run ended with."""
    seen = []

    class Watched(finetune.Training):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            seen.append(self)

    monkeypatch.setattr(finetune, "Training", Watched)
    finetune.fit(parse_config(tree, "config"), workdir=folder / "run")
    (training,) = seen
    parts = (training.constants.frozen, training.constants.origin, training.state.adapters)
    forward = jax.jit(lambda parts, *arrays: training.run.student.bind(*parts)(*arrays))
    return np.asarray(forward(parts, *arrays_of(training.run.base.config.pad_token_id)))


def arrays_of(pad_id):
    ids = np.where(MASK == 1, IDS, pad_id)
    return ids.astype(np.int32), MASK.astype(np.int32), np.zeros_like(ids, np.int32)


def torch_logits(model):
    ids, mask, _ = arrays_of(model.config.pad_token_id)
    with torch.no_grad():
        return model.eval()(
            input_ids=torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long()
        ).logits.numpy()  # fmt: skip


def same(got, want):
    assert got.shape == want.shape
    error = tiny_encoders.relative_error(got, want)
    assert error < 1e-4, error


@pytest.mark.parametrize(("family", "method", "start"), CASES)
def test_three_programs_agree(tmp_path, monkeypatch, family, method, start):
    base = write_base(tmp_path / "base", family)
    adapter = {"method": method, "start": start, "target_modules": TARGETS[family], "rank": 2}
    tree = tree_of(tmp_path, base, family, adapter=adapter)
    want = run(tmp_path, tree, monkeypatch)
    assert want.shape == (5, 3)
    folder = tmp_path / "run" / "adapter"

    plain = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=3, ignore_mismatched_sizes=True
    )
    before = torch_logits(plain)
    same(torch_logits(PeftModel.from_pretrained(plain, folder)), want)
    assert np.abs(before - want).max() > 0.1

    ours = balora_jax.load_pretrained(str(base), adapter=str(folder))
    same(np.asarray(ours(*arrays_of(PAD[family]))), want)

    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    arguments = ["export", config, "--workdir", tmp_path / "run", "--out", tmp_path / "merged"]
    assert main([*map(str, arguments), "--format", "merged"]) == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert type(merged) is type(plain)
    assert merged.config.num_labels == 3
    assert merged.config.problem_type == "single_label_classification"
    same(torch_logits(merged), want)
    again = balora_jax.load_pretrained(str(tmp_path / "merged"))
    same(np.asarray(again(*arrays_of(PAD[family]))), want)


def test_more_classes_than_the_width(tmp_path, monkeypatch):
    """The head's size is read from the classifier, whatever else has a bias."""
    base = write_base(tmp_path / "base", "bert")
    labels = ["bad", "good", *(f"class {i}" for i in range(28))]
    tree = tree_of(tmp_path, base, "bert", data={"labels": labels})
    tree["adapter"]["target_modules"] = ["query"]
    want = run(tmp_path, tree, monkeypatch)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    arguments = ["export", config, "--workdir", tmp_path / "run", "--out", tmp_path / "merged"]
    assert main([*map(str, arguments), "--format", "merged"]) == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    same(torch_logits(merged), want)


@pytest.mark.parametrize("old", [False, True], ids=["bare", "gamma and beta"])
def test_a_checkpoint_of_the_bare_model(tmp_path, monkeypatch, old):
    """As sentence-transformers ships them: no prefix and no head; old ones call norms otherwise."""

    def save(model, folder):
        model.bert.save_pretrained(folder)
        if old:
            weights = load_file(folder / "model.safetensors")
            names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
            for new, former in names.items():
                weights = {name.replace(new, former): value for name, value in weights.items()}
            assert sum("gamma" in name for name in weights) == 5
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    base = write_base(tmp_path / "base", "bert", save=save)
    stored = load_file(base / "model.safetensors")
    assert not any(name.startswith(("bert.", "classifier")) for name in stored)
    tree = tree_of(tmp_path, base, "bert")
    tree["adapter"]["target_modules"] = ["query", "value"]
    want = run(tmp_path, tree, monkeypatch)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    arguments = ["export", config, "--workdir", tmp_path / "run", "--out", tmp_path / "merged"]
    assert main([*map(str, arguments), "--format", "merged"]) == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    same(torch_logits(merged), want)
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    same(torch_logits(PeftModel.from_pretrained(plain, tmp_path / "run" / "adapter")), want)


def test_the_head_that_a_config_names(tmp_path):
    """What the base says of another task does not stay."""
    base = write_base(tmp_path / "base", "bert")
    for labels in (1, 4):
        opened = open_encoder(str(base), num_labels=labels)
        settings = opened.family.head_settings(opened.config)
        assert settings["architectures"] == ["BertForSequenceClassification"]
        assert len(settings["id2label"]) == len(settings["label2id"]) == labels
        assert settings["num_labels"] == labels
        kind = "regression" if labels == 1 else "single_label_classification"
        assert settings["problem_type"] == kind
