"""Granite: Llama with factors of embeddings, scores, residuals and logits."""

from balora_jax.models.decoder_config import DecoderConfig
from balora_jax.models.families.base import FAMILIES, DecoderFamily, GgufLayout
from balora_jax.models.families.read_llama import attention_bias, read_decoder
from balora_jax.numerics.head_types import LogitMap
from balora_jax.untyped.fields import Fields

LEAST = 1e-6


def read(raw: Fields) -> DecoderConfig:
    """Granite 3, the dense ones; ``logits_scaling`` divides."""
    return read_decoder(
        raw,
        embedding_scale=raw.number("embedding_multiplier", 1.0, least=LEAST),
        query_scale=raw.number("attention_multiplier", 1.0, least=LEAST),
        residual_scale=raw.number("residual_multiplier", 1.0, least=LEAST),
        logit_map=LogitMap(scale=1.0 / raw.number("logits_scaling", 1.0, least=LEAST)),
        mlp_bias=raw.flag("mlp_bias", default=False),
        **attention_bias(raw),
    )


GRANITE = FAMILIES.register(
    DecoderFamily("granite", read, gguf=GgufLayout("granite", meta_rows=True))
)
