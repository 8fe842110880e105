"""Devices: what their makers publish about them, and which are here."""

import platform
import resource
import sys
from dataclasses import dataclass
from importlib import metadata

GIB = 2**30


@dataclass(frozen=True)
class Accelerator:
    """Published figures of one chip.

    Attributes:
        name: how ``--topology`` names it.
        kinds: how the names begin by which JAX knows it; the first is its title.
        peak: dense bfloat16 (T4: float16) operations per second.
        memory: bytes that a program may use.
        bandwidth: bytes per second of that memory.
        link: bytes per second that a chip sends to other chips over all its links, one direction.
        host_chips: chips of one host in a larger slice.
        slice_type: how Google names a slice of these chips; None for a GPU.
        cores: devices of a chip as its compiler describes it.
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


TPUS = (
    Accelerator("v4", ("TPU v4",), 275e12, int(30.5 * GIB), 1228e9, 300e9, 4, "v4", cores=2),
    Accelerator(
        *("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, int(15.75 * GIB), 819e9, 200e9, 4),
        slice_type="v5litepod",
    ),
    # Some runtimes leave the p out.
    Accelerator("v5p", ("TPU v5", "TPU v5p"), 459e12, int(95.73 * GIB), 2765e9, 600e9, 4, "v5p"),
    Accelerator("v6e", ("TPU v6 lite",), 918e12, int(31.24 * GIB), 1640e9, 400e9, 4, "v6e"),
)
"""**Source:** Google's pages of each version, whose Gbit/s between chips are of one direction; the
memory is what libtpu 0.0.52 lets a program use."""

GPUS = (
    Accelerator("A100", ("NVIDIA A100",), 312e12, 80 * 10**9, 2039e9, 300e9, 8),
    Accelerator("H100", ("NVIDIA H100",), 989e12, 80 * 10**9, 3350e9, 450e9, 8),
    Accelerator("H200", ("NVIDIA H200",), 989e12, 141 * 10**9, 4800e9, 450e9, 8),
    Accelerator("L4", ("NVIDIA L4",), 121e12, 24 * 10**9, 300e9, 32e9, 8),
    Accelerator("T4", ("Tesla T4",), 65e12, 16 * 10**9, 320e9, 16e9, 8),
)
"""**Source:** NVIDIA's data sheets: SXM parts with NVLink, L4 and T4 over PCIe; half of the sum of
both directions."""


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
    found = [(len(k), one) for one in (*TPUS, *GPUS) for k in one.kinds if kind.startswith(k)]
    return max(found, key=lambda pair: pair[0])[1] if found else None


def gpu_of_memory(gigabytes: int) -> Accelerator | None:
    """The fastest GPU with so many GB, whose speed stands for one that is named by its memory.

    >>> gpu_of_memory(80).name, gpu_of_memory(48)
    ('H100', None)
    """
    found = [one for one in GPUS if one.memory == gigabytes * 10**9]
    return max(found, key=lambda one: one.peak, default=None)


def peak_flops(kind: str) -> float | None:
    """Operations per second of a device by its ``device_kind``; None for one not listed.

    >>> peak_flops("TPU v5 lite") == 197e12, peak_flops("cpu")
    (True, None)
    """
    found = accelerator_of(kind)
    return None if found is None else found.peak


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
