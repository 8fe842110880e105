"""Which model a checkpoint is: its ``config.json`` to our config, one function for each family."""

from collections.abc import Callable, Mapping
from typing import Any

from balora_jax.errors import InputError
from balora_jax.models.decoder_config import DecoderConfig
from balora_jax.models.layers import ACTIVATIONS
from balora_jax.models.rope_settings import rope_by_layer, rope_config
from balora_jax.numerics.head import LogitMap

Raw = Mapping[str, Any]


def decoder_config(raw: Raw, where: str) -> DecoderConfig:
    """The decoder that a Hugging Face ``config.json`` describes.

    Args:
        raw: the parsed file.
        where: its path, for messages.

    Raises:
        InputError: an unsupported ``model_type``, a missing key, or an option this code lacks.
    """
    model_type = raw.get("model_type")
    if model_type not in FAMILIES:
        raise InputError(
            f"{where}: expected model_type to be one of {', '.join(FAMILIES)}, "
            f"got {model_type!r}. Use a checkpoint of one of these families, or an encoder (bert, "
            "roberta, deberta-v2) with task: labels."
        )
    if raw.get("use_bidirectional_attention"):
        raise InputError(
            f"{where}: expected a causal model, got use_bidirectional_attention="
            f"{raw['use_bidirectional_attention']!r}. This checkpoint cannot be run exactly."
        )
    return FAMILIES[model_type](raw, where)


def _llama(raw: Raw, where: str) -> DecoderConfig:
    bias = bool(raw.get("attention_bias", False))
    return _shared(
        raw, where, qkv_bias=bias, output_bias=bias, mlp_bias=bool(raw.get("mlp_bias", False))
    )


def _mistral(raw: Raw, where: str) -> DecoderConfig:
    return _shared(raw, where, kv_heads=8, sliding_window=raw.get("sliding_window", 4096))


def _mixtral(raw: Raw, where: str) -> DecoderConfig:
    return _shared(
        raw,
        where,
        kv_heads=8,
        norm_eps=1e-5,
        rope=rope_config(raw, where, default_theta=1e6),
        sliding_window=raw.get("sliding_window"),
        experts=raw.get("num_local_experts", 8),
        experts_per_token=raw.get("num_experts_per_tok", 2),
    )


def _qwen2(raw: Raw, where: str) -> DecoderConfig:
    return _shared(raw, where, kv_heads=32, qkv_bias=True, **_qwen_windows(raw, where))


def _qwen3(raw: Raw, where: str) -> DecoderConfig:
    bias = bool(raw.get("attention_bias", False))
    return _shared(
        raw,
        where,
        kv_heads=32,
        head_dim=raw.get("head_dim", 128),
        qk_norm=True,
        qkv_bias=bias,
        output_bias=bias,
        **_qwen_windows(raw, where),
    )


def _qwen_windows(raw: Raw, where: str) -> dict[str, Any]:
    """Layers from ``max_window_layers`` on have the window, if it is used at all."""
    if not raw.get("use_sliding_window", False) or raw.get("sliding_window", 4096) is None:
        return {}
    layers, first = required(raw, "num_hidden_layers", where), raw.get("max_window_layers", 28)
    slides = tuple(i >= first for i in range(layers))
    return _windows(raw, where, raw.get("sliding_window", 4096), slides)


def _gemma(raw: Raw, where: str, **changes: Any) -> DecoderConfig:
    """Gemma 1. Its first checkpoints say ``gelu`` and mean the approximation."""
    bias = bool(raw.get("attention_bias", False))
    activation = raw.get("hidden_activation") or raw.get("hidden_act") or "gelu_pytorch_tanh"
    options: dict[str, Any] = {
        "kv_heads": 16,
        "head_dim": raw.get("head_dim", 256),
        "activation": "gelu_pytorch_tanh" if activation == "gelu" else activation,
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", True)),
        "norm": "rms_plus_one",
        "embedding_scale": float(required(raw, "hidden_size", where)) ** 0.5,
        "qkv_bias": bias,
        "output_bias": bias,
    }
    return _shared(raw, where, **{**options, **changes})


def _gemma2(raw: Raw, where: str) -> DecoderConfig:
    return _gemma(
        raw,
        where,
        kv_heads=4,
        attention_soft_cap=raw.get("attn_logit_softcapping", 50.0),
        logit_map=LogitMap(soft_cap=raw.get("final_logit_softcapping", 30.0)),
        **_gemma_attention(raw, where, every=2),
    )


def _gemma3(raw: Raw, where: str) -> DecoderConfig:
    rope, local = rope_by_layer(raw, where, default_theta=1e6, default_local_theta=1e4)
    return _gemma(
        raw,
        where,
        kv_heads=4,
        qk_norm=True,
        rope=rope,
        local_rope=local,
        logit_map=LogitMap(soft_cap=raw.get("final_logit_softcapping")),
        **_gemma_attention(raw, where, every=raw.get("sliding_window_pattern", 6)),
    )


def _gemma_attention(raw: Raw, where: str, *, every: int) -> dict[str, Any]:
    """Norms on both sides, and a window in all but each ``every``-th layer."""
    layers = required(raw, "num_hidden_layers", where)
    slides = tuple((i + 1) % every != 0 for i in range(layers))
    return {
        "sandwich_norms": True,
        "query_scale": float(raw.get("query_pre_attn_scalar", 256)) ** -0.5,
        **_windows(raw, where, raw.get("sliding_window", 4096), slides),
    }


def _phi3(raw: Raw, where: str) -> DecoderConfig:
    return _shared(
        raw,
        where,
        norm_eps=1e-5,
        fused_projections=True,
        sliding_window=raw.get("sliding_window"),
    )


def _gpt2(raw: Raw, where: str) -> DecoderConfig:
    for option in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if raw.get(option):
            raise InputError(
                f"{where}: expected {option} to be false, got {raw[option]!r}. This checkpoint "
                "cannot be run exactly."
            )
    width, heads = required(raw, "n_embd", where), required(raw, "n_head", where)
    return DecoderConfig(
        model_type="gpt2",
        vocab_size=required(raw, "vocab_size", where),
        hidden_size=width,
        intermediate_size=raw.get("n_inner") or 4 * width,
        num_layers=required(raw, "n_layer", where),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        norm_eps=float(raw.get("layer_norm_epsilon", 1e-5)),
        norm="layer",
        activation=_activation(raw.get("activation_function", "gelu_new"), where),
        rope=None,
        max_length=required(raw, "n_positions", where),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", True)),
        query_scale=None if raw.get("scale_attn_weights", True) else 1.0,
    )


# Also the list that a message gives.
FAMILIES: dict[str, Callable[[Raw, str], DecoderConfig]] = {
    "llama": _llama,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
    "gpt2": _gpt2,
}


def _shared(
    raw: Raw, where: str, *, kv_heads: int | None = None, norm_eps: float = 1e-6, **options: Any
) -> DecoderConfig:
    """What these families state alike; ``kv_heads`` and ``norm_eps`` are the family's defaults."""
    heads, width = (
        required(raw, "num_attention_heads", where),
        required(raw, "hidden_size", where),
    )
    found: dict[str, Any] = {
        "model_type": raw["model_type"],
        "vocab_size": required(raw, "vocab_size", where),
        "hidden_size": width,
        "intermediate_size": required(raw, "intermediate_size", where),
        "num_layers": required(raw, "num_hidden_layers", where),
        "num_heads": heads,
        "num_kv_heads": raw.get("num_key_value_heads", kv_heads or heads) or heads,
        "head_dim": raw.get("head_dim") or width // heads,
        "norm_eps": float(raw.get("rms_norm_eps", norm_eps)),
        "activation": raw.get("hidden_act", "silu"),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "max_length": required(raw, "max_position_embeddings", where),
        **options,
    }
    found["activation"] = _activation(found["activation"], where)
    if "rope" not in found:
        found["rope"] = rope_config(raw, where)
    return DecoderConfig(**found)


def _windows(raw: Raw, where: str, window: int | None, slides: tuple[bool, ...]) -> dict[str, Any]:
    """The window and its layers; ``layer_types`` says which, where a config has it."""
    kinds = raw.get("layer_types")
    if kinds is not None:
        known = {"sliding_attention": True, "full_attention": False}
        if len(kinds) != len(slides) or not set(kinds) <= set(known):
            raise InputError(
                f"{where}: expected layer_types to name one of {', '.join(known)} for each of "
                f"{len(slides)} layers, got {kinds!r}. This checkpoint cannot be run exactly."
            )
        slides = tuple(known[kind] for kind in kinds)
    return {"sliding_window": window, "sliding_layers": slides}


def _activation(name: str, where: str) -> str:
    if name not in ACTIVATIONS:
        raise InputError(
            f"{where}: expected the activation to be one of {', '.join(ACTIVATIONS)}, "
            f"got {name!r}. This checkpoint cannot be run exactly."
        )
    return name


def required(raw: Raw, key: str, where: str) -> Any:
    """The value of a key that every config of its family has."""
    if raw.get(key) is None:
        raise InputError(
            f"{where}: expected the key {key!r}, got none. Use the config.json that was "
            "saved with the weights."
        )
    return raw[key]
