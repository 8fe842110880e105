"""The description of a GPU that XLA compiles for where no GPU is.

XLA reads a ``GpuTargetConfigProto`` in text form. What it asks of every card of a compute
capability stands here, what differs from card to card in :data:`balora_jax.hardware.GPUS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from balora_jax.hardware import Accelerator

KIB = 2**10


@dataclass(frozen=True)
class Capability:
    """Limits of a streaming multiprocessor.

    Attributes:
        shared: bytes of shared memory.
        block_shared: most bytes of it that a block may ask for.
        threads: most that are resident.
        lanes: float32 operations (a product and a sum) per clock.
    """

    shared: int
    block_shared: int
    threads: int
    lanes: int


CAPABILITIES = {
    (7, 5): Capability(64 * KIB, 64 * KIB, 1024, 64),
    (8, 0): Capability(164 * KIB, 163 * KIB, 2048, 64),
    (8, 6): Capability(100 * KIB, 99 * KIB, 1536, 128),
    (8, 9): Capability(100 * KIB, 99 * KIB, 1536, 128),
    (9, 0): Capability(228 * KIB, 227 * KIB, 2048, 128),
}
"""**Source:** CUDA C++ Programming Guide, technical specifications per compute capability."""

CUDA, CUDNN, DRIVER = (12, 8, 0), (9, 10, 0), (13, 0, 0)
"""Versions of the libraries that the card is described with; a program is compiled for them."""

LIMITS = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 48 * KIB,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 2**16 - 1,
    "block_dim_limit_z": 2**16 - 1,
    "registers_per_core_limit": 2**16,
    "registers_per_block_limit": 2**16,
}
"""The same on every card. **Source:** as :data:`CAPABILITIES`."""

NEWER_LIMITS = {
    "thread_dim_limit_x": 1024,
    "thread_dim_limit_y": 1024,
    "thread_dim_limit_z": 64,
    "device_address_bits": 64,
    "device_vendor": "NVIDIA Corporation",
}
"""The same on every card, unknown to an old XLA."""


def is_old() -> bool:
    """Whether JAX is older than 0.10, whose XLA knows fewer fields and tries tiles on a GPU."""
    major, minor = metadata.version("jax").split(".")[:2]
    return (int(major), int(minor)) < (0, 10)


def flags() -> tuple[str, ...]:
    """What ``XLA_FLAGS`` must say where there is no GPU to try tiles of products on."""
    return ("--xla_gpu_autotune_level=0",) if is_old() else ()


def description(accelerator: Accelerator) -> str:
    """A GPU as a ``GpuTargetConfigProto`` in text form.

    Args:
        accelerator: one of :data:`balora_jax.hardware.GPUS`.
    """
    gpu = accelerator.gpu
    assert gpu is not None
    limits = CAPABILITIES[gpu.capability]
    major, minor = gpu.capability
    # Instructions that only this architecture has; XLA names them so from Hopper on.
    special = {"feature_extension": Word("ACCELERATED_FEATURES")} if major >= 9 else {}
    device = LIMITS | {
        "core_count": gpu.processors,
        "fpus_per_core": limits.lanes,
        "clock_rate_ghz": gpu.clock,
        "memory_bandwidth": int(accelerator.bandwidth),
        "device_memory_size": accelerator.memory,
        "l2_cache_size": gpu.cache,
        "shared_memory_per_core": limits.shared,
        "shared_memory_per_block_optin": limits.block_shared,
        "threads_per_core_limit": limits.threads,
        "cuda_compute_capability": {"major": major, "minor": minor} | special,
    }
    found = {
        "platform_name": "CUDA",
        "dnn_version_info": _parts(CUDNN),
        "device_description_str": gpu.title,
    }
    if not is_old():
        whole = f"{major}.{minor}{'a' if special else ''}"
        device |= NEWER_LIMITS | {
            "platform_version": f"Compute Capability {whole}",
            "name": gpu.title,
            "driver_version": _dotted(DRIVER),
            "runtime_version": _dotted(CUDA),
            "compile_time_toolkit_version": _dotted(CUDA),
            "dnn_version": _dotted(CUDNN),
        }
        found |= {"runtime_version": _parts(CUDA)}
    return _text(found | {"gpu_device_info": device})


class Word(str):
    """A name of an enumeration, which stands without quotes."""


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _parts(version: tuple[int, ...]) -> dict[str, int]:
    return dict(zip(("major", "minor", "patch"), version, strict=True))


def _text(fields: Mapping[str, Any]) -> str:
    """A message in the text form of protocol buffers."""
    lines = []
    for name, value in fields.items():
        if isinstance(value, Mapping):
            lines.append(f"{name} {{ {_text(value)} }}")
        elif isinstance(value, str) and not isinstance(value, Word):
            lines.append(f'{name}: "{value}"')
        else:
            lines.append(f"{name}: {value}")
    return " ".join(lines)
