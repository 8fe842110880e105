"""Gemma 3 folders with a tower of images: text against transformers, adapters against PEFT."""

import shutil

import numpy as np
import peft
import pytest
import torch
import transformers as hf
from safetensors.numpy import load_file, save_file

from balora_jax.errors import InputError
from balora_jax.models.families.base import read_config
from balora_jax.pretrained.load import load_pretrained
from tests.models import tiny
from tests.models.tiny_families import gemma3
from tests.run.conftest import invoke
from tests.tiny_run import metrics_of, sums, write_config, write_rows, write_tokenizer

IDS = np.random.default_rng(1).integers(3, 48, (2, 17))
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def model_with_images(**changes):
    """A random one whose language model is the tiny Gemma 3 of text, every option off its default."""
    text = gemma3().config.to_dict() | {"tie_word_embeddings": True} | changes
    text = {key: value for key, value in text.items() if key not in ("model_type", "architectures")}
    config = hf.Gemma3Config(
        text_config=text, vision_config=VISION, mm_tokens_per_image=4, boi_token_index=56,
        eoi_token_index=57, image_token_index=58, attn_implementation="eager",
    )  # fmt: skip
    return tiny.randomised(hf.Gemma3ForConditionalGeneration(config))


def as_in_memory(folder):
    """Give the tensors the names that the class has, as some tools save them."""
    file = folder / "model.safetensors"
    names = {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    }
    tensors = {}
    for name, value in load_file(file).items():
        start = next(start for start in names if name.startswith(start))
        tensors[names[start] + name.removeprefix(start)] = value
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture(scope="module", params=["as in memory", "as on the hub"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma3") / "model"
    model_with_images().save_pretrained(folder)
    assert "language_model.model.norm.weight" in load_file(folder / "model.safetensors")
    if request.param == "as in memory":
        as_in_memory(folder)
    return folder


def torch_model(folder):
    return hf.Gemma3ForConditionalGeneration.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def error_of(got, want):
    return np.abs(np.asarray(got) - want).max() / np.ptp(want)


def test_logits_of_text_equal_transformers(folder, record_property):
    error = error_of(load_pretrained(str(folder))(IDS), torch_logits(torch_model(folder)))
    record_property("parity", f"gemma3: {error:.1e}")
    assert error < 1e-4


def test_a_head_of_its_own_and_no_cap(tmp_path):
    model = model_with_images(final_logit_softcapping=0.5)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.3)
    model.save_pretrained(tmp_path)
    want = torch_logits(torch_model(tmp_path))
    assert np.abs(want).max() > 0.5
    assert error_of(load_pretrained(str(tmp_path))(IDS), want) < 1e-4


@pytest.mark.parametrize("folder", ["as on the hub"], indirect=True)
def test_a_run_leaves_an_adapter_for_the_whole_model(folder, tmp_path, no_curves):
    del no_curves
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    write_tokenizer(model)
    write_rows(tmp_path / "train.jsonl", sums(16, 0))
    config = write_config(
        tmp_path / "config.yaml",
        tmp_path,
        adapter={"target_modules": ["q_proj", "down_proj"]},
        data={"validation": None},
        training={"max_steps": 2, "checkpoint_every": 0},
    )
    run = tmp_path / "run"
    code, _, err = invoke("train", config, "--workdir", run)
    assert code == 0, err
    assert [row["step"] for row in metrics_of(run)] == [1, 2]
    adapter = str(run / "adapter")
    ours = load_pretrained(str(model), adapter=adapter)(IDS)
    plain = torch_model(model)
    before = torch_logits(plain)
    theirs = peft.PeftModel.from_pretrained(plain, adapter).eval()
    assert error_of(before, torch_logits(theirs)) > 1e-2
    assert error_of(ours, torch_logits(theirs)) < 1e-4
    # The names are those that PEFT writes of this class, and none is of the images' tower.
    theirs.save_pretrained(tmp_path / "saved")
    wrote, saved = (
        set(load_file(place / "adapter_model.safetensors"))
        for place in (run / "adapter", tmp_path / "saved")
    )
    assert wrote == saved
    start = "base_model.model.model.language_model.layers."
    assert all(name.startswith(start) for name in wrote)
    merged = tmp_path / "merged"
    arguments = ["--workdir", run, "--out", merged, "--format", "merged"]
    code, _, err = invoke("export", config, *arguments)
    assert code == 0, err
    assert error_of(torch_logits(torch_model(merged)), torch_logits(theirs)) < 1e-4
    kept = {n: v for n, v in load_file(model / "model.safetensors").items() if "vision" in n}
    stored = load_file(merged / "model.safetensors")
    assert kept
    assert all(np.array_equal(stored[name], value) for name, value in kept.items())


def test_the_hubs_config_leaves_defaults_out():
    """As that of the 4B: ``text_config`` says what differs from the default."""
    text = {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
        "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }  # fmt: skip
    raw = {"model_type": "gemma3", "text_config": text, "vision_config": {}}
    got, want = read_config(raw, "config.json"), hf.Gemma3TextConfig(**text)
    assert (got.vocab_size, got.num_heads, got.num_kv_heads, got.head_dim) == (
        want.vocab_size, want.num_attention_heads, want.num_key_value_heads, want.head_dim
    )  # fmt: skip
    assert (got.rope.kind, got.rope.factor, got.rope.theta) == ("linear", 8.0, 1e6)
    assert got.local_rope.theta == 1e4
    assert got.sliding_layers[:6] == (True, True, True, True, True, False)
    assert got.tie_word_embeddings


def test_a_config_without_text_is_refused():
    with pytest.raises(InputError, match=r"config\.json: expected the key 'text_config', got none"):
        read_config({"model_type": "gemma3"}, "config.json")
    raw = {"model_type": "gemma3", "text_config": {"head_dim": "x"}}
    with pytest.raises(InputError, match=r"config\.json, text_config: expected head_dim"):
        read_config(raw, "config.json")
