"""The devices that a step is planned for, by name."""

import math
import os
import re
from dataclasses import dataclass
from typing import Any

from balora_jax.errors import InputError
from balora_jax.hardware import (
    GIB,
    GPUS,
    TPUS,
    Accelerator,
    accelerator_named,
    accelerator_of,
    gpu_of_memory,
)
from balora_jax.plan import gpus

TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
"""Environment in which libtpu compiles with no TPU and asks no metadata server for one."""

GPU_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
"""Environment in which XLA's GPU compiler is loaded and no GPU nor CUDA is looked for."""

MEMORY_SHARE = "XLA_PYTHON_CLIENT_MEM_FRACTION"
"""The variable with the share of a GPU's memory that JAX takes."""


@dataclass(frozen=True)
class Target:
    """The devices of a plan.

    Attributes:
        name: as it was asked for.
        platform: ``tpu``, ``gpu`` or ``cpu``.
        chips: how many; a TPU v4 chip is two devices.
        memory: bytes that a program may use on one device; None where it is not known.
        accelerator: what is published; None for a CPU and for a GPU of unknown speed.
        hosts: that the chips are spread over evenly; None where it is not known.
        slices: of a TPU that the chips are spread over evenly.
        described: whether the compiler is told of a GPU that is not here.
        notes: what the figures rest on.
    """

    name: str
    platform: str
    chips: int
    memory: int | None
    accelerator: Accelerator | None
    hosts: int | None = None
    slices: int = 1
    described: bool = False
    notes: tuple[str, ...] = ()

    @property
    def is_here(self) -> bool:
        """Whether the devices are those of this machine."""
        return self.name == "auto"

    @property
    def stands_in(self) -> bool:
        """Whether these are GPUs of unknown make, for which the CPU's compiler stands in."""
        return self.platform == "gpu" and not self.described and not self.is_here

    @property
    def devices(self) -> int:
        """Devices as JAX counts them."""
        return self.chips * self.cores

    @property
    def cores(self) -> int:
        """Devices of a chip: libtpu describes a v4 as two cores."""
        return 1 if self.accelerator is None or self.is_here else self.accelerator.cores

    @property
    def peak(self) -> float | None:
        """Operations per second of one device."""
        return None if self.accelerator is None else self.accelerator.peak / self.cores

    @property
    def bandwidth(self) -> float | None:
        """Bytes per second between one device and its memory."""
        return None if self.accelerator is None else self.accelerator.bandwidth / self.cores

    @property
    def link(self) -> float | None:
        """Bytes per second that one device sends."""
        return None if self.accelerator is None else self.accelerator.link / self.cores

    @property
    def network(self) -> float | None:
        """Bytes per second that one device sends to other hosts, or slices; None without such."""
        if self.accelerator is None or (self.platform == "tpu" and self.slices == 1):
            return None
        return self.accelerator.network

    @property
    def borders(self) -> int:
        """Groups of devices, one after another, between which the network is."""
        if self.platform == "tpu":
            return self.slices
        return 1 if self.network is None or self.hosts is None else self.hosts

    @property
    def summary(self) -> dict[str, Any]:
        """What a report says of the devices."""
        return {
            "name": self.name,
            "platform": self.platform,
            "kind": "CPU" if self.accelerator is None else self.accelerator.kinds[0],
            "devices": self.devices,
            "hosts": self.hosts,
            "slices": self.slices,
            "memory": self.memory,
            "peak_flops": self.peak,
            "bandwidth": self.bandwidth,
            "link": self.link,
            "network": self.network,
            "notes": list(self.notes),
        }

    @property
    def environment(self) -> dict[str, str]:
        """Variables of a process that compiles for these devices."""
        if self.platform == "tpu" and self.accelerator is not None:
            kind = f"{self.accelerator.slice_type}-{self.chips // self.slices}"
            return TPU_ENVIRONMENT | {"TPU_ACCELERATOR_TYPE": kind}
        told = os.environ.get("XLA_FLAGS", "")
        if self.described:
            return GPU_ENVIRONMENT | {"XLA_FLAGS": " ".join([told, *gpus.flags()])}
        kept = [flag for flag in told.split() if _COUNT not in flag]
        return {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": " ".join([*kept, f"{_COUNT}={self.devices}"]),
        }


_TPU_NAMES = "|".join(one.name for one in TPUS)
_GPU_NAMES = "|".join(one.name for one in GPUS)
_NUMBER = "[0-9]{1,9}"
_MOST_CHIPS = 2**20
_COUNT = "--xla_force_host_platform_device_count"


def parse_target(text: str) -> Target:
    """The devices that a name stands for.

    Args:
        text: ``auto`` (those that JAX sees here), a TPU slice (``v5e:4x4``) or several
            (``2xv5e:4x4``), GPUs of one host (``gpu:8xH100``) or of several (``gpu:2x8xA100``),
            ``gpu:8x48GB`` for GPUs of which only the memory is known, or ``cpu:8``.

    Raises:
        InputError: none of these.

    >>> parse_target("v5p:2x2x2").devices, parse_target("gpu:8x80GB").memory
    (8, 80000000000)
    >>> parse_target("gpu:2x8xA100").hosts
    2
    """
    if text == "auto":
        return _target_here()
    shape = rf"(?:({_NUMBER})x)?({_TPU_NAMES}):({_NUMBER}(?:x{_NUMBER}){{1,2}})"
    if match := re.fullmatch(shape, text):
        return _tpu(text, int(match[1] or 1), match[2], match[3])
    if match := re.fullmatch(rf"gpu:({_NUMBER})x({_NUMBER})GB", text):
        return _positive(_unnamed(text, int(match[1]), int(match[2])))
    if match := re.fullmatch(rf"gpu:(?:({_NUMBER})x)?({_NUMBER})x({_GPU_NAMES})", text):
        return _card(text, int(match[1] or 1), int(match[2]), match[3])
    if match := re.fullmatch(rf"cpu:({_NUMBER})", text):
        count = int(match[1])
        return _positive(Target(text, "cpu", count, _share_of_memory(count), None))
    raise _unknown(text)


def _tpu(text: str, slices: int, name: str, shape: str) -> Target:
    """Slices of a TPU, for which libtpu compiles."""
    accelerator = accelerator_named(name)
    assert accelerator is not None
    chips = math.prod(int(size) for size in shape.split("x"))
    hosts = slices * -(-chips // accelerator.host_chips)
    memory = accelerator.memory // accelerator.cores
    if slices > 1 and accelerator.network is None:
        known = ", ".join(one.name for one in TPUS if one.network is not None)
        raise InputError(
            f"--topology: expected one slice, or several of {known}, got {text!r}: how fast the "
            "network between slices of it is, is not published. Plan one slice."
        )
    notes = ()
    if slices > 1:
        notes = ("only mesh.data goes over the network between slices; no run has tried it",)
    found = Target(text, "tpu", slices * chips, memory, accelerator, hosts, slices, notes=notes)
    return _positive(found)


def _card(text: str, hosts: int, count: int, name: str) -> Target:
    """GPUs that a table knows, for which their own compiler compiles."""
    accelerator = accelerator_named(name)
    assert accelerator is not None
    if count > accelerator.host_chips:
        raise InputError(
            f"--topology: expected up to {accelerator.host_chips} {name} on a host, got {count} in "
            f"{text!r}. Write hosts x GPUs of a host, such as gpu:2x8x{name}."
        )
    share = memory_share()
    memory = int(share * accelerator.memory)
    notes = (
        f"JAX takes {share:g} of the {accelerator.memory / GIB:.1f} GiB of a GPU; {MEMORY_SHARE} "
        "is that share",
        "attention is compiled as model.attention: xla; auto takes cuDNN's on a GPU, which keeps "
        "less",
    )
    return _positive(
        Target(
            *(text, "gpu", hosts * count, memory, accelerator, hosts), described=True, notes=notes
        )
    )


def memory_share() -> float:
    """The share of a GPU's memory that JAX takes: 0.75 where the environment says nothing.

    Raises:
        InputError: the environment names no share.
    """
    told = os.environ.get(MEMORY_SHARE, "")
    if not told:
        return 0.75
    if not re.fullmatch(r"[0-9]*\.?[0-9]+", told) or not 0 < float(told) <= 1:
        raise InputError(
            f"{MEMORY_SHARE}: expected a share above 0 and up to 1, got {told!r}. Correct it."
        )
    return float(told)


def _unnamed(text: str, count: int, gigabytes: int) -> Target:
    """GPUs of which only the memory is known: the CPU's compiler stands in."""
    accelerator = gpu_of_memory(gigabytes)
    speed = "unknown" if accelerator is None else f"those of {accelerator.kinds[0]}"
    names = ", ".join(one.name for one in GPUS)
    note = (
        "bytes of a device and collectives are an estimate by the CPU's compiler, which computes "
        "bfloat16 in float32 and takes more; times are of the least that must be moved; speeds are "
        f"{speed}. For the GPU's own compiler name the card: {names}"
    )
    hosts = None if accelerator is None else -(-count // accelerator.host_chips)
    return Target(text, "gpu", count, gigabytes * 10**9, accelerator, hosts, notes=(note,))


def _positive(target: Target) -> Target:
    if not 1 <= target.chips <= _MOST_CHIPS:
        raise _unknown(target.name)
    return target


def _unknown(text: str) -> InputError:
    names = ", ".join(one.name for one in TPUS)
    cards = ", ".join(one.name for one in GPUS)
    return InputError(
        f"--topology: expected {names} and a shape, such as v5e:4x4 or 2xv5e:4x4, GPUs ({cards}), "
        "such as gpu:8xH100 or gpu:2x8xA100 (hosts x GPUs), gpu:8x48GB, cpu:8 or auto, got "
        f"{text!r}. Correct it."
    )


def _share_of_memory(count: int) -> int:
    """Devices of a CPU share its memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // max(count, 1)


def _target_here() -> Target:
    import jax

    devices = jax.devices()
    kind, platform = devices[0].device_kind, devices[0].platform
    found = accelerator_of(kind)
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    if platform == "cpu":
        limit = _share_of_memory(len(devices))
    elif limit is None and found is not None:
        limit = found.memory
    hosts = None if found is None else -(-len(devices) // found.host_chips)
    return Target("auto", platform, len(devices), limit, found, hosts)


def described_devices(target: Target) -> list[Any]:
    """The devices to compile for; in a process with the target's environment unless ``auto``."""
    import jax

    if target.is_here or not (target.platform == "tpu" or target.described):
        return list(jax.devices())
    from jax.experimental import topologies

    if target.platform == "tpu":
        name = target.name[target.name.index("v") :]
        several = {"num_slices": target.slices} if target.slices > 1 else {}
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **several)
        return list(found.devices)
    assert target.accelerator is not None
    assert target.hosts is not None
    # What NVLink connects is a slice: GPUs of one host.
    shape = f"{target.hosts}x1x{target.chips // target.hosts}"
    card = gpus.description(target.accelerator)
    found = topologies.get_topology_desc(platform="cuda", target_config=card, topology=shape)
    return list(found.devices)
