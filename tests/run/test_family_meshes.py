"""New families, methods and codes on eight devices: the same step as on one, and a row for all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from balora_jax.models.adapters import adapter_shapes, plan_adapters
from balora_jax.models.families.base import read_config, weight_rules
from balora_jax.models.methods import METHODS
from balora_jax.models.structure import structure
from balora_jax.models.weight_names import linear_shapes
from balora_jax.parallel import sharding
from tests.models import tiny_encoders
from tests.models.tiny_families import FAMILIES
from tests.run import mesh_program

# Widths that blocks of nf4 divide, in every family's names.
WIDE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
WIDE_GPT2 = {"n_embd": 64, "n_inner": 128}
WIDE_ENCODER = {"hidden_size": 64, "intermediate_size": 128}
ENCODERS = {
    "bert": tiny_encoders.bert,
    "roberta": tiny_encoders.roberta,
    "deberta": tiny_encoders.deberta,
    "distilbert": tiny_encoders.distilbert,
    "modernbert": tiny_encoders.modernbert,
}


def places():
    """The partition of every array of every family, as a table of patterns had it before."""
    text = (Path(__file__).parent / "places.json").read_text(encoding="utf-8")
    return {
        path: tuple(tuple(axes) if isinstance(axes, list) else axes for axes in json.loads(spec))
        for spec, paths in json.loads(text).items()
        for path in paths
    }


PLACES = places()


@pytest.fixture(scope="module")
def found():
    done = subprocess.run(
        [sys.executable, "-m", "tests.run.mesh_program"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize(("case", "mesh"), mesh_program.PAIRS)
def test_a_step_equals_that_of_one_device(found, case, mesh):
    kind = mesh_program.CASES[case][2]
    if kind != "none":
        pytest.importorskip("qwix")
    seen = found[f"{case} / {mesh}"]
    assert seen["values"] < 2e-5
    assert seen["updates"] < 2e-5
    assert seen["smallest update"] > 1e-3
    assert seen["same frozen"]
    assert seen["elsewhere"] == []
    assert seen["codes"] == {"none": [], "int8": ["int8"], "nf4": ["uint8"]}[kind]
    # Every term is at work, so none of them is equal for want of anything to compute.
    assert min(abs(value) for value in seen["terms"].values()) > 1e-2


def test_held_out_figures_equal_those_of_one_device(found):
    """Packed in other rows, with a last micro-batch that is not full."""
    one, mesh = found["validation"]
    assert set(one) == {"loss", "perplexity", "consistency", "diversity", "spectral"}
    assert mesh == pytest.approx(one, rel=2e-5)
    assert min(abs(value) for value in one.values()) > 1e-2


@pytest.mark.parametrize("pair", [pair for pair in mesh_program.PAIRS if pair[0] == "llama, long"])
def test_only_keys_and_values_are_gathered_over_tokens(found, pair):
    """No other array of a device grows to the whole row, nor to the rows of others.

    Dimensions of this model are chosen so that 12 is T and 24, 48, 96 are tokens of a device, of a
    row of devices, and of all.
    """
    shapes = {tuple(shape) for shape in found[" / ".join(pair)]["exchanged"]}
    assert (4, 12, 2, 16) in shapes  # [B/fsdp, T, G, K]
    tokens = {shape for shape in shapes if {12, 24, 48, 96} & set(shape)}
    assert tokens <= {(4, 12, 2, 16), (4, 2, 12, 16), (4, 2, 16, 12)}  # and their gradients
    assert not any(len(shape) > 2 for shape in shapes - tokens)  # the rest is weights


@pytest.fixture(scope="module", params=[*FAMILIES, *ENCODERS])
def family(request):
    """From options to the structure of a family's model with every layer adapted, and its layers."""
    name = request.param
    if name in ENCODERS:
        config = ENCODERS[name](**WIDE_ENCODER).config.to_dict()
        config = read_config(config, "config.json", num_labels=3)
        build, rules = structure, weight_rules(config)
    else:
        torch_model = FAMILIES[name](**(WIDE_GPT2 if name == "gpt2" else WIDE))
        config = read_config(torch_model.config.to_dict(), "config.json")
        build, rules = structure, weight_rules(config)
    linears = linear_shapes(rules, build(config).frozen)

    def make(method, quantization):
        modules = plan_adapters(
            linears, rank=2, alpha=2.0, target_modules="all-linear", method=METHODS[method]
        )
        adapters = adapter_shapes(modules, origin=True)
        return build(config, adapters=adapters, quantization=quantization)

    return make, [shape.path for shape in linears]


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
@pytest.mark.parametrize("method", ["lora", "dora", "lora_fa"])
def test_every_array_lies_where_it_lay_before_axes_stood_with_shapes(family, method, quantization):
    make, layers = family
    made = make(method, quantization)
    groups = [made.frozen, made.adapters, made.origin, made.head]
    arrays = {path: leaf for group in groups for path, leaf in group.items()}
    assert set(made.axes) == set(arrays)
    axes = {path: tuple(sharding.spec_of(path, made.axes[path])) for path in arrays}
    assert axes == {path: PLACES[path] for path in arrays}
    for path, leaf in arrays.items():
        assert len(axes[path]) == len(leaf.shape), path
        used = [axis for entry in axes[path] for axis in (entry if isinstance(entry, tuple) else [entry])]  # fmt: skip
        assert len([axis for axis in used if axis]) == len({axis for axis in used if axis}), path
    width = ("fsdp", "sequence")
    whole = {"tensor": ("tensor", *width), width: width}
    for layer in layers:
        _, d_in, d_out = axes[f"{layer}.kernel"]
        assert {d_in, d_out} == {"tensor", width}, layer
        frozen_a = method == "lora_fa"
        assert f"{layer}.lora_a" in (made.origin if frozen_a else made.adapters)
        stack = "expert" if ".experts." in layer else None
        expected = {
            "lora_a": (stack, whole[d_in], None),
            "lora_b": (stack, None, whole[d_out]),
            "origin_a": (stack, whole[d_in], None),
            "origin_b": (stack, None, whole[d_out]),
            "lora_magnitude": (stack, whole[d_out]),
            "origin_norm": (stack, whole[d_out]),
            "lora_scale": (stack,),
            "kernel_scale": (stack, d_in, d_out),
        }
        leaves = {path.rpartition(".")[2] for path in arrays if path.startswith(f"{layer}.")}
        assert {"lora_b", "origin_b", "lora_scale"} <= leaves
        assert ("lora_magnitude" in leaves) == ("origin_norm" in leaves) == (method == "dora")
        for leaf in leaves - {"kernel", "bias"}:
            assert axes[f"{layer}.{leaf}"] == expected[leaf], (layer, leaf)
    held = {path for path in made.frozen if path.endswith(".kernel_scale")}
    quantised = {f"{layer}.kernel_scale" for layer in layers}
    assert held == (set() if quantization == "none" else quantised)
