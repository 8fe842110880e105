"""Devices: what their makers publish about them, and which are here."""

import importlib.util
import os
import platform
import resource
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Gpu:
    """Published figures of a GPU that its compiler asks for.

    Attributes:
        capability: compute capability, major and minor.
        processors: streaming multiprocessors.
        clock: GHz, boost.
        cache: bytes of L2.
        title: the name by which CUDA knows it.
        gigabytes: memory as it is sold; programs see less.
    """

    capability: tuple[int, int]
    processors: int
    clock: float
    cache: int
    title: str
    gigabytes: int


@dataclass(frozen=True)
class Accelerator:
    """Published figures of one chip.

    Attributes:
        name: how ``--topology`` names it.
        kinds: how the names begin by which JAX knows it; the first is its title.
        peak: dense bfloat16 operations per second; of a T4, for which XLA computes bfloat16 in
            float32, those.
        memory: bytes of one; of a TPU those that a program may use, of a GPU all that CUDA sees.
        bandwidth: bytes per second of that memory.
        link: bytes per second that a chip sends to other chips over all its links, one direction.
        host_chips: chips of one host in a larger slice; most GPUs of a host.
        slice_type: how Google names a slice of these chips; None for a GPU.
        cores: devices of a chip as its compiler describes it.
        network: bytes per second that a GPU sends to other hosts, its share of the host's; of a
            TPU, whose links do not end at a host, to other slices, its share of the pod's; None
            where that is not published.
        gpu: what the compiler of a GPU asks for.
    """

    name: str
    kinds: tuple[str, ...]
    peak: float
    memory: int
    bandwidth: float
    link: float
    host_chips: int
    slice_type: str | None = None
    cores: int = 1
    network: float | None = None
    gpu: Gpu | None = None


TPUS = (
    Accelerator("v4", ("TPU v4",), 275e12, int(30.5 * GIB), 1228e9, 300e9, 4, "v4", cores=2),
    Accelerator(
        *("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, int(15.75 * GIB), 819e9, 200e9, 4),
        slice_type="v5litepod",
        network=3.125e9,
    ),
    # Some runtimes leave the p out.
    Accelerator("v5p", ("TPU v5", "TPU v5p"), 459e12, int(95.73 * GIB), 2765e9, 600e9, 4, "v5p"),
    Accelerator(
        *("v6e", ("TPU v6 lite",), 918e12, int(31.24 * GIB), 1640e9, 400e9, 4, "v6e"),
        network=12.5e9,
    ),
)
"""**Source:** Google's pages of each version, whose Gbit/s between chips are of one direction; the
memory is what libtpu 0.0.52 lets a program use."""

GPUS = (
    Accelerator(
        *("A100", ("NVIDIA A100",), 312e12, int(79.15 * GIB), 2039e9, 300e9, 8),
        network=25e9,
        gpu=Gpu((8, 0), 108, 1.41, 40 * MIB, "NVIDIA A100-SXM4-80GB", 80),
    ),
    Accelerator(
        *("A100-40GB", ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB")),
        *(312e12, int(39.39 * GIB), 1555e9, 300e9, 8),
        network=25e9,
        gpu=Gpu((8, 0), 108, 1.41, 40 * MIB, "NVIDIA A100-SXM4-40GB", 40),
    ),
    Accelerator(
        *("H100", ("NVIDIA H100",), 989e12, int(79.1 * GIB), 3352e9, 450e9, 8),
        network=50e9,
        gpu=Gpu((9, 0), 132, 1.98, 50 * MIB, "NVIDIA H100 80GB HBM3", 80),
    ),
    Accelerator(
        *("H200", ("NVIDIA H200",), 989e12, int(139.8 * GIB), 4800e9, 450e9, 8),
        network=50e9,
        gpu=Gpu((9, 0), 132, 1.98, 50 * MIB, "NVIDIA H200", 141),
    ),
    Accelerator(
        *("L4", ("NVIDIA L4",), 121e12, int(22.03 * GIB), 300e9, 32e9, 8),
        network=1.5625e9,
        gpu=Gpu((8, 9), 58, 2.04, 48 * MIB, "NVIDIA L4", 24),
    ),
    Accelerator(
        *("A10G", ("NVIDIA A10G",), 70e12, int(22.0 * GIB), 600e9, 32e9, 8),
        network=1.5625e9,
        gpu=Gpu((8, 6), 80, 1.71, 6 * MIB, "NVIDIA A10G", 24),
    ),
    Accelerator(
        *("T4", ("Tesla T4",), 8.1e12, int(14.56 * GIB), 320e9, 16e9, 8),
        network=1.5625e9,
        gpu=Gpu((7, 5), 40, 1.59, 4 * MIB, "Tesla T4", 16),
    ),
)
"""**Source:** NVIDIA's data sheets and white papers: SXM parts with NVLink; L4, A10G and T4 over
PCIe; half of the sum of both directions. Memory is the total that CUDA reports. Between hosts: DGX
systems (one port of 200 or 400 Gbit/s for each GPU); for L4, A10G and T4 an eighth of the 100
Gbit/s of the largest machines that clouds rent."""


def accelerator_named(name: str) -> Accelerator | None:
    """The chip that ``--topology`` names so; None for one that is not listed.

    >>> accelerator_named("v5p").host_chips, accelerator_named("v7")
    (4, None)
    """
    return next((one for one in (*TPUS, *GPUS) if one.name == name), None)


def accelerator_of(kind: str) -> Accelerator | None:
    """The chip of a JAX device by its ``device_kind``, by the longest name that it begins with.

    >>> accelerator_of("TPU v5 lite").name, accelerator_of("TPU v5p").name, accelerator_of("cpu")
    ('v5e', 'v5p', None)
    """
    whole = f"{kind} "  # an L40S is no L4
    found = [
        (len(k), one)
        for one in (*TPUS, *GPUS)
        for k in one.kinds
        if whole.startswith(k) and not whole[len(k)].isalnum()
    ]
    return max(found, key=lambda pair: pair[0])[1] if found else None


def gpu_of_memory(gigabytes: int) -> Accelerator | None:
    """The fastest GPU with so many GB, whose speed stands for one that is named by its memory.

    >>> gpu_of_memory(80).name, gpu_of_memory(48)
    ('H100', None)
    """
    found = [one for one in GPUS if one.gpu is not None and one.gpu.gigabytes == gigabytes]
    return max(found, key=lambda one: one.peak, default=None)


def peak_flops(kind: str) -> float | None:
    """Operations per second of a device by its ``device_kind``; None for one not listed.

    >>> peak_flops("TPU v5 lite") == 197e12, peak_flops("cpu")
    (True, None)
    """
    found = accelerator_of(kind)
    return None if found is None else found.peak


DEVICE_FILES = ("nvidia*", "nvhost*", "nvgpu*", "dxg", "accel*", "vfio/[0-9]*", "kfd")
"""What Linux shows of GPUs and TPUs in ``/dev``."""


def settle_for_cpu(files: Path) -> None:
    """Tell JAX, before its import, to stay on the CPU where a GPU's compiler is and no device.

    The compiler for plans (extra ``plan-gpu``) is what JAX would run a GPU by; JAX would look for
    one, complain at length and take the CPU. What the environment says already stays.

    Args:
        files: the folder of the device files, ``/dev``.
    """
    if importlib.util.find_spec("jax_cuda12_plugin") is None or sys.platform != "linux":
        return
    if not any(next(files.glob(pattern), None) for pattern in DEVICE_FILES):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def device_description() -> str:
    """Number and kind of the devices here, as ``1 x cpu``."""
    import jax

    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def peak_memory_bytes() -> int:
    """Most memory used so far: of the first device, or of this process where that is the CPU."""
    import jax

    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "peak_bytes_in_use" in statistics:
        return int(statistics["peak_bytes_in_use"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def versions() -> dict[str, str]:
    """Versions of what measured figures depend on."""
    names = ("balora_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")
    return {name: _version(name) for name in names} | {"python": platform.python_version()}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
