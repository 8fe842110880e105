"""SmolLM3: Llama with layers that have no positions."""

from collections.abc import Mapping
from typing import Any

from balora_jax.errors import InputError
from balora_jax.models.decoder_config import DecoderConfig
from balora_jax.models.families.base import FAMILIES, DecoderFamily, GgufLayout
from balora_jax.models.families.read_llama import (
    attention_bias,
    read_decoder,
    window_size,
    windows_by_layer,
)
from balora_jax.models.rope_settings import rope_config
from balora_jax.models.sizes import LAYERS
from balora_jax.untyped.fields import Fields
from balora_jax.untyped.shown import shown


def read(raw: Fields) -> DecoderConfig:
    """SmolLM3."""
    rotates = _rotated_layers(raw)
    return read_decoder(
        raw,
        kv_heads=4,
        tie_word_embeddings=raw.flag("tie_word_embeddings", default=True),
        rope=rope_config(raw, default_theta=2e6),
        rotated_layers=rotates,
        mlp_bias=raw.flag("mlp_bias", default=False),
        **attention_bias(raw),
        **_windows(raw, rotates),
    )


def _rotated_layers(raw: Fields) -> tuple[bool, ...]:
    """``no_rope_layers`` says 1 for a layer with positions; else each fourth layer has none."""
    layers = raw.integer("num_hidden_layers", most=LAYERS)
    said = raw.values.get("no_rope_layers")
    if said is None:
        every = raw.integer("no_rope_layer_interval", 4, most=LAYERS)
        return tuple((i + 1) % every != 0 for i in range(layers))
    if not isinstance(said, list) or len(said) < layers or any(one not in (0, 1) for one in said):
        raise InputError(
            f"{raw.where}: expected no_rope_layers to hold 0 or 1 for each of {layers} layers, got "
            f"{shown(said)}. Use the config.json that was saved with the weights."
        )
    return tuple(one == 1 for one in said[:layers])


def _windows(raw: Fields, rotates: tuple[bool, ...]) -> Mapping[str, Any]:
    """Where a window is used, the layers without positions have it."""
    window = window_size(raw, None)
    if not raw.flag("use_sliding_window", default=False) or window is None:
        return {}
    return windows_by_layer(raw, window, tuple(not turns for turns in rotates))


SMOLLM3 = FAMILIES.register(
    DecoderFamily("smollm3", read, gguf=GgufLayout("smollm3", meta_rows=True))
)
