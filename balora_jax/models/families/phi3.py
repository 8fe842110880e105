"""Phi-3 and Phi-3.5: q, k, v in one layer, gate and up in one, and LongRoPE."""

from balora_jax.errors import InputError
from balora_jax.models.decoder_config import DecoderConfig
from balora_jax.models.families.base import FAMILIES, DecoderFamily, GgufLayout
from balora_jax.models.families.read_llama import read_decoder, window_size
from balora_jax.models.rope_settings import rope_config
from balora_jax.models.rotary import RopeConfig
from balora_jax.untyped.fields import Fields


def read(raw: Fields) -> DecoderConfig:
    """Phi-3."""
    return read_decoder(
        raw,
        norm_eps=1e-5,
        fused_projections=True,
        sliding_window=window_size(raw, None),
        rope=_rope(raw),
    )


def _rope(raw: Fields) -> RopeConfig:
    """LongRoPE, which first checkpoints call "su" or "yarn", or none; a part of a head may turn.

    The length of pretraining is that of the top level, whatever the scaling says.
    """
    raw = Fields({"original_max_position_embeddings": 4096, **raw.values}, raw.where)
    rope = rope_config(raw, partial=True, renamed={"su": "longrope", "yarn": "longrope"})
    if rope.kind not in ("default", "longrope"):
        raise InputError(
            f"{raw.where}: expected the rope type to be default or longrope, got {rope.kind!r}. "
            "This checkpoint cannot be run exactly."
        )
    return rope


PHI3 = FAMILIES.register(DecoderFamily("phi3", read, gguf=GgufLayout("phi3")))
