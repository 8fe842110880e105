"""Options of a model, whatever its family."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import jax.numpy as jnp

from balora_jax.models.adapters import AdapterShape
from balora_jax.models.quantized import Quantization

Remat = Literal["none", "dots", "full", "offload"]
AttentionKernel = Literal["auto", "xla", "cudnn"]


@dataclass(frozen=True)
class Options:
    """What is chosen for a run, where a family's config is what the checkpoint fixes.

    Attributes:
        adapters: of stacked linear layers, by path.
        dtype: of frozen weights and activations.
        remat: what the backward computes anew.
        kernel: of attention; decoders read it.
        quantization: of the linear layers.
    """

    adapters: Mapping[str, AdapterShape] = field(default_factory=dict)
    dtype: jnp.dtype = field(default_factory=lambda: jnp.dtype(jnp.float32))
    remat: Remat = "none"
    kernel: AttentionKernel = "auto"
    quantization: Quantization = "none"
