"""The same run on every mesh, and every array where the table says."""

import json
import math
import re

import numpy as np
import pytest

from tests.run import workers
from tests.run.conftest import settings
from tests.tiny_run import (
    LINEAR,
    VOCAB_SIZE,
    metrics_of,
    random_weights,
    write_config,
    write_inputs,
    write_model,
)

SIZES = {
    "8x1x1": {"data": 8, "fsdp": 1, "tensor": 1},
    "2x4x1": {"data": 2, "fsdp": 4, "tensor": 1},
    "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2},
    "1x2x2, sequence 2": {"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2},
}
ONE = {"data": 1, "fsdp": 1, "tensor": 1}

# Mesh axes of each dimension, by hand: [L, in, out] kernels split their width over fsdp and sequence
# and their heads, inner width or vocabulary over tensor; whatever is small is on every device. The
# one long axis of an adapter's factor is split over all three where it is no width.
WIDE, ALL = ["fsdp", "sequence"], ["tensor", "fsdp", "sequence"]
INWARD = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
)
OUTWARD = ("self_attn.o_proj", "mlp.down_proj")
FROZEN = {
    "embed_tokens.embedding": ["tensor", WIDE],
    "lm_head.embedding": ["tensor", WIDE],
    "norm.scale": [None],
    "layers.input_layernorm.scale": [None, None],
    "layers.post_attention_layernorm.scale": [None, None],
    **{f"layers.{name}.kernel": [None, WIDE, "tensor"] for name in INWARD},
    **{f"layers.{name}.kernel": [None, "tensor", WIDE] for name in OUTWARD},
}
FACTORS = {
    **{f"layers.{name}.{{}}_a": [None, WIDE, None] for name in INWARD},
    **{f"layers.{name}.{{}}_b": [None, None, ALL] for name in INWARD},
    **{f"layers.{name}.{{}}_a": [None, ALL, None] for name in OUTWARD},
    **{f"layers.{name}.{{}}_b": [None, None, WIDE] for name in OUTWARD},
}
ADAPTERS = {name.format("lora"): axes for name, axes in FACTORS.items()}
ORIGIN = {
    **{name.format("origin"): axes for name, axes in FACTORS.items()},
    **{f"layers.{name}.lora_scale": [None] for name in LINEAR},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache_folder):
    """Five steps on each mesh, a run that changes its mesh half-way, and two bad meshes."""
    folder = tmp_path_factory.mktemp("meshes")
    inputs = write_inputs(folder / "inputs", rows=40)
    write_model(folder / "odd", vocab_size=46, tensors=_with_vocabulary(46))
    config = write_config(
        folder / "config.yaml",
        inputs,
        training={"max_steps": 5, "batch_size": 16, "checkpoint_every": 0},
    )

    def train(name, mesh, *more, workdir=None, **overrides):
        sizes = {f"mesh.{axis}": size for axis, size in mesh.items()}
        run = ["train", config, "--workdir", str(folder / (workdir or name)), *more]
        return run + settings({**sizes, **overrides}), str(folder / f"{name}.json")

    scored = {"eval.task": "exact_match"}
    one = [train("1x1x1", ONE, **scored)]
    eight = [
        train(name, mesh, **(scored if "sequence" in mesh else {})) for name, mesh in SIZES.items()
    ]
    eight += [
        train("first half", SIZES["8x1x1"], workdir="moved", **{"training.stop_at": 3}),
        train("second half", SIZES["2x2x2"], "--resume", workdir="moved"),
        train(
            "odd axis",
            {"data": 1, "fsdp": 1, "tensor": 8},
            **{"model.name_or_path": folder / "odd"},
        ),
        train("odd batch", SIZES["8x1x1"], **{"training.accumulation": 4}),
        train(
            "odd row",
            {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 8},
            **{"data.packing": True, "data.max_length": 20},
        ),
    ]
    logs = {devices: folder / f"{devices}.log" for devices in (1, 8)}
    processes = [
        workers.start(workers.commands, wanted, str(logs[devices]), str(cache_folder), devices)
        for devices, wanted in ((8, eight), (1, one))
    ]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0], logs[8].read_text()
    return folder


def _with_vocabulary(size):
    return {
        name: np.ascontiguousarray(value[:size]) if len(value) == VOCAB_SIZE else value
        for name, value in random_weights().items()
    }


def result(runs, name):
    return json.loads((runs / f"{name}.json").read_text())


@pytest.mark.parametrize("workdir", [*SIZES, "moved"])
def test_losses_do_not_depend_on_the_mesh(runs, workdir):
    expected, found = metrics_of(runs / "1x1x1"), metrics_of(runs / workdir)
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5]
    assert expected[-1]["consistency"] > 1e-3  # the terms are at work
    assert expected[-1]["loss"] != expected[-1]["task_loss"]
    for name in ("loss", "task_loss", "consistency", "diversity", "spectral", "grad_norm"):
        np.testing.assert_allclose(
            [row[name] for row in found],
            [row[name] for row in expected],
            rtol=1e-5 if name == "loss" else 1e-4,
            atol=1e-6,
            err_msg=name,
        )


def test_answers_do_not_depend_on_the_split_of_tokens(runs):
    """The scores before and after, from weights on the mesh, with the first answer's own words."""
    one, eight = (
        re.findall(r"^(?:before|after): exact match .*", (runs / log).read_text(), re.MULTILINE)
        for log in ("1.log", "8.log")
    )
    assert [line.split(":")[0] for line in one] == ["before", "after"]
    assert one[0].split(": ", 1)[1] != one[1].split(": ", 1)[1]  # training changed the answer
    assert eight == one


@pytest.mark.parametrize("name", ["1x1x1", *SIZES])
@pytest.mark.parametrize(
    ("group", "table"), [("frozen", FROZEN), ("adapters", ADAPTERS), ("origin", ORIGIN)]
)
def test_every_array_lies_as_declared(runs, name, group, table):
    found = result(runs, name)["layouts"][group]
    assert {path: leaf["axes"] for path, leaf in found.items()} == {
        f"['{path}']": axes for path, axes in table.items()
    }


@pytest.mark.parametrize("name", ["1x1x1", *SIZES])
def test_the_optimizer_state_lies_as_its_adapters(runs, name):
    found = result(runs, name)["layouts"]["opt_state"]
    moments = {path: leaf for path, leaf in found.items() if "lora_" in path}
    assert len(moments) == 2 * len(ADAPTERS)
    for path, leaf in moments.items():
        adapter = path.rpartition("['")[2].removesuffix("']")
        assert leaf["axes"] == ADAPTERS[adapter], path
    counters = [leaf for path, leaf in found.items() if path not in moments]
    assert counters
    assert all(leaf["shape"] == [] and leaf["axes"] == [] for leaf in counters)


@pytest.mark.parametrize("name", SIZES)
def test_a_device_holds_its_part_and_no_more(runs, name):
    for leaves in result(runs, name)["layouts"].values():
        for path, leaf in leaves.items():
            axes = [axis if isinstance(axis, list) else [axis] for axis in leaf["axes"]]
            sizes = {"sequence": 1, **SIZES[name], None: 1}
            parts = [math.prod(sizes[axis] for axis in group) for group in axes]
            assert [n * p for n, p in zip(leaf["local"], parts, strict=True)] == leaf["shape"], path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("odd axis", "balora: mesh.tensor: expected a divisor of 46, an axis of "),
        (
            "odd batch",
            "balora: training.batch_size: expected batch_size / accumulation to be a multiple of "
            "mesh.data x mesh.fsdp x mesh.expert = 8, got 4.",
        ),
        (
            "odd row",
            "balora: data.max_length: expected a multiple of mesh.sequence = 8, got 20: tokens of "
            "a row are split evenly. Change one of them.",
        ),
    ],
)
def test_what_does_not_divide_is_refused(runs, name, message):
    assert result(runs, name)["code"] == 2
    assert message in (runs / "8.log").read_text()
    assert not (runs / name).exists()
