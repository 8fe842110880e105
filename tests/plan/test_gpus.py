"""Plans for GPUs: what their compiler is told, what it must not be asked, and small real compiles."""

import dataclasses
import importlib.util
import re
import sys
from importlib import metadata

import pytest

from balora_jax.config_file import parse_config
from balora_jax.errors import InputError
from balora_jax.hardware import GPUS
from balora_jax.parallel import sharding
from balora_jax.plan import ahead, gpus, hlo, search
from balora_jax.plan import run as planning
from balora_jax.plan.targets import parse_target
from tests.plan.test_plan import INWARD, OUTWARD, D, L, R, V, row_of, tree  # noqa: F401

BOTH = {**INWARD, **OUTWARD}
KERNELS, FACTORS = sum(a * b for a, b in BOTH.values()), sum(a + b for a, b in BOTH.values())

HAS_COMPILER = importlib.util.find_spec("jax_cuda12_plugin") is not None


def read(text):
    """A message in the text form of protocol buffers, by a reader of its own."""
    words = re.findall(r'"[^"]*"|[^\s:{}]+|[{}]', text)

    def fields(place):
        found = {}
        while place < len(words) and words[place] != "}":
            name = words[place]
            assert name not in found
            if words[place + 1] == "{":
                found[name], place = fields(place + 2)
            else:
                value = words[place + 1]
                number = re.fullmatch(r"[\d.]+", value)
                found[name] = float(value) if number else value
                place += 1
            place += 1
        return found, place

    return fields(0)[0]


@pytest.mark.parametrize("version", ["0.12.0.1", "0.7.2"])
def test_an_h100_as_its_compiler_is_told(version, monkeypatch):
    """Against figures of a description that the compiler took, by NVIDIA's tables."""
    monkeypatch.setattr(gpus.metadata, "version", lambda name: version)
    found = read(gpus.description(parse_target("gpu:1xH100").accelerator))
    assert found["platform_name"] == '"CUDA"'
    assert found["dnn_version_info"] == {"major": 9, "minor": 10, "patch": 0}
    device = found["gpu_device_info"]
    assert device.pop("cuda_compute_capability") == {
        "major": 9, "minor": 0, "feature_extension": "ACCELERATED_FEATURES"
    }  # fmt: skip
    assert device.pop("device_memory_size") == pytest.approx(84942979072, rel=1e-3)
    assert device.pop("memory_bandwidth") == pytest.approx(3352320000000, rel=1e-3)
    known = {
        "threads_per_block_limit": 1024, "threads_per_warp": 32, "shared_memory_per_block": 49152,
        "shared_memory_per_core": 233472, "shared_memory_per_block_optin": 232448,
        "threads_per_core_limit": 2048, "core_count": 132, "fpus_per_core": 128,
        "block_dim_limit_x": 2147483647, "block_dim_limit_y": 65535, "block_dim_limit_z": 65535,
        "l2_cache_size": 52428800, "clock_rate_ghz": 1.98, "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }  # fmt: skip
    newer = {
        "thread_dim_limit_x": 1024, "thread_dim_limit_y": 1024, "thread_dim_limit_z": 64,
        "device_vendor": '"NVIDIA Corporation"', "platform_version": '"Compute Capability 9.0a"',
        "device_address_bits": 64, "name": '"NVIDIA H100 80GB HBM3"', "driver_version": '"13.0.0"',
        "runtime_version": '"12.8.0"', "compile_time_toolkit_version": '"12.8.0"',
        "dnn_version": '"9.10.0"',
    }  # fmt: skip
    old = version == "0.7.2"
    assert device == (known if old else known | newer)
    assert found.get("runtime_version") == (None if old else {"major": 12, "minor": 8, "patch": 0})
    # An old XLA would try tiles of products on a GPU.
    flags = parse_target("gpu:1xH100").environment["XLA_FLAGS"]
    assert ("--xla_gpu_autotune_level=0" in flags) == old


@pytest.mark.parametrize("card", GPUS, ids=lambda one: one.name)
def test_vector_units_give_the_published_float32_rate(card):
    """TFLOP/s of float32 without tensor cores, by NVIDIA's data sheets."""
    published = {"A100": 19.5, "A100-40GB": 19.5, "H100": 66.9, "H200": 66.9, "L4": 30.3,
                 "A10G": 35.0, "T4": 8.1}  # fmt: skip
    device = read(gpus.description(card))["gpu_device_info"]
    rate = 2 * device["core_count"] * device["fpus_per_core"] * device["clock_rate_ghz"] / 1e3
    assert rate == pytest.approx(published[card.name], rel=0.01)


def test_names_of_gpus():
    one = parse_target("gpu:8xH100")
    assert (one.devices, one.hosts, one.borders, one.described) == (8, 1, 1, True)
    assert (one.peak, one.link, one.network) == (989e12, 450e9, 50e9)
    two = parse_target("gpu:2x8xA100-40GB")
    assert (two.devices, two.hosts, two.borders) == (16, 2, 2)
    assert two.memory == int(0.75 * two.accelerator.memory)
    assert two.environment["JAX_PLATFORMS"] == "cpu"
    unnamed = parse_target("gpu:16x80GB")
    assert (unnamed.devices, unnamed.described, unnamed.memory) == (16, False, 80 * 10**9)
    assert parse_target("v5e:4x4").borders == 1  # a TPU's links go from host to host


def test_the_share_of_the_memory_that_jax_takes(monkeypatch):
    whole = parse_target("gpu:1xL4").accelerator.memory
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".9")
    target = parse_target("gpu:1xL4")
    assert target.memory == int(0.9 * whole)
    assert target.notes[0] == (
        "JAX takes 0.9 of the 22.0 GiB of a GPU; XLA_PYTHON_CLIENT_MEM_FRACTION is that share"
    )
    for wrong in ("0", "1.5", "much", "nan"):
        monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", wrong)
        with pytest.raises(InputError) as error:
            parse_target("gpu:1xL4")
        assert str(error.value) == (
            "XLA_PYTHON_CLIENT_MEM_FRACTION: expected a share above 0 and up to 1, got "
            f"{wrong!r}. Correct it."
        )


@pytest.mark.parametrize("found", [None, "0.1.0"])
def test_no_compiler_or_that_of_another_version(tree, monkeypatch, found):  # noqa: F811
    version = metadata.version

    def versions(name):
        if name != "jax-cuda12-plugin":
            return version(name)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", versions)
    with pytest.raises(InputError) as error:
        planning.plan(parse_config(tree, "here"), topology="gpu:8xH100")
    wanted = version("jaxlib")
    assert str(error.value) == (
        f"--topology gpu:8xH100: expected XLA's GPU compiler, jax-cuda12-plugin {wanted} (the "
        f"version of jaxlib), got {found or 'none'}. Install it with pip install "
        f"jax-cuda12-plugin=={wanted}, best in an environment for plans alone."
    )


def test_a_compiler_that_dies_says_why(tree, monkeypatch, tmp_path):  # noqa: F811
    """A process that stands for the compiler's: it is asked nothing, and its last line is told."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'a long story' >&2\necho 'no such card' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(ahead, "check_gpu_compiler", lambda topology: None)
    with pytest.raises(InputError) as error:
        planning.plan(parse_config(tree, "here"), topology="gpu:2xL4")
    assert str(error.value) == (
        "--topology gpu:2xL4: expected the step to compile, got: no such card. Change topology, "
        "mesh or batch."
    )


def test_attention_of_cudnn_is_left_out(tree):  # noqa: F811
    """Its libraries are not asked for, whatever the config says."""
    config = parse_config(tree | {"model": {**tree["model"], "attention": "cudnn"}}, "here")
    for name in ("gpu:8xH100", "gpu:2x48GB"):
        assert ahead.without_libraries(config, parse_target(name)).model.attention == "xla"
    assert ahead.without_libraries(config, parse_target("v5e:2x2")) is config


TWO_HOSTS = """HloModule jit_step

ENTRY %main (x: f32[2,8], n: f32[8,8]) -> f32[8,8] {
  %x = f32[2,8]{1,0} parameter(0)
  %n = f32[8,8]{1,0} parameter(1)
  %all-gather.1 = f32[16,8]{1,0} all-gather(%x), replica_groups=[1,8]<=[8], dimensions={0}
  %all-gather.2 = f32[8,8]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %all-reduce.1 = f32[8,8]{1,0} all-reduce(%n), replica_groups=[1,8]<=[8], to_apply=%add
  %all-reduce.2 = f32[8,8]{1,0} all-reduce(%n), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  %reduce-scatter.1 = f32[1,8]{1,0} reduce-scatter(%n), replica_groups=[1,8]<=[8], dimensions={0}
  %permute.1 = f32[2,8]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
  %permute.2 = f32[2,8]{1,0} collective-permute(%x), source_target_pairs={{0,4},{4,0}}
  ROOT %out = f32[8,8]{1,0} copy(%n)
}
"""


def test_bytes_between_two_hosts():
    """Eight devices, four on a host: 64 bytes are gathered, 256 are summed.

    Gathered over all: every device sends its own 64 to the other host, where they are handed on.
    Summed over all: the four of a host sum first, so that each has a quarter, 64, to exchange with
    one other host, there and back. Within a host nothing crosses.
    """
    found = hlo.Module(TWO_HOSTS).collectives({"data": 2, "fsdp": 4}, hosts=2)
    seen = {(one.kind, one.axes): (one.bytes, one.between_hosts) for one in found}
    both = ("data", "fsdp")
    assert seen == {
        ("all-gather", both): (64 * 7, 64),
        ("all-gather", ("fsdp",)): (64 * 3, 0),
        ("all-reduce", both): (2 * 256 * 7 // 8, 64),
        ("all-reduce", ("data",)): (256, 256),
        ("reduce-scatter", both): (256 * 7 // 8, 32),
        ("collective-permute", ("fsdp",)): (64, 0),
        ("collective-permute", ("data",)): (64, 64),
    }
    alone = hlo.Module(TWO_HOSTS).collectives({"data": 2, "fsdp": 4})
    assert {one.between_hosts for one in alone} == {0}


def test_the_slower_of_links_and_network():
    sent = {"bytes": 9 * 10**9, "between_hosts": 2 * 10**9}
    assert search.link_seconds(sent, 450e9, 50e9) == pytest.approx(0.04)
    assert search.link_seconds(sent, 450e9, 500e9) == pytest.approx(0.02)
    assert search.link_seconds(sent, 450e9, None) == pytest.approx(0.02)
    target = dataclasses.replace(parse_target("gpu:2x2xH100"), memory=1000)
    row = planning.judged(row_of(sent=sent), target, 0.5)
    assert row["seconds"]["links"] == pytest.approx(0.04)


def test_the_least_that_must_be_moved(tree):  # noqa: F811
    """Counted by hand for what a CPU compiles in place of GPUs, and for a search over two hosts.

    Eight devices hold an eighth of the weights in bfloat16 each and gather the other seven, three
    times (the teacher, forward, backward) and once more where activations are computed anew.
    """
    config = parse_config(tree | {"mesh": {"data": 1, "fsdp": 8}}, "here")
    mesh = dict.fromkeys(sharding.AXES, 1) | {"fsdp": 8}
    row = {"traffic": 1, "mesh": mesh, "accumulation": 1, "remat": "full"}
    weights = 2 * (2 * V * D + (2 * L + 1) * D + L * KERNELS)
    trained = 4 * L * R * FACTORS
    least = search.least_moved(row, config, parse_target("gpu:8x80GB"))
    saved = L * 16 * D * 2  # one row on a device, its layers' inputs
    assert least["traffic"] == 4 * weights + 2 * saved
    assert least["sent"]["bytes"] == pytest.approx(4 * weights * 7 / 8 + 2 * trained * 7 / 8, abs=8)
    assert least["sent"]["between_hosts"] == 0
    two = search.least_moved(row, config, parse_target("gpu:2x4xA100"))
    # What is gathered: the own eighth to one other host. Sums: a quarter, half of it there and back.
    assert two["sent"]["bytes"] == least["sent"]["bytes"]
    expected = 4 * weights / 8 + 2 * (trained / 4) / 2
    assert two["sent"]["between_hosts"] == pytest.approx(expected, abs=8)
    assert search.least_moved(row | {"traffic": None}, config, parse_target("gpu:8x80GB")) == {}


@pytest.mark.skipif(not HAS_COMPILER, reason="extra plan-gpu")
@pytest.mark.parametrize("topology", ["gpu:2x2xH100", "gpu:1x4xA10G"])
def test_gpus_that_are_not_here(tree, topology, capsys):  # noqa: F811
    plain = {"start": "lora", "rank": R, "target_modules": ["q_proj", "down_proj"]}
    mesh = {"data": 2, "fsdp": 2}
    config = parse_config(tree | {"mesh": mesh, "adapter": plain}, "here")
    row = planning.plan(config, topology=topology)["rows"][0]
    assert sum(row["bytes_by_kind"].values()) == row["bytes_per_device"]["total"]
    assert row["fits"]
    assert row["seconds"]["bound"] == max(row["seconds"][n] for n in ("compute", "memory", "links"))
    assert row["open_loops"] == 0
    axes = {axis for one in row["collectives"] for axis in one["axes"]}
    assert axes == {"data", "fsdp"}
    between = {axis for one in row["collectives"] if one["between_hosts"] for axis in one["axes"]}
    assert ("data" in between) == topology.startswith("gpu:2x")
    assert "model.attention: xla" in capsys.readouterr().out
    assert sharding.AXES[0] == "data"  # the outermost axis is the one between hosts
