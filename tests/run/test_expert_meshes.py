"""Experts spread over devices: the run, the files and the bytes are those of one device."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from balora_jax.config_file import parse_config
from balora_jax.errors import InputError
from balora_jax.models.weight_names import WeightRule
from balora_jax.parallel import sharding
from balora_jax.plan import arguments, compiled, search
from balora_jax.plan.targets import parse_target
from balora_jax.tasks.text.program import text_program
from tests.run import expert_program, workers
from tests.run.conftest import settings
from tests.tiny_run import (
    INNER,
    LINEAR,
    MODEL,
    WIDTH,
    metrics_of,
    random_weights,
    write_config,
    write_inputs,
    write_model,
)

EXPERTS, LAYERS = 4, 2
MIXTRAL = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "head_dim": 4,
}
TERMS = {"consistency": 0.0, "diversity": 0.0, "spectral": 0.0}


def mixtral_tensors():
    """Weights of a Mixtral by their names there, each matrix of its own."""
    rng = np.random.default_rng(5)
    tensors = {name: value for name, value in random_weights().items() if ".mlp." not in name}
    for i in range(LAYERS):
        block = f"model.layers.{i}.block_sparse_moe"
        shapes = {f"{block}.gate": (EXPERTS, WIDTH)}
        for e in range(EXPERTS):
            for name, shape in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
                shapes[f"{block}.experts.{e}.{name}"] = LINEAR[f"mlp.{shape}_proj"]
        for name, shape in shapes.items():
            tensors[f"{name}.weight"] = (0.3 * rng.standard_normal(shape)).astype(np.float32)
    return tensors


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache_folder):
    """Four steps on two devices with all experts on both; the same with experts spread at times.

    A checkpoint of spread experts goes on where they are whole, and the reverse.
    """
    folder = tmp_path_factory.mktemp("experts")
    inputs = write_inputs(folder / "inputs", rows=16)
    write_model(folder / "llama")
    shutil.rmtree(inputs / "model")
    write_model(inputs / "model", tensors=mixtral_tensors(), **MIXTRAL)
    config = write_config(
        folder / "config.yaml",
        inputs,
        adapter={"target_modules": ["w1", "w2"], "rank_pattern": {"3.w1": 1}, "start": "lora"},
        regularizers=TERMS,
        training={"max_steps": 4, "batch_size": 4, "checkpoint_every": 0},
        eval={"task": "none"},
    )

    def train(name, mesh, *more, workdir=None, **overrides):
        sizes = {f"mesh.{axis}": size for axis, size in mesh.items()}
        run = ["train", config, "--workdir", str(folder / (workdir or name)), *more]
        return run + settings(sizes | overrides), str(folder / f"{name}.json")

    whole, spread = {"data": 2}, {"data": 1, "expert": 2}
    wanted = [
        train("whole", whole),
        train("first", spread, workdir="moved", **{"training.stop_at": 1}),
        train("second", whole, "--resume", workdir="moved", **{"training.stop_at": 2}),
        train("third", spread, "--resume", workdir="moved"),
        train("no experts", spread, **{"model.name_or_path": folder / "llama"}),
    ]
    log = folder / "2.log"
    process = workers.start(workers.commands, wanted, str(log), str(cache_folder), 2)
    process.join()
    assert process.exitcode == 0, log.read_text()
    return folder


def test_losses_and_exports_are_those_of_whole_stacks(runs):
    one, two = metrics_of(runs / "whole"), metrics_of(runs / "moved")
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose([r[name] for r in two], [r[name] for r in one], rtol=2e-5)
    expected, found = (
        load_file(runs / name / "adapter" / "adapter_model.safetensors")
        for name in ("whole", "moved")
    )
    assert expected.keys() == found.keys()
    assert sum(".experts." in name for name in found) == 2 * 2 * LAYERS * EXPERTS
    moved = 0.0
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=2e-5, err_msg=name)
        moved = max(moved, np.abs(value).max())
    assert moved > 1e-2


def test_a_model_without_experts_has_none_to_spread(runs):
    found = json.loads((runs / "no experts.json").read_text())
    assert (
        "mesh.expert: expected 1 for a model without experts, got 2. Set it to 1."
        in str(found) + (runs / "2.log").read_text()
    )
    assert not (runs / "no experts").exists()


@pytest.mark.parametrize(("groups", "order"), [(1, "00 01 02 03 10 11 12 13"), (2, "00 01 10 11 02 03 12 13")])  # fmt: skip
def test_experts_of_a_device_lie_together(groups, order):
    rule = WeightRule("a", "{i}{e}", True, 4, 0, groups)
    assert " ".join(rule.names(8)) == order


def program(tmp_path, sizes, quantization="none"):
    (tmp_path / "config.json").write_text(json.dumps(MODEL | MIXTRAL | {"vocab_size": 48}))
    tree = {
        "model": {"name_or_path": str(tmp_path), "quantization": quantization},
        "adapter": {"rank": 2, "start": "lora", "target_modules": "all-linear"},
        "data": {"train": "unread", "max_length": 16},
        "training": {"max_steps": 4, "batch_size": 12},
    }
    base = arguments.shapes_only(str(tmp_path))
    mesh = search.abstract_mesh([sizes.get(axis, 1) for axis in sharding.AXES])
    return text_program(parse_config(tree, "here"), base.config, mesh)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_device_holds_its_own_experts_alone(tmp_path, quantization):
    """By hand: three matrices an expert, half of the experts on each of two devices."""
    state, constants, *_ = arguments.abstract_arguments(
        program(tmp_path, {"expert": 2}, quantization), 4
    )
    held = {p: v for p, v in constants.frozen.items() if ".experts." in p}
    wide = 3 * LAYERS * EXPERTS // 2
    scales = 4 * LAYERS * EXPERTS // 2 * (2 * INNER + WIDTH)
    wanted = wide * WIDTH * INNER * 4 if quantization == "none" else wide * WIDTH * INNER + scales
    assert compiled.local_bytes(held) == wanted
    factors = {p: v for p, v in state.adapters.items() if ".experts." in p}
    assert compiled.local_bytes(factors) == wide * 2 * (WIDTH + INNER) * 4


def test_experts_that_do_not_divide_are_refused(tmp_path):
    message = (
        "mesh.expert: expected a divisor of the 4 experts of a layer, got 3. Choose another size."
    )
    with pytest.raises(InputError) as error:
        program(tmp_path, {"expert": 3})
    assert str(error.value) == message


@pytest.mark.parametrize(("case", "mesh"), expert_program.PAIRS)
def test_a_step_equals_that_of_one_device(steps, case, mesh):
    seen = steps[f"{case} / {mesh}"]
    assert seen["values"] < 2e-5
    assert seen["updates"] < 5e-5
    assert seen["smallest update"] > 1e-3
    assert seen["same frozen"]
    assert seen["elsewhere"] == []
    sizes = expert_program.MESHES[mesh]
    assert seen["share"] == np.prod([size for axis, size in sizes.items() if axis != "data"])
    assert min(abs(value) for value in seen["terms"].values()) > 1e-2


@pytest.fixture(scope="module")
def steps():
    return expert_program.found()


def test_the_search_spreads_experts_where_they_divide(tmp_path):
    """And each device then holds less; a model without experts has no such layout."""
    made = program(tmp_path, {})
    space = search.Space(made.config, made.decoder, parse_target("cpu:4"))
    found = {layout.settings["mesh.expert"] for layout in space.layouts}
    assert found == {1, 2, 4}
    by_size = {}
    for layout in space.layouts:
        sizes = dict(zip(sharding.AXES, layout.sizes, strict=True))
        assert np.prod(layout.sizes) == 4
        if sizes["fsdp"] == sizes["tensor"] == sizes["sequence"] == 1 == layout.accumulation:
            by_size[sizes["expert"], layout.remat] = layout.memory
    assert by_size[4, "none"] < by_size[2, "none"] < by_size[1, "none"]
    assert {layout.sizes[2] for layout in _without_experts(made).layouts} == {1}


def _without_experts(made):
    decoder = replace(made.decoder, model_type="llama", experts=0, experts_per_token=0)
    tree = made.config.model_dump(mode="json")
    return search.Space(parse_config(tree, "here"), decoder, parse_target("cpu:4"))
