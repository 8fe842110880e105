"""Options of a model, whatever its family."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import jax.numpy as jnp

from balora_jax.errors import InputError
from balora_jax.models.adapters import AdapterShape
from balora_jax.models.quantized import Quantization

Remat = Literal["none", "dots", "full", "offload"]
AttentionKernel = Literal["auto", "xla", "blocks", "cudnn"]


@dataclass(frozen=True)
class Options:
    """Choices of a run, where a family's config is what the checkpoint fixes.

    Attributes:
        adapters: of stacked linear layers, by path.
        dtype: of frozen weights and activations.
        remat: what the backward computes anew.
        kernel: of attention; decoders read it. ``auto`` is for GPUs: see :func:`kernel_on`.
        quantization: of the linear layers.
    """

    adapters: Mapping[str, AdapterShape] = field(default_factory=dict)
    dtype: jnp.dtype = field(default_factory=lambda: jnp.dtype(jnp.float32))
    remat: Remat = "none"
    kernel: AttentionKernel = "xla"
    quantization: Quantization = "none"


def kernel_on(platform: str, kernel: AttentionKernel, where: str) -> AttentionKernel:
    """The kernel of attention on devices of a platform.

    ``auto`` is cuDNN's on a GPU where it serves, ``blocks`` on a CPU, and ``xla`` on a TPU, where
    the time of ``blocks`` is not known.

    Args:
        platform: ``cpu``, ``gpu`` or ``tpu``, of the devices that are to run it.
        kernel: what was asked for.
        where: the setting's name, for the message.

    Raises:
        InputError: ``cudnn`` for other devices than a GPU.
    """
    if platform == "gpu":
        return kernel
    if kernel == "cudnn":
        raise InputError(
            f"{where}: expected auto, xla or blocks on a {platform}, got cudnn, which runs on a "
            "GPU only. Choose another."
        )
    if kernel == "auto":
        return "blocks" if platform == "cpu" else "xla"
    return kernel
