"""Whole runs of other families: from a checkpoint of transformers to files that it and PEFT load."""

import json

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from balora_jax.pretrained.load import load_pretrained
from tests.models.tiny_families import FAMILIES
from tests.run.conftest import invoke
from tests.tiny_run import metrics_of, sums, write_config, write_rows, write_tokenizer

# One layer of attention and one of the MLP, in each family's names.
TARGETS = {
    "gemma2": ["q_proj", "down_proj"],
    "phi3": ["qkv_proj", "gate_up_proj"],
    "mixtral": ["v_proj", "w1", "w2", "w3"],
    "gpt2": ["c_attn", "c_proj"],
}
IDS = np.random.default_rng(1).integers(3, 48, (2, 11))


@pytest.fixture(scope="module", params=TARGETS)
def finished(request, tmp_path_factory):
    """Name, checkpoint, config and folder of a run of two steps."""
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    FAMILIES[name](**{"n_layer" if name == "gpt2" else "num_hidden_layers": 2}).save_pretrained(
        folder / "model"
    )
    write_tokenizer(folder / "model")
    write_rows(folder / "train.jsonl", sums(16, 0))
    config = write_config(
        folder / "config.yaml",
        folder,
        adapter={"target_modules": TARGETS[name]},
        data={"validation": None},
        training={"max_steps": 2, "checkpoint_every": 0},
    )
    code, _, err = invoke("train", config, "--workdir", folder / "run")
    assert code == 0, err
    return name, folder / "model", config, folder / "run"


@pytest.fixture(autouse=True)
def without_curves(no_curves):
    del no_curves


def torch_model(folder):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def error_of(ours, theirs):
    """The largest difference as a share of the reference's range."""
    return np.abs(np.asarray(ours) - theirs).max() / np.ptp(theirs)


def test_everything_a_run_promises_is_there(finished):
    name, model, _, run = finished
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "adapter"} <= names
    rows = metrics_of(run)
    assert [row["step"] for row in rows] == [1, 2]
    # Exactly 0 with the compiler's optimizations on; without them phi3's two forwards are compiled
    # in different ways.
    assert abs(rows[0]["consistency"]) < (3e-7 if name == "phi3" else 1e-7)
    assert rows[1]["consistency"] > 1e-6
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 2
    stored = torch_model(model)
    assert summary["total_parameters"] == stored.num_parameters()


# peft fuses Mixtral's gate and up, and says so of the pattern that it makes of ours.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_peft_computes_our_logits(finished):
    name, model, _, run = finished
    ours = load_pretrained(str(model), adapter=str(run / "adapter"))(IDS)
    plain = torch_logits(torch_model(model))
    adapted = peft.PeftModel.from_pretrained(torch_model(model), str(run / "adapter")).eval()
    theirs = torch_logits(adapted)
    assert error_of(plain, theirs) > 1e-2
    assert error_of(ours, theirs) < 1e-4, name


def test_the_merged_checkpoint_computes_our_logits(finished, tmp_path):
    _, model, config, run = finished
    arguments = ["--workdir", run, "--out", tmp_path / "merged", "--format", "merged"]
    code, _, err = invoke("export", config, *arguments)
    assert code == 0, err
    ours = load_pretrained(str(model), adapter=str(run / "adapter"))(IDS)
    theirs = torch_logits(torch_model(tmp_path / "merged"))
    assert error_of(torch_logits(torch_model(model)), theirs) > 1e-2
    assert error_of(ours, theirs) < 1e-4
    assert error_of(load_pretrained(str(tmp_path / "merged"))(IDS), theirs) < 1e-4
