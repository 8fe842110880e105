"""Mixtral: a router and experts in place of the MLP."""

from balora_jax.errors import InputError
from balora_jax.models.decoder_config import DecoderConfig
from balora_jax.models.families.base import FAMILIES, DecoderFamily, GgufLayout
from balora_jax.models.families.read_llama import read_decoder, window_size
from balora_jax.models.rope_settings import rope_config
from balora_jax.untyped.fields import Fields

MOST_EXPERTS = 4096


def read(raw: Fields) -> DecoderConfig:
    """Mixtral."""
    return read_decoder(
        raw,
        kv_heads=8,
        norm_eps=1e-5,
        rope=rope_config(raw, default_theta=1e6),
        sliding_window=window_size(raw, None),
        **read_experts(raw, "num_local_experts", 8, taken=2),
    )


def read_experts(raw: Fields, key: str, default: int, *, taken: int) -> dict[str, int]:
    """How many experts there are, and how many of them a token takes.

    Args:
        raw: the parsed ``config.json``.
        key: of their number.
        default: of it.
        taken: default of how many are taken.

    Raises:
        InputError: more are taken than there are.
    """
    experts = raw.integer(key, default, most=MOST_EXPERTS)
    taken = raw.integer("num_experts_per_tok", taken, most=MOST_EXPERTS)
    if taken > experts:
        raise InputError(
            f"{raw.where}: expected num_experts_per_tok of at most {key} = {experts}, "
            f"got {taken}. Use the config.json that was saved with the weights."
        )
    return {"experts": experts, "experts_per_token": taken}


MIXTRAL = FAMILIES.register(
    DecoderFamily("mixtral", read, gguf=GgufLayout("llama", meta_rows=True))
)
