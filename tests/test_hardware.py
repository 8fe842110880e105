"""The table of devices: every device once, found by what JAX calls it, and what is here."""

import os

import jax
import pytest

from balora_jax import hardware
from balora_jax.hardware import GPUS, TPUS, accelerator_named, accelerator_of

KINDS = {
    "NVIDIA H100 80GB HBM3": ("H100", 989e12),
    "NVIDIA A100-SXM4-80GB": ("A100", 312e12),
    "NVIDIA A100-SXM4-40GB": ("A100-40GB", 312e12),
    "NVIDIA A10G": ("A10G", 70e12),
    "NVIDIA H200": ("H200", 989e12),
    "NVIDIA L4": ("L4", 121e12),
    "Tesla T4": ("T4", 8.1e12),
    "TPU v4": ("v4", 275e12),
    "TPU v5 lite": ("v5e", 197e12),
    "TPU v5e": ("v5e", 197e12),
    "TPU v5": ("v5p", 459e12),
    "TPU v5p": ("v5p", 459e12),
    "TPU v6 lite": ("v6e", 918e12),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_is_found_by_what_jax_calls_it(kind):
    found = accelerator_of(kind)
    assert (found.name, found.peak) == KINDS[kind]
    assert hardware.peak_flops(kind) == found.peak


def test_devices_that_nobody_lists():
    assert accelerator_of("cpu") is None
    assert accelerator_of("NVIDIA B300") is None
    assert accelerator_of("NVIDIA L40S") is None
    assert accelerator_of("NVIDIA A10") is None
    assert hardware.peak_flops("cpu") is None
    assert accelerator_named("v7") is None
    assert hardware.gpu_of_memory(48) is None


def test_every_device_stands_once_and_whole():
    devices = (*TPUS, *GPUS)
    assert len({one.name for one in devices}) == len(devices)
    kinds = [kind for one in devices for kind in one.kinds]
    assert len(set(kinds)) == len(kinds)
    for one in devices:
        assert accelerator_named(one.name) is one
        # Operations are faster than memory, and memory is faster than links.
        assert one.peak > one.bandwidth > one.link > 0
        assert one.memory > 10**10
        assert (one.slice_type is None) == (one in GPUS) == (one.gpu is not None)
        if one.gpu is not None:
            # CUDA knows it by its title; it sees less than is sold, between hosts all is slowest.
            assert accelerator_of(one.gpu.title) is one
            assert 0.85e9 < one.memory / one.gpu.gigabytes < 1.08e9
            assert one.link > one.network > 0


def test_a_gpu_named_by_its_memory_is_the_fastest_with_it():
    found = {size: hardware.gpu_of_memory(size).name for size in (16, 24, 40, 80, 141)}
    assert found == {16: "T4", 24: "L4", 40: "A100-40GB", 80: "H100", 141: "H200"}


def test_what_is_here():
    assert hardware.device_description() == f"{jax.device_count()} x cpu"
    assert hardware.peak_memory_bytes() > 10**7
    assert hardware.versions()["jax"] == jax.__version__


@pytest.mark.parametrize("device", [None, "nvidia0", "accel0", "dxg"])
def test_a_compiler_for_gpus_and_no_gpu(device, monkeypatch, tmp_path):
    """JAX is told to stay on the CPU where there is no device, and only with that compiler."""
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: name)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    (tmp_path / (device or "null")).touch()
    hardware.settle_for_cpu(tmp_path)
    assert os.environ.get("JAX_PLATFORMS") == ("cpu" if device is None else None)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    hardware.settle_for_cpu(tmp_path)
    assert os.environ["JAX_PLATFORMS"] == "tpu"
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: None)
    hardware.settle_for_cpu(tmp_path)
    assert "JAX_PLATFORMS" not in os.environ
