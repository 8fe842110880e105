"""Qwen3: norms over every head of q and k; windows as in Qwen2."""

from balora_jax.models.decoder_config import DecoderConfig
from balora_jax.models.families.base import FAMILIES, DecoderFamily, GgufLayout
from balora_jax.models.families.qwen2 import upper_windows
from balora_jax.models.families.read_llama import attention_bias, read_decoder
from balora_jax.untyped.fields import Fields


def read(raw: Fields) -> DecoderConfig:
    """Qwen3, the dense ones."""
    return read_decoder(
        raw,
        kv_heads=32,
        head_dim=128,
        qk_norm="head",
        **attention_bias(raw),
        **upper_windows(raw),
    )


QWEN3 = FAMILIES.register(DecoderFamily("qwen3", read, gguf=GgufLayout("qwen3")))
