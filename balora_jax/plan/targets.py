"""The devices that a step is planned for, by name."""

import math
import os
import re
from dataclasses import dataclass
from typing import Any

from balora_jax.errors import InputError
from balora_jax.hardware import TPUS, Accelerator, accelerator_named, accelerator_of, gpu_of_memory

TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
"""Environment in which libtpu compiles with no TPU and asks no metadata server for one."""


@dataclass(frozen=True)
class Target:
    """The devices of a plan.

    Attributes:
        name: as it was asked for.
        platform: ``tpu``, ``gpu`` or ``cpu``.
        chips: how many; a TPU v4 chip is two devices.
        memory: bytes that a program may use on one device; None where it is not known.
        accelerator: what is published; None for a CPU and for a GPU of unknown speed.
        estimate: what the figures are not, where another compiler stands in.
    """

    name: str
    platform: str
    chips: int
    memory: int | None
    accelerator: Accelerator | None
    estimate: str | None = None

    @property
    def devices(self) -> int:
        """Devices as JAX counts them."""
        return self.chips * self.cores

    @property
    def cores(self) -> int:
        """Devices of a chip: libtpu describes a v4 as two cores."""
        return 1 if self.accelerator is None or self.name == "auto" else self.accelerator.cores

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
    def summary(self) -> dict[str, Any]:
        """What a report says of the devices."""
        host_chips = None if self.accelerator is None else self.accelerator.host_chips
        return {
            "name": self.name,
            "platform": self.platform,
            "kind": "CPU" if self.accelerator is None else self.accelerator.kinds[0],
            "devices": self.devices,
            "hosts": None if host_chips is None else -(-self.chips // host_chips),
            "memory": self.memory,
            "peak_flops": self.peak,
            "bandwidth": self.bandwidth,
            "link": self.link,
            "estimate": self.estimate,
        }

    @property
    def environment(self) -> dict[str, str]:
        """Variables of a process that compiles for these devices."""
        if self.platform == "tpu" and self.accelerator is not None:
            kind = f"{self.accelerator.slice_type}-{self.chips}"
            return TPU_ENVIRONMENT | {"TPU_ACCELERATOR_TYPE": kind}
        kept = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if _COUNT not in flag]
        return {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": " ".join([*kept, f"{_COUNT}={self.devices}"]),
        }


_TPU_NAMES = "|".join(one.name for one in TPUS)
_NUMBER = "[0-9]{1,9}"
_MOST_CHIPS = 2**20
_COUNT = "--xla_force_host_platform_device_count"


def parse_target(text: str) -> Target:
    """The devices that a name stands for.

    Args:
        text: ``auto`` (those that JAX sees here), a TPU slice (``v5e:4x4``), ``gpu:8xH100`` or
            ``gpu:8x80GB``, or ``cpu:8``.

    Raises:
        InputError: none of these.

    >>> parse_target("v5p:2x2x2").devices, parse_target("gpu:8x80GB").memory
    (8, 80000000000)
    """
    if text == "auto":
        return _target_here()
    if match := re.fullmatch(rf"({_TPU_NAMES}):({_NUMBER}(?:x{_NUMBER}){{1,2}})", text):
        accelerator = accelerator_named(match[1])
        assert accelerator is not None
        chips = math.prod(int(size) for size in match[2].split("x"))
        memory = accelerator.memory // accelerator.cores
        return _positive(Target(text, "tpu", chips, memory, accelerator))
    if match := re.fullmatch(rf"gpu:({_NUMBER})x(?:({_NUMBER})GB|([A-Z]\d+))", text):
        return _positive(_gpu(text, int(match[1]), match[2], match[3]))
    if match := re.fullmatch(rf"cpu:({_NUMBER})", text):
        count = int(match[1])
        return _positive(Target(text, "cpu", count, _share_of_memory(count), None))
    raise _unknown(text)


def _gpu(text: str, count: int, gigabytes: str | None, name: str | None) -> Target:
    accelerator = gpu_of_memory(int(gigabytes)) if gigabytes else accelerator_named(name or "")
    if gigabytes:
        memory = int(gigabytes) * 10**9
    elif accelerator is not None:
        memory = accelerator.memory
    else:
        raise _unknown(text)
    speed = "unknown" if accelerator is None else f"those of {accelerator.kinds[0]}"
    note = (
        "memory and collectives are an estimate by the CPU's compiler, which may compute bfloat16 "
        f"in float32 and then takes more; speeds are {speed}"
    )
    return Target(text, "gpu", count, memory, accelerator, note)


def _positive(target: Target) -> Target:
    if not 1 <= target.chips <= _MOST_CHIPS:
        raise _unknown(target.name)
    return target


def _unknown(text: str) -> InputError:
    names = ", ".join(one.name for one in TPUS)
    return InputError(
        f"--topology: expected {names} and a shape, such as v5e:4x4 or v5p:2x2x1, or "
        f"gpu:8x80GB, gpu:8xH100, cpu:8 or auto, got {text!r}. Correct it."
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
    return Target("auto", platform, len(devices), limit, found)


def described_devices(target: Target) -> list[Any]:
    """The devices to compile for; in a process with the target's environment unless ``auto``."""
    import jax

    if target.platform != "tpu" or target.name == "auto":
        return list(jax.devices())
    from jax.experimental import topologies

    described = topologies.get_topology_desc(platform="tpu", topology_name=target.name)
    return list(described.devices)
