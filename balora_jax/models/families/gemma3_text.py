"""Gemma 3's text models: norms of q and k, and other positions in the layers with a window."""

from balora_jax.models.decoder_config import DecoderConfig
from balora_jax.models.families.base import FAMILIES, DecoderFamily, GgufLayout
from balora_jax.models.families.gemma import later_attention, read_gemma, soft_cap
from balora_jax.models.rope_settings import rope_by_layer
from balora_jax.models.sizes import LAYERS
from balora_jax.numerics.head_types import LogitMap
from balora_jax.untyped.fields import Fields


def read(raw: Fields) -> DecoderConfig:
    """Gemma 3, text only."""
    keys = ("rope_theta", "rope_local_base_freq")
    rope, local = rope_by_layer(raw, theta_keys=keys, thetas=(1e6, 1e4))
    every = raw.integer("sliding_window_pattern", 6, most=LAYERS)
    return read_gemma(
        raw,
        kv_heads=4,
        qk_norm="head",
        rope=rope,
        local_rope=local,
        logit_map=LogitMap(soft_cap=soft_cap(raw, "final_logit_softcapping", None)),
        **later_attention(raw, every=every),
    )


GEMMA3_TEXT = FAMILIES.register(DecoderFamily("gemma3_text", read, gguf=GgufLayout("gemma3")))
