"""`balora plan`: bytes by kind, the search over layouts, times, messages, and the real memory."""

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest

from balora_jax import cli
from balora_jax.config_file import parse_config
from balora_jax.errors import InputError
from balora_jax.figures import planned_memory
from balora_jax.parallel import sharding
from balora_jax.plan import arguments, compiled, search
from balora_jax.plan import report as plan_report
from balora_jax.plan import run as planning
from balora_jax.plan.targets import Target, parse_target
from balora_jax.tasks import flops
from balora_jax.tasks.text.program import text_program
from tests.bench.test_bench import SHAPE

V, D, F, H, G, K, L, R = 160, 32, 48, 4, 2, 8, 2, 4
MODEL = SHAPE | {
    "vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_attention_heads": H,
    "num_key_value_heads": G, "num_hidden_layers": L,
}  # fmt: skip
# [in, out] of every adapted layer: those that read the width, and those that write it.
INWARD = {"q": (D, H * K), "k": (D, G * K), "v": (D, G * K), "gate": (D, F), "up": (D, F)}
OUTWARD = {"o": (H * K, D), "down": (F, D)}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    (folder / "config.json").write_text(json.dumps(MODEL))
    return {
        "model": {"name_or_path": str(folder), "dtype": "bfloat16"},
        "adapter": {"start": "pissa", "rank": R},
        "regularizers": {"top_k": 5, "k": 3},
        "data": {"train": "balora_jax:quickstart/train.jsonl", "max_length": 16},
        "training": {"max_steps": 10, "batch_size": 8},
    }


@pytest.fixture(scope="module")
def decoder(tree):
    return arguments.shapes_only(tree["model"]["name_or_path"]).config


def padded(sizes):
    """Sizes of data, fsdp and tensor; any other axis has one device."""
    named = dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    return tuple(named.get(axis, 1) for axis in sharding.AXES)


def program_on(tree, decoder, sizes, **changes):
    config = parse_config({**tree, **changes}, "here")
    return text_program(config, decoder, search.abstract_mesh(padded(sizes)))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (1, 4, 1)])
def test_bytes_by_kind_by_hand(tree, decoder, sizes):
    """Every part of the mesh that splits an array divides its bytes; small arrays lie whole."""
    data, fsdp, tensor = sizes
    both = {**INWARD, **OUTWARD}
    kernels = sum(a * b for a, b in both.values()) * L / (fsdp * tensor)
    tables = 2 * V * D / (fsdp * tensor)
    norms = (2 * L + 1) * D
    # A factor's long axis is split over fsdp where it is the width, else over tensor and fsdp.
    factors = L * R * sum(
        a / fsdp + b / (fsdp * tensor) for a, b in INWARD.values()
    ) + L * R * sum(a / (fsdp * tensor) + b / fsdp for a, b in OUTWARD.values())  # fmt: skip
    scales = 7 * L
    rows = 8 / (data * fsdp)
    found = compiled.held_bytes(arguments.abstract_arguments(program_on(tree, decoder, sizes), 10))
    assert found["frozen"] == 2 * (kernels + tables + norms)
    assert found["adapters"] == 4 * factors
    assert found["origin"] == 2 * factors + 4 * scales
    # Two moments, what the guard remembers of 128 steps with its three counters, and the counters
    # of the step: its own, Adam's and the schedule's.
    remembered = 2 * 4 * 128 + 3 * 4
    assert found["optimizer"] == pytest.approx(2 * 4 * factors + remembered, abs=12)
    assert found["optimizer"] > 2 * 4 * factors
    assert found["batch"] == 4 * rows * 16 * 4 + 8
    assert found["head_factor"] == 4 * D * D


def test_no_factor_and_no_origin_where_nothing_reads_them(tree, decoder):
    program = program_on(
        tree, decoder, (1, 1, 1), adapter={"start": "lora", "rank": R},
        regularizers={"consistency": 0.0, "diversity": 0.0, "spectral": 0.0},
    )  # fmt: skip
    found = compiled.held_bytes(arguments.abstract_arguments(program, 10))
    assert found["head_factor"] == 0
    assert found["origin"] == 4 * 7 * L


def test_recomputed_flops_by_hand(tree, decoder):
    tokens = 3 * 16
    linear = L * sum(a * b for a, b in {**INWARD, **OUTWARD}.values())
    adapters = L * R * sum(a + b for a, b in {**INWARD, **OUTWARD}.values())
    attention = 2 * 2 * L * H * K * 16 * tokens / 2
    expected = {"none": 0, "dots": attention, "full": 2 * linear * tokens
                + 2 * 2 * adapters * tokens + attention}  # fmt: skip
    program = program_on(tree, decoder, (1, 1, 1))
    for remat, number in expected.items():
        assert flops.recomputed_flops(program, (1, 3, 16), remat) == number


def row_of(**changes):
    memory = {"arguments": 100, "temporaries": 300, "output": 0, "total": 400}
    row = {
        "case": "a plan", "does_not_fit": None, "bytes_per_device": memory, "devices": 4,
        "model_flops": 8e12, "recomputed_flops": 4e12, "flops_per_device": 2e12,
        "traffic": 10**9, "batch": [2, 4, 16],
        "sent": sent(2 * 10**8),
    }  # fmt: skip
    return row | changes


def sent(size):
    return {"bytes": size, "between_hosts": 0}


FAST = dataclasses.replace(
    parse_target("v5e:2x2").accelerator, memory=1000, bandwidth=1e11, link=1e10
)
TARGET = Target("v5e:2x2", "tpu", 4, 1000, FAST)


def test_times_by_hand():
    row = planning.judged(row_of(), TARGET, 0.5)
    compute = 12e12 / 4 / 197e12
    assert row["seconds"]["compute"] == pytest.approx(compute)
    assert row["seconds"]["memory"] == pytest.approx(0.01)
    assert row["seconds"]["links"] == pytest.approx(0.02)
    assert row["seconds"]["bound"] == pytest.approx(0.02)
    assert row["seconds"]["apart"] == pytest.approx(0.03 + compute)
    assert row["seconds"]["expected"] == pytest.approx(2 * compute)
    assert row["tokens_per_second"] == pytest.approx(2 * 4 * 16 / (2 * compute))
    assert row["mfu"] == pytest.approx(0.5 * 2 / 3)
    assert (row["fits"], row["spare"]) == (True, 600)
    slow_links = planning.judged(row_of(sent=sent(10**9)), TARGET, 0.5)
    assert slow_links["seconds"]["expected"] == pytest.approx(0.1)


def test_the_ranking_puts_what_fits_first():
    """The fastest does not fit, one needs an unknown amount, and recomputation costs a place."""
    large = {"arguments": 100, "temporaries": 1000, "output": 0, "total": 1100}
    rows = {
        "too large": row_of(bytes_per_device=large, recomputed_flops=0.0),
        "refused": row_of(bytes_per_device=None, does_not_fit="2G of 1G", sent=None, traffic=None),
        "remat": row_of(sent=sent(0)),
        "dots": row_of(sent=sent(0), recomputed_flops=1e12),
        "many bytes": row_of(sent=sent(10**9)),
    }
    judged = [
        planning.judged(row | {"case": name, "settings": {"model.remat": name}}, TARGET, 0.4)
        for name, row in rows.items()
    ]
    found = [row["case"] for row in planning.ranked(judged)]
    assert found[:3] == ["dots", "remat", "many bytes"]
    assert set(found[3:]) == {"too large", "refused"}
    assert planning.best_settings(planning.ranked(judged)) == "model.remat=dots"
    assert planning.best_settings(planning.ranked(judged[:2])) is None


def test_work_and_bytes_rank_where_no_speed_is_known():
    target = Target("cpu:4", "cpu", 4, 1000, None)
    rows = [planning.judged(row_of(case=f"{n}", sent=sent(n)), target, 0.4) for n in (7, 3)]
    assert rows[0]["seconds"] is None
    assert [row["case"] for row in planning.ranked(rows)] == ["3", "7"]


def test_the_search_learns_from_what_it_compiled(tree, decoder):
    config = parse_config(tree, "here")
    space = search.Space(config, decoder, parse_target("v5e:2x2"))
    first = space.next([], 8)
    assert first.cost == min(layout.cost for layout in space.layouts)
    no = {"does_not_fit": "9G of 1G", "bytes_per_device": None}
    small = {"does_not_fit": None, "bytes_per_device": {"total": 10}}
    second = space.next([(first, no)], 8)
    assert (second.sizes, second.remat) != (first.sizes, first.remat)
    assert not second.needs_no_less(first)
    # Where all fits that can be kept, only other meshes are left to try.
    kept = [one for one in space.layouts if one.sizes == first.sizes and one.remat == "none"]
    whole = min(kept, key=lambda one: one.accumulation)
    assert whole.accumulation == 1
    assert space.next([(whole, small)], 8).sizes != first.sizes
    # Of those that do not fit, the smallest after half of the trials.
    smallest = min(space.layouts, key=lambda one: one.memory)
    assert space.next([(first, no)], 2).memory == smallest.memory
    meshes = {layout.sizes for layout in space.layouts}
    assert meshes == {
        padded((data, fsdp, tensor)) for data in (1, 2, 4) for fsdp in (1, 2, 4) for tensor in (1, 2)
        if data * fsdp * tensor == 4
    }  # fmt: skip
    for layout in space.layouts:
        rows = config.training.batch_size // layout.accumulation
        assert rows % (layout.sizes[0] * layout.sizes[1]) == 0


def test_a_lower_bound_is_below_what_the_compiler_takes(figures):
    for row in figures["rows"]:
        assert row["estimate"] <= row["bytes_per_device"]["total"]


@pytest.fixture(scope="module")
def figures(tree, tmp_path_factory):
    """A search over four virtual devices by the command line, two compilations."""
    folder = tmp_path_factory.mktemp("plan")
    few = {
        "adapter": {**tree["adapter"], "target_modules": ["q_proj", "down_proj"]},
        "regularizers": {**tree["regularizers"], "spectral": 0.0},
    }
    (folder / "tiny.yaml").write_text(json.dumps(tree | few))
    arguments = ["plan", str(folder / "tiny.yaml"), "--topology", "cpu:4", "--mesh", "auto",
                 "--candidates", "2", "--json", str(folder / "plan.json"),
                 "--picture", str(folder / "plan.png")]  # fmt: skip
    assert cli.main(arguments) == 0
    assert (folder / "plan.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    return json.loads((folder / "plan.json").read_text())


def test_kinds_add_up_to_the_compilers_total(figures):
    for row in figures["rows"]:
        kinds, memory = row["bytes_by_kind"], row["bytes_per_device"]
        assert sum(kinds.values()) == memory["total"]
        assert set(kinds) == {*compiled.HELD, "padding", "head", "activations", "output"}
        assert 0 < kinds["head"] <= memory["temporaries"]
        assert min(kinds.values()) >= 0
        # The compiler leaves out the key (two words), which only dropout reads.
        places = np.prod(row["batch"]) * row["mesh"]["tensor"] // 4
        assert kinds["batch"] == 4 * places * 4
        assert kinds["padding"] == 0
        assert row["devices"] == 4
        assert np.prod(list(row["mesh"].values())) == 4
        assert row["parameters"] == 2 * V * D + (2 * L + 1) * D + L * sum(
            a * b for a, b in {**INWARD, **OUTWARD}.values()
        )


def test_what_is_printed(figures, tree):
    config = parse_config(tree, "here")
    shown = plan_report.text(figures, config)
    assert "plan 1: " in shown
    assert "plan 2: " in shown
    assert f"best: --set {figures['best']}" in shown
    tables = [line for line in shown.splitlines() if line.startswith("| head (estimate)")]
    assert len(tables) == 1
    assert tables[0].count("|") == 4
    for setting in figures["best"].split():
        key, _, value = setting.partition("=")
        assert str(figures["rows"][0]["settings"][key]) == value
    other = dict(figures, rows=[figures["rows"][0] | {"accumulation": 2}, *figures["rows"][1:]])
    assert "another accumulation is another term" in plan_report.text(other, config)


def test_two_meshes_exchange_over_the_axes_they_have(figures):
    for row in figures["rows"]:
        wide = {axis for axis, size in row["mesh"].items() if size > 1}
        used = {axis for one in row["collectives"] for axis in one["axes"]}
        assert used
        assert used <= wide
        assert row["open_loops"] == 0


def test_a_step_that_is_too_large_is_a_result(tree):
    class Lowered:
        def __init__(self, message):
            self.message = message

        def compile(self, compiler_options):
            raise jax.errors.JaxRuntimeError(self.message)

    told = "the total memory required for HLO temporaries (25.90G) exceeds available HBM (15.75G)."
    assert compiled.compile_or_size(Lowered(told)) == (None, "25.90G of 15.75G")
    told = "Ran out of memory in memory space hbm. Used 25.9G of 15.7G hbm. Exceeded by 10G."
    assert compiled.compile_or_size(Lowered(told)) == (None, "25.9G of 15.7G")
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        compiled.compile_or_size(Lowered("something else"))
    row = planning.judged(
        row_of(does_not_fit="2G of 1G", bytes_per_device=None, collectives=None, sent=None, traffic=None,
               bytes_by_kind={"frozen": 7}, open_loops=None, compile_seconds=1.0,
               parameters=1, trainable=1, accumulation=2),
        TARGET, 0.4,
    )  # fmt: skip
    figures = {"rows": [row], "target": TARGET.summary, "model": "m", "rank": 1, "dtype": "d",
               "versions": {"jax": "0"}, "utilisation": 0.4, "ranked": True, "best": None}  # fmt: skip
    shown = plan_report.text(figures, parse_config(tree, "here"))
    assert "| fits | no: 2G of 1G |" in shown
    assert "none of the compiled plans fits." in shown


NO_TOPOLOGY = (
    "--topology: expected v4, v5e, v5p, v6e and a shape, such as v5e:4x4 or 2xv5e:4x4, GPUs (A100, "
    "A100-40GB, H100, H200, L4, A10G, T4), such as gpu:8xH100 or gpu:2x8xA100 (hosts x GPUs), "
    "gpu:8x48GB, cpu:8 or auto, got"
)


@pytest.mark.parametrize(
    ("words", "message"),
    {
        ("--topology", "v5e"): f"{NO_TOPOLOGY} 'v5e'. Correct it.",
        ("--topology", "cpu:0"): f"{NO_TOPOLOGY} 'cpu:0'. Correct it.",
        ("--topology", "cpu:1000000000"): f"{NO_TOPOLOGY} 'cpu:1000000000'. Correct it.",
        ("--topology", "gpu:8xB7"): f"{NO_TOPOLOGY} 'gpu:8xB7'. Correct it.",
        ("--topology", "gpu:0xH100"): f"{NO_TOPOLOGY} 'gpu:0xH100'. Correct it.",
        ("--topology", "gpu:2x2x8xA100"): f"{NO_TOPOLOGY} 'gpu:2x2x8xA100'. Correct it.",
        ("--topology", "gpu:16xH100"): "--topology: expected up to 8 H100 on a host, got 16 in "
        "'gpu:16xH100'. Write hosts x GPUs of a host, such as gpu:2x8xH100.",
        ("--mesh", "fsdp=²"): f"--mesh: expected auto or sizes of {', '.join(sharding.AXES)}, such "
        "as data=1,fsdp=16, got 'fsdp=²'. Correct it.",
        ("--mesh", "fsdp=--1"): f"--mesh: expected auto or sizes of {', '.join(sharding.AXES)}, "
        "such as data=1,fsdp=16, got 'fsdp=--1'. Correct it.",
        ("--mesh", "fdsp=4"): f"--mesh: expected auto or sizes of {', '.join(sharding.AXES)}, such "
        "as data=1,fsdp=16, got 'fdsp=4'. Correct it.",
        ("--mesh", "fsdp=64"): f"mesh: expected {' x '.join(sharding.AXES)} to be the 1 device(s) "
        f"there are, got {' x '.join(map(str, padded((1, 64, 1))))} = 64. Change them; -1 fills "
        "one in.",
        ("--candidates", "0"): "--candidates: expected at least 1, got 0. Raise it.",
        ("--utilisation", "40"): "--utilisation: expected a share above 0 and up to 1, got 40.0. "
        "Correct it.",
    }.items(),
    ids=str,
)
def test_messages(tree, tmp_path, capsys, words, message):
    config = tmp_path / "tiny.yaml"
    config.write_text(json.dumps(tree))
    assert cli.main(["plan", str(config), *words]) == 2
    assert capsys.readouterr().err == f"balora: {message}\n"


def test_messages_of_what_cannot_be_planned(tree, decoder):
    labels = parse_config(
        {"task": "labels", "model": {"name_or_path": "x"}, "data": {"glue": "rte"},
         "training": {"max_steps": 1}}, "here",
    )  # fmt: skip
    with pytest.raises(InputError) as error:
        planning.plan(labels)
    assert str(error.value) == (
        "plan: expected task text, got labels. An encoder fits one device: measure it with balora bench."
    )
    config = parse_config(tree, "here")
    tiny = dataclasses.replace(TARGET, memory=1000)
    with pytest.raises(InputError) as error:
        search.Space(config, decoder, tiny)
    smallest = str(error.value).partition("got at least ")[2].partition(".")[0]
    assert str(error.value) == (
        f"--mesh auto: expected a layout that fits 1000 bytes per device of v5e:2x2, got at least "
        f"{smallest}. Take more or larger devices."
    )
    assert int(smallest) > 1000
    with pytest.raises(InputError) as error:
        search.Space(config, decoder, parse_target("v5e:1x7"))
    assert str(error.value) == (
        "--mesh auto: expected a mesh of 7 devices that divides the model and batch_size 8, got "
        "none. Change the batch or the devices."
    )


def test_targets():
    v4 = parse_target("v4:2x2x1")
    assert (v4.devices, v4.chips, v4.peak) == (8, 4, 275e12 / 2)
    assert parse_target("v5p:4x4x8").summary["hosts"] == 32
    gpu = parse_target("gpu:8x80GB")
    assert (gpu.devices, gpu.memory, gpu.peak) == (8, 80 * 10**9, 989e12)
    assert "estimate by the CPU's compiler" in gpu.notes[0]
    assert parse_target("gpu:2x48GB").peak is None
    here = parse_target("auto")
    assert (here.devices, here.platform) == (jax.device_count(), "cpu")


def test_planned_memory_is_what_the_process_grows_by(tree, tmp_path):
    """One layer and a plain head, so that it compiles quickly and logits outweigh the rest."""
    (tmp_path / "config.json").write_text(
        json.dumps(MODEL | {"vocab_size": 2048, "num_hidden_layers": 1})
    )
    off = {"consistency": 0.0, "diversity": 0.0, "spectral": 0.0}
    small = tree | {
        "model": {"name_or_path": str(tmp_path)},
        "adapter": {"start": "lora", "rank": R},
        "regularizers": off,
        "training": {"max_steps": 10, "batch_size": 256, "head": "plain"},
        "data": {**tree["data"], "max_length": 64},
        "mesh": {"data": 1, "fsdp": 4},
    }
    (tmp_path / "small.yaml").write_text(json.dumps(small))
    found = planned_memory.measured_apart(str(tmp_path / "small.yaml"), ["training.seed=1"], 4)
    assert found["planned"]["total"] > 250 * 2**20
    assert 0.9 < found["ratio"] < 1.1, found
    assert found["loss"] == pytest.approx(np.log(2048), abs=0.1)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="extra plan")
def test_a_tpu_slice_that_is_not_here(tree, decoder):
    off = {"consistency": 0.0, "diversity": 0.0, "spectral": 0.0}
    plain = {"start": "lora", "rank": R, "target_modules": ["q_proj", "down_proj"]}
    mesh = {"data": 1, "fsdp": 2, "tensor": 2}
    config = parse_config(tree | {"mesh": mesh, "regularizers": off, "adapter": plain}, "here")
    row = planning.plan(config, topology="v5e:2x2")["rows"][0]
    assert sum(row["bytes_by_kind"].values()) == row["bytes_per_device"]["total"]
    assert row["fits"]
    assert row["seconds"]["bound"] == max(row["seconds"][n] for n in ("compute", "memory", "links"))
    assert row["open_loops"] == 0
    axes = {axis for one in row["collectives"] for axis in one["axes"]}
    assert axes == {"fsdp", "tensor"}


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="a TPU compiler is here")
def test_no_tpu_compiler(tree):
    with pytest.raises(InputError) as error:
        planning.plan(parse_config(tree, "here"), topology="v5e:2x2")
    first, _, last = str(error.value).partition("got: ")
    assert first == "--topology v5e:2x2: expected the step to compile, "
    assert last.endswith(
        "Install the TPU compiler with pip install '.[plan]', or change topology, mesh or batch."
    )
