"""Full fine-tuning: every weight trains, the base stays, and a checkpoint of its own is written."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from balora_jax import finetune, load_config
from balora_jax.config_file import parse_config
from balora_jax.errors import InputError
from balora_jax.tasks.labels import run as labels_run
from balora_jax.tasks.text import run as text_run
from tests import tiny_labels_run as labels
from tests import tiny_run as texts
from tests.models.tiny_encoders import relative_error

pytestmark = pytest.mark.usefixtures("no_curves")

FULL = {"method": "full"}
PLAIN = {"head": "plain", "max_steps": 4, "learning_rate": 0.01, "checkpoint_every": 0}
IDS = np.random.default_rng(2).integers(4, 20, (3, 8)).astype(np.int32)


@pytest.fixture(scope="module")
def text_inputs(tmp_path_factory):
    return texts.write_inputs(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def label_inputs(tmp_path_factory):
    return labels.write_label_inputs(tmp_path_factory.mktemp("labels"))


def run(monkeypatch, tree, workdir):
    """Train; returns the summary and the logits of the final state."""
    seen = []

    class Watched(finetune.Training):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            seen.append(self)

    monkeypatch.setattr(finetune, "Training", Watched)
    summary = finetune.fit(parse_config(tree, "config"), workdir=workdir)
    (training,) = seen
    bind, parts = training.run.student.bind, (training.constants.frozen, training.state.adapters)
    logits = jax.jit(lambda parts: bind(*parts)(jnp.asarray(IDS), jnp.ones_like(IDS)))(parts)
    return summary, training, np.asarray(logits, np.float32)


def torch_logits(kind, folder):
    model = kind.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS).long()).logits.float().numpy()


def check_run(rows, before, after, inputs):
    assert before == after  # of the base on disk
    assert abs(rows[0]["consistency"]) < 1e-6
    assert rows[-1]["consistency"] > 1e-4
    assert rows[-1]["task_loss"] < 0.9 * rows[0]["task_loss"]


def test_a_language_model(tmp_path, monkeypatch, text_inputs):
    before = texts.tree_digest(text_inputs)
    tree = texts.config_tree(text_inputs, adapter=FULL, training=PLAIN)
    summary, _, want = run(monkeypatch, tree, tmp_path / "run")
    rows = texts.metrics_of(tmp_path / "run")
    check_run(rows, before, texts.tree_digest(text_inputs), text_inputs)
    sizes = [value.size for value in texts.random_weights().values()]
    assert summary["trainable_parameters"] == summary["total_parameters"] == sum(sizes)
    assert not (tmp_path / "run" / "adapter").exists()
    folder = tmp_path / "run" / "model"
    assert relative_error(torch_logits(AutoModelForCausalLM, folder), want) < 1e-4
    old, new = texts.random_weights(), load_file(folder / "model.safetensors")
    assert old.keys() == new.keys()
    assert all(not np.array_equal(old[name], new[name]) for name in old)
    assert json.loads((folder / "tokenizer.json").read_text())
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["ba-lora"],
    }  # fmt: skip
    assert card.text.startswith(
        "\n# `model`, fine-tuned\n\nThis folder holds `model`, fine-tuned in "
    )
    assert "AutoModelForCausalLM.from_pretrained(folder)" in card.text
    assert load_config(folder / "balora_config.yaml") == parse_config(tree, "test")


def test_a_tied_head_that_is_stored_as_well_stays_tied(tmp_path, monkeypatch, text_inputs):
    tensors = texts.random_weights()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    model = texts.write_model(tmp_path / "model", tensors=tensors, tie_word_embeddings=True)
    tree = texts.config_tree(
        text_inputs, model={"name_or_path": str(model)}, adapter=FULL, training=PLAIN
    )
    _, _, want = run(monkeypatch, tree, tmp_path / "run")
    folder = tmp_path / "run" / "model"
    new = load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(new["lm_head.weight"], new["model.embed_tokens.weight"])
    assert relative_error(torch_logits(AutoModelForCausalLM, folder), want) < 1e-4


def test_an_encoder(tmp_path, monkeypatch, label_inputs):
    before = texts.tree_digest(label_inputs)
    tree = labels.label_config_tree(
        label_inputs, adapter=FULL, training={"learning_rate": 0.005, "max_steps": 8}
    )
    summary, _, want = run(monkeypatch, tree, tmp_path / "run")
    check_run(
        texts.metrics_of(tmp_path / "run"), before, texts.tree_digest(label_inputs), label_inputs
    )
    stored = labels.random_weights()
    classifier = 2 * labels.WIDTH + 2
    trained = sum(value.size for value in stored.values()) + classifier
    assert summary["trainable_parameters"] == trained
    assert summary["after"]["accuracy"] >= 0.9
    folder = tmp_path / "run" / "model"
    assert relative_error(torch_logits(AutoModelForSequenceClassification, folder), want) < 1e-4
    new = load_file(folder / "model.safetensors")
    assert new.keys() == stored.keys() | {"classifier.weight", "classifier.bias"}
    assert all(not np.array_equal(stored[name], new[name]) for name in stored)
    written = json.loads((folder / "config.json").read_text())
    assert written["architectures"] == ["BertForSequenceClassification"]
    card = (folder / "README.md").read_text()
    assert f", {summary['after']['accuracy']:.4f} after\n" in card
    assert "AutoModelForSequenceClassification.from_pretrained(folder)" in card
    # A finished run may be resumed: its own model is written anew.
    finetune.fit(parse_config(tree, "config"), workdir=tmp_path / "run", resume=True)
    again = load_file(folder / "model.safetensors")
    assert all(np.array_equal(again[name], new[name]) for name in new)
    assert (folder / "README.md").read_text() == card


def test_updates_below_the_resolution_of_bfloat16_add_up(tmp_path, monkeypatch, label_inputs):
    """A weight of 1 has a resolution of 2⁻⁷ = 0.0078; eight steps of 0.0003 come to less."""
    tree = labels.label_config_tree(
        label_inputs,
        model={"dtype": "bfloat16"},
        adapter=FULL,
        regularizers={"consistency": 0.0, "diversity": 0.0, "spectral": 0.0},
        training={"learning_rate": 3e-4, "schedule": "constant", "max_steps": 8},
        eval={"task": "none"},
    )
    _, training, _ = run(monkeypatch, tree, tmp_path / "run")
    path = "embeddings.LayerNorm.scale"
    master, begun = training.state.adapters[path], training.constants.frozen[path]
    assert (master.dtype, begun.dtype) == (jnp.float32, jnp.bfloat16)
    assert all(value.dtype == jnp.float32 for value in training.state.adapters.values())
    moved = np.abs(np.asarray(master) - np.asarray(begun, np.float32))
    assert 4 * 3e-4 < moved.max() <= 8 * 3e-4 * 1.05
    stored = load_file(tmp_path / "run" / "model" / "model.safetensors")
    written = stored["bert.embeddings.LayerNorm.weight"]
    assert written.dtype == jnp.bfloat16
    np.testing.assert_array_equal(written, np.asarray(master.astype(jnp.bfloat16)))


def refused(check, tree, *phrases):
    with pytest.raises(InputError) as error:
        check(parse_config(tree, "config"))
    for phrase in phrases:
        assert phrase in str(error.value)


def test_what_it_cannot_have_is_refused(text_inputs, label_inputs):
    message = (
        "model.quantization: expected none with adapter.method full, got int8: codes cannot be "
        "trained. Set it to none."
    )
    quantised = {"quantization": "int8"}
    tree = texts.config_tree(text_inputs, model=quantised, adapter=FULL, training=PLAIN)
    refused(text_run.check, tree, message)
    tree = labels.label_config_tree(label_inputs, model=quantised, adapter=FULL)
    refused(labels_run.check, tree, message)


def test_a_model_that_lies_in_the_workdir_is_not_replaced(label_inputs):
    """The base itself may lie there."""
    before = texts.tree_digest(label_inputs)
    config = parse_config(labels.label_config_tree(label_inputs, adapter=FULL), "config")
    for resume in (False, True):
        with pytest.raises(InputError) as error:
            finetune.fit(config, workdir=label_inputs, resume=resume)
        assert str(error.value) == (
            f"--workdir {label_inputs}: expected a new or empty folder, got one with model that no "
            "run of this program wrote, and that a run would replace. Choose another folder."
        )
    assert texts.tree_digest(label_inputs) == before


def test_dropout_is_refused(text_inputs):
    tree = texts.config_tree(
        text_inputs, adapter={**FULL, "start": "lora", "dropout": 0.1}, training=PLAIN
    )
    with pytest.raises(
        InputError, match=r"adapter\.dropout: expected 0 with method 'full', got 0.1"
    ):
        parse_config(tree, "config")


def test_masters_are_no_part_of_the_frozen_model(label_inputs):
    """The step is given the state for good; the frozen weights must outlive it."""
    tree = labels.label_config_tree(label_inputs, adapter=FULL)
    run = labels_run.check(parse_config(tree, "config"))
    loaded = run.load()
    kept = run.constants(loaded)
    jax.tree.map(lambda leaf: leaf.delete(), loaded.trainable)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(kept))
