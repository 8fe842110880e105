"""Qwen2 and Qwen2.5: biases on q, k and v, and a window in the upper layers if it is used."""

from collections.abc import Mapping
from typing import Any

from balora_jax.models.decoder_config import DecoderConfig
from balora_jax.models.families.base import FAMILIES, DecoderFamily, GgufLayout
from balora_jax.models.families.read_llama import read_decoder, window_size, windows_by_layer
from balora_jax.models.sizes import LAYERS
from balora_jax.untyped.fields import Fields


def read(raw: Fields) -> DecoderConfig:
    """Qwen2."""
    return read_decoder(raw, kv_heads=32, qkv_bias=True, **upper_windows(raw))


def upper_windows(raw: Fields) -> Mapping[str, Any]:
    """Layers from ``max_window_layers`` on have the window, if it is used at all."""
    window = window_size(raw, 4096)
    if not raw.flag("use_sliding_window", default=False) or window is None:
        return {}
    layers = raw.integer("num_hidden_layers", most=LAYERS)
    first = raw.integer("max_window_layers", 28, least=0)
    return windows_by_layer(raw, window, tuple(i >= first for i in range(layers)))


QWEN2 = FAMILIES.register(DecoderFamily("qwen2", read, gguf=GgufLayout("qwen2")))
