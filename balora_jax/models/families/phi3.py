"""Phi-3 and Phi-3.5: q, k, v in one layer, gate and up in one, and LongRoPE."""

from balora_jax.models.decoder_config import DecoderConfig
from balora_jax.models.families.base import FAMILIES, DecoderFamily
from balora_jax.models.families.read_llama import read_decoder, window_size
from balora_jax.untyped.fields import Fields


def read(raw: Fields) -> DecoderConfig:
    """Phi-3."""
    window = window_size(raw, None)
    return read_decoder(raw, norm_eps=1e-5, fused_projections=True, sliding_window=window)


PHI3 = FAMILIES.register(DecoderFamily("phi3", read))
