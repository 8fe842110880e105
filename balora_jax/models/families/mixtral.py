"""Mixtral: a router and experts in place of the MLP."""

from balora_jax.errors import InputError
from balora_jax.models.decoder_config import DecoderConfig
from balora_jax.models.families.base import FAMILIES, DecoderFamily
from balora_jax.models.families.read_llama import read_decoder, window_size
from balora_jax.models.rope_settings import rope_config
from balora_jax.untyped.fields import Fields

MOST_EXPERTS = 4096


def read(raw: Fields) -> DecoderConfig:
    """Mixtral."""
    experts = raw.integer("num_local_experts", 8, most=MOST_EXPERTS)
    taken = raw.integer("num_experts_per_tok", 2, most=MOST_EXPERTS)
    if taken > experts:
        raise InputError(
            f"{raw.where}: expected num_experts_per_tok of at most num_local_experts = {experts}, "
            f"got {taken}. Use the config.json that was saved with the weights."
        )
    return read_decoder(
        raw,
        kv_heads=8,
        norm_eps=1e-5,
        rope=rope_config(raw, default_theta=1e6),
        sliding_window=window_size(raw, None),
        experts=experts,
        experts_per_token=taken,
    )


MIXTRAL = FAMILIES.register(DecoderFamily("mixtral", read))
