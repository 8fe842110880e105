"""Gemma, and what Gemma 2 and 3 have of it."""

from typing import Any

from balora_jax.models.decoder_config import DecoderConfig
from balora_jax.models.families.base import FAMILIES, DecoderFamily, GgufLayout
from balora_jax.models.families.read_llama import (
    attention_bias,
    read_decoder,
    window_size,
    windows_by_layer,
)
from balora_jax.models.layers import ACTIVATIONS
from balora_jax.models.sizes import LAYERS, WIDTH
from balora_jax.untyped.fields import Fields


def read(raw: Fields) -> DecoderConfig:
    """Gemma 1."""
    return read_gemma(raw, kv_heads=16)


def read_gemma(raw: Fields, **changes: Any) -> DecoderConfig:
    """What all of them share. Gemma 1's first checkpoints say ``gelu`` and mean the approximation.

    Args:
        raw: the parsed ``config.json``.
        changes: fields in which a later one differs.
    """
    key = "hidden_activation" if raw.has("hidden_activation") else "hidden_act"
    activation = raw.choice(key, ACTIVATIONS, "gelu_pytorch_tanh")
    options: dict[str, Any] = {
        "head_dim": 256,
        "activation": "gelu_pytorch_tanh" if activation == "gelu" else activation,
        "tie_word_embeddings": raw.flag("tie_word_embeddings", default=True),
        "norm": "rms_plus_one",
        "embedding_scale": float(raw.integer("hidden_size", most=WIDTH)) ** 0.5,
        **attention_bias(raw),
    }
    return read_decoder(raw, **{**options, **changes})


def later_attention(raw: Fields, *, every: int) -> dict[str, Any]:
    """Gemma 2 and 3: norms on both sides, and a window in all but each ``every``-th layer."""
    layers = raw.integer("num_hidden_layers", most=LAYERS)
    slides = tuple((i + 1) % every != 0 for i in range(layers))
    return {
        "norms": "both",
        "query_scale": raw.number("query_pre_attn_scalar", 256.0, least=1e-6) ** -0.5,
        **windows_by_layer(raw, window_size(raw, 4096), slides),
    }


def soft_cap(raw: Fields, key: str, default: float | None) -> float | None:
    """A cap of scores or logits; ``null`` is for none."""
    if raw.says_null(key) or (default is None and not raw.has(key)):
        return None
    return raw.number(key, default or 0.0, least=1e-6)


GEMMA = FAMILIES.register(DecoderFamily("gemma", read, gguf=GgufLayout("gemma")))
