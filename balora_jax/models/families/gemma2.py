"""Gemma 2: soft caps of scores and logits, and a window in every other layer."""

from balora_jax.models.decoder_config import DecoderConfig
from balora_jax.models.families.base import FAMILIES, DecoderFamily, GgufLayout
from balora_jax.models.families.gemma import later_attention, read_gemma, soft_cap
from balora_jax.numerics.head_types import LogitMap
from balora_jax.untyped.fields import Fields


def read(raw: Fields) -> DecoderConfig:
    """Gemma 2."""
    return read_gemma(
        raw,
        kv_heads=4,
        attention_soft_cap=soft_cap(raw, "attn_logit_softcapping", 50.0),
        logit_map=LogitMap(soft_cap=soft_cap(raw, "final_logit_softcapping", 30.0)),
        **later_attention(raw, every=2),
    )


GEMMA2 = FAMILIES.register(DecoderFamily("gemma2", read, gguf=GgufLayout("gemma2")))
