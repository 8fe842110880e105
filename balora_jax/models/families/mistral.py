"""Mistral: a window over all layers."""

from balora_jax.models.decoder_config import DecoderConfig
from balora_jax.models.families.base import FAMILIES, DecoderFamily, GgufLayout
from balora_jax.models.families.read_llama import read_decoder, window_size
from balora_jax.untyped.fields import Fields


def read(raw: Fields) -> DecoderConfig:
    """Mistral; ``sliding_window`` is null from version 0.2 on."""
    return read_decoder(raw, kv_heads=8, sliding_window=window_size(raw, 4096))


MISTRAL = FAMILIES.register(
    DecoderFamily("mistral", read, gguf=GgufLayout("llama", meta_rows=True))
)
