"""A teacher that is the start of a run: values and gradients against PEFT's models in torch.

``BALORA_TEACHERS=all`` has more kinds of adapters.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from tests.models import tiny_encoders
from tests.tasks.test_labels_loss import torch_terms
from tests.training import teacher_program as program
from tests.training.test_gradients import CASES, LAMBDAS, MARKED, POSITIONS, SEGMENTS, torch_loss

pytestmark = pytest.mark.filterwarnings("ignore")

ONE = {"data": 1}
IDS = np.where(SEGMENTS > 0, np.random.default_rng(3).integers(3, 59, SEGMENTS.shape), 0)
TOKENS = [int(IDS[0, 1]), int(IDS[0, 4]), int(IDS[1, 3])]
ALL = ["embed_tokens", "lm_head", "norm"]
# Kind → whether the base ties its head, and what trains beside factors.
TEXT = {
    "all": (False, {"modules_to_save": ALL}),
    "dora, tokens, tied": (True, {"use_dora": True, "trainable_token_indices": TOKENS}),
}
MORE = {
    "all, plain head": TEXT["all"],
    "all, tied": (True, TEXT["all"][1]),
    "dora": (False, {"use_dora": True}),
    "tokens": (False, {"trainable_token_indices": TOKENS}),
}
MESHES = ["all", program.LABELS]
if os.environ.get("BALORA_TEACHERS") == "all":
    TEXT |= MORE
    MESHES = [*TEXT, program.LABELS]


def moved(model, size, seed):
    """What trains, away from where it was."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def saved(folder, model, lora):
    """The base, the start and what trains later in a folder; the last two as PEFT's models."""
    model.save_pretrained(folder / "base")
    student = moved(get_peft_model(copy.deepcopy(model), lora), 0.05, 1)
    student.save_pretrained(folder / "adapter")
    teacher = PeftModel.from_pretrained(model, folder / "adapter")
    moved(student, 0.05, 2).save_pretrained(folder / "later")
    return student.eval().double(), teacher.eval().double()


def text_models(folder, kind):
    tied, trained = TEXT[kind]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        tie_word_embeddings=tied, initializer_range=0.3,
    )  # fmt: skip
    lora = LoraConfig(
        r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **trained
    )
    np.savez(folder / "batch.npz", **{
        name: np.asarray(value, np.int32) for name, value in (
            ("input_ids", IDS), ("positions", POSITIONS), ("segment_ids", SEGMENTS),
            ("loss_mask", MARKED))
    })  # fmt: skip
    return saved(folder, LlamaForCausalLM(config), lora)


def label_models(folder):
    model = tiny_encoders.bert(num_labels=3, num_hidden_layers=2)
    with torch.no_grad():
        model.classifier.weight.mul_(3.0)  # so that no softmax is flat
    lora = LoraConfig(
        r=2, lora_alpha=3, target_modules=["query", "output.dense"], task_type="SEQ_CLS",
        modules_to_save=["classifier", "pooler", "word_embeddings"],
    )  # fmt: skip
    rng = np.random.default_rng(5)
    mask = (np.arange(9) < np.array([7, 5, 9, 6])[:, None]).astype(np.int32)
    batch = {
        "input_ids": np.where(mask == 1, rng.integers(3, 61, mask.shape), 2),
        "attention_mask": mask,
        "token_type_ids": rng.integers(0, 2, mask.shape) * mask,
        "labels": rng.integers(0, 3, 4),
    }
    np.savez(folder / "batch.npz", **{k: v.astype(np.int32) for k, v in batch.items()})
    return saved(folder, model, lora)


def label_loss(models, folder):
    """Loss and parts on labels, from the definitions."""
    batch = {name: torch.tensor(v).long() for name, v in np.load(folder / "batch.npz").items()}
    labels = batch.pop("labels")
    z, z_teacher = (model(**batch).logits for model in models)
    task = torch.nn.functional.cross_entropy(z, labels)
    *terms, _ = torch_terms(z, z_teacher.detach(), 3, {"k": 1})
    loss = task + sum(scale * term for scale, term in zip(LAMBDAS, terms, strict=True))
    names = ("task_loss", "consistency", "diversity", "spectral")
    return loss, dict(zip(names, (task, *terms), strict=True))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Kind → folder, values and gradients in torch; the meshes' figures lie in the folders."""
    place, found = tmp_path_factory.mktemp("teachers"), {}
    for kind in (*TEXT, program.LABELS):
        folder = place / kind
        folder.mkdir()
        if kind == program.LABELS:
            models = label_models(folder)
            loss, parts = label_loss(models, folder)
        else:
            models = text_models(folder, kind)
            loss, parts, _ = torch_loss(models, IDS, **CASES["iclr2026"], k=4)
        loss.backward()
        gradients = {
            short(name): p.grad.numpy()
            for name, p in models[0].named_parameters()
            if p.grad is not None
        }
        found[kind] = folder, {"loss": loss, **parts}, gradients
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.teacher_program", str(place), *MESHES],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return found


def short(name):
    if "trainable_tokens_delta" in name:
        return "trainable_tokens_delta"
    return name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")


def compare(values, gradients, want, expected):
    assert float(want["consistency"]) > 1e-3
    for name, value in want.items():
        assert float(values[name]) == pytest.approx(value.item(), rel=2e-5), name
    assert gradients.keys() == expected.keys()
    largest = max(np.abs(value).max() for value in expected.values())
    for name, exact in expected.items():
        error = np.abs(np.asarray(gradients[name], np.float64) - exact).max()
        assert error <= 5e-5 * np.abs(exact).max() + 1e-6 * largest, name


@pytest.mark.parametrize("kind", [*TEXT, program.LABELS])
def test_loss_and_gradients_later(made, kind):
    folder, want, expected = made[kind]
    compare(*program.measured(folder, kind, ONE), want, expected)


@pytest.mark.parametrize("kind", MESHES)
def test_on_a_mesh_of_two_by_two(made, kind):
    folder, want, expected = made[kind]
    found = dict(np.load(folder / "mesh.npz"))
    values = {name: found.pop(f"value {name}") for name in want}
    gradients = {name: value for name, value in found.items() if not name.startswith("value ")}
    compare(values, gradients, want, expected)


def test_labels_begin_at_their_teacher(made):
    (found,) = program.begins(made[program.LABELS][0], program.LABELS, None)
    assert abs(float(found["consistency"])) < 1e-7


def test_text_begins_at_its_teacher_which_drops_nothing(made):
    """A weight that follows the teacher's confidence tells of the teacher alone."""
    adaptive = {"consistency_schedule": "adaptive", "adaptive_min": 0.1, "adaptive_max": 0.9}
    keys = None, jax.random.key(3)
    still, dropped = program.begins(made["all"][0], "all", *keys, dropout=0.5, **adaptive)
    assert float(still["consistency"]) == 0.0
    assert float(dropped["consistency"]) > 1e-4
    assert 0.1 < float(still["lambda1"]) < 0.9
    assert float(dropped["lambda1"]) == pytest.approx(float(still["lambda1"]), rel=1e-6)
