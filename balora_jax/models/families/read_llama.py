"""Settings that the configs of decoders with Llama's keys state alike."""

from collections.abc import Mapping
from typing import Any

from balora_jax.errors import InputError
from balora_jax.models.decoder_config import DecoderConfig
from balora_jax.models.layers import ACTIVATIONS
from balora_jax.models.rope_settings import rope_config
from balora_jax.models.sizes import HEADS, LAYERS, POSITIONS, VOCABULARY, WIDTH
from balora_jax.untyped.fields import Fields
from balora_jax.untyped.shown import shown


def read_decoder(
    raw: Fields,
    *,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    norm_eps: float = 1e-6,
    **options: Any,
) -> DecoderConfig:
    """A config of Llama's keys.

    Args:
        raw: the parsed ``config.json``.
        kv_heads: the family's default where the config has none, else the number of heads.
        head_dim: likewise, else the width over the heads.
        norm_eps: likewise.
        options: fields of the config that the family reads in its own way, or fixes.
    """
    refuse_two_directions(raw)
    heads = raw.integer("num_attention_heads", most=HEADS)
    width = raw.integer("hidden_size", most=WIDTH)
    kv_heads = heads if kv_heads is None or raw.says_null("num_key_value_heads") else kv_heads
    if raw.has("num_key_value_heads"):
        kv_heads = raw.integer("num_key_value_heads", most=HEADS)
    head_dim = width // heads if head_dim is None or raw.says_null("head_dim") else head_dim
    if raw.has("head_dim"):
        head_dim = raw.integer("head_dim", most=WIDTH)
    if heads % kv_heads or head_dim < 1:
        raise InputError(
            f"{raw.where}: expected num_attention_heads to be a multiple of num_key_value_heads "
            f"and at most hidden_size, got {heads}, {kv_heads} and {width}. Use the config.json "
            "that was saved with the weights."
        )
    found: dict[str, Any] = {
        "model_type": raw.values["model_type"],
        "vocab_size": raw.integer("vocab_size", most=VOCABULARY),
        "hidden_size": width,
        "intermediate_size": raw.integer("intermediate_size", most=WIDTH),
        "num_layers": raw.integer("num_hidden_layers", most=LAYERS),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "norm_eps": raw.number("rms_norm_eps", norm_eps, most=1.0),
        "tie_word_embeddings": raw.flag("tie_word_embeddings", default=False),
        "max_length": raw.integer("max_position_embeddings", most=POSITIONS),
    }
    if "activation" not in options:
        found["activation"] = raw.choice("hidden_act", ACTIVATIONS, "silu")
    if "rope" not in options:
        found["rope"] = rope_config(raw)
    return DecoderConfig(**{**found, **options})


def attention_bias(raw: Fields) -> dict[str, bool]:
    """One flag for the biases of q, k, v and o."""
    bias = raw.flag("attention_bias", default=False)
    return {"qkv_bias": bias, "output_bias": bias}


def window_size(raw: Fields, default: int | None) -> int | None:
    """Tokens that a query looks back over; ``null`` is for all."""
    if raw.says_null("sliding_window") or (default is None and not raw.has("sliding_window")):
        return None
    return raw.integer("sliding_window", default or 1, most=POSITIONS)


def windows_by_layer(
    raw: Fields, window: int | None, slides: tuple[bool, ...]
) -> Mapping[str, Any]:
    """The window and its layers; ``layer_types`` says which, where a config has it."""
    kinds = raw.values.get("layer_types")
    if kinds is not None:
        known = {"sliding_attention": True, "full_attention": False}
        named = isinstance(kinds, list | tuple) and all(str(kind) in known for kind in kinds)
        if not named or len(kinds) != len(slides):
            raise InputError(
                f"{raw.where}: expected layer_types to name one of {', '.join(known)} for each of "
                f"{len(slides)} layers, got {shown(kinds)}. This checkpoint cannot be run exactly."
            )
        slides = tuple(known[str(kind)] for kind in kinds)
    return {"sliding_window": window, "sliding_layers": slides}


def refuse_two_directions(raw: Fields) -> None:
    """Raises InputError for a decoder that was trained as an encoder."""
    if raw.flag("use_bidirectional_attention", default=False):
        raise InputError(
            f"{raw.where}: expected a causal model, got use_bidirectional_attention="
            f"{raw.values['use_bidirectional_attention']!r}. This checkpoint cannot be run exactly."
        )
