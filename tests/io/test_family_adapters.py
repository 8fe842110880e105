"""Adapters of single families: ours in PEFT, PEFT's in ours, and the names in both files."""

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from balora_jax.io.peft_writer import export_peft
from balora_jax.models.adapters import plan_adapters
from balora_jax.models.families.base import weight_rules
from balora_jax.models.structure import structure
from balora_jax.models.weight_names import linear_shapes
from balora_jax.pretrained.load import load_pretrained
from tests.models.tiny_families import FAMILIES

IDS = np.random.default_rng(1).integers(3, 48, (2, 11))
# Layers of attention, and of the MLP or of every expert.
TARGETS = {
    "smollm3": ["q_proj", "o_proj", "down_proj"],
    "granite": ["v_proj", "gate_proj"],
    "qwen3_moe": ["k_proj", "gate_proj", "up_proj", "down_proj"],
}


@pytest.fixture(scope="module", params=TARGETS)
def stored(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "model"
    FAMILIES[request.param]().save_pretrained(folder)
    return request.param, folder


def base(folder):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def error_of(got, want):
    return np.abs(np.asarray(got) - want).max() / np.ptp(want)


def ours_with_random_factors(folder, targets, out):
    """Write an adapter of rank 3 on these layers, and return the names of its tensors."""
    config = load_pretrained(str(folder)).config
    linears = linear_shapes(weight_rules(config), structure(config).frozen)
    modules = plan_adapters(linears, rank=3, alpha=5.0, target_modules=targets)
    rng, factors = np.random.default_rng(2), {}
    for shape in linears:
        if any(module.path == shape.path for module in modules):
            sizes = {"a": (shape.in_features, 3), "b": (3, shape.out_features)}
            for side, size in sizes.items():
                value = 0.2 * rng.standard_normal((len(shape.names), *size))
                factors[f"{shape.path}.lora_{side}"] = value.astype(np.float32)
    export_peft(out, modules=modules, adapters=factors, origin={}, base_name=str(folder))
    return set(load_file(out / "adapter_model.safetensors"))


# peft fuses the experts' gate and up, and says so of the pattern that it makes of ours.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.filterwarnings("error:.*missing adapter keys:UserWarning")
def test_peft_computes_our_logits(stored, tmp_path):
    name, folder = stored
    names = ours_with_random_factors(folder, TARGETS[name], tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base(folder), str(tmp_path / "adapter")).eval()
    want = torch_logits(theirs)
    got = load_pretrained(str(folder), adapter=str(tmp_path / "adapter"))(IDS)
    assert error_of(torch_logits(base(folder)), want) > 1e-2
    assert error_of(got, want) < 1e-4
    # Its own file of the same adapter has the same names, but for experts, which it keeps fused.
    theirs.save_pretrained(tmp_path / "saved")
    saved = set(load_file(tmp_path / "saved" / "adapter_model.safetensors"))
    assert {key for key in names if ".experts." not in key} == {
        key for key in saved if ".experts." not in key
    }


def test_ours_computes_the_logits_of_an_adapter_of_peft(stored, tmp_path):
    name, folder = stored
    targets = [target for target in TARGETS[name] if name != "qwen3_moe" or target == "k_proj"]
    torch.manual_seed(3)
    options = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False)
    theirs = peft.get_peft_model(base(folder), options).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    want = torch_logits(theirs)
    assert error_of(torch_logits(base(folder)), want) > 1e-2
    got = load_pretrained(str(folder), adapter=str(tmp_path / "adapter"))(IDS)
    assert error_of(got, want) < 1e-4
