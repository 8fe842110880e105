"""Llama."""

from balora_jax.models.decoder_config import DecoderConfig
from balora_jax.models.families.base import FAMILIES, DecoderFamily, GgufLayout
from balora_jax.models.families.read_llama import attention_bias, read_decoder
from balora_jax.untyped.fields import Fields


def read(raw: Fields) -> DecoderConfig:
    """Llama 1 to 3."""
    return read_decoder(raw, **attention_bias(raw), mlp_bias=raw.flag("mlp_bias", default=False))


LLAMA = FAMILIES.register(DecoderFamily("llama", read, gguf=GgufLayout("llama", meta_rows=True)))
