"""Which model a checkpoint is: its ``config.json`` to our config, and the names of its weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from balora_jax.errors import InputError
from balora_jax.models.adapters import LinearShape
from balora_jax.models.decoder import DecoderConfig
from balora_jax.models.layers import ACTIVATIONS, RopeConfig


@dataclass(frozen=True)
class WeightRule:
    """Where one of our arrays lives in a checkpoint.

    Attributes:
        path: our dotted path, ``layers.self_attn.q_proj.kernel``.
        name: the checkpoint's name, with ``{i}`` for the layer index of a stacked array.
        transpose: whether the checkpoint stores [out, in] where we hold [in, out].
    """

    path: str
    name: str
    transpose: bool

    @property
    def stacked(self) -> bool:
        """Whether our array stacks one checkpoint tensor per layer on its leading axis."""
        return "{i}" in self.name

    def names(self, count: int) -> tuple[str, ...]:
        """Names of the checkpoint's tensors, in the order of our array's leading axis."""
        return tuple(self.name.format(i=i) for i in range(count)) if self.stacked else (self.name,)


SUPPORTED = ("llama", "mistral")

# Checkpoint entries that carry no weight: old conversions stored the rotary frequencies.
IGNORED_WEIGHTS = (r".*rotary_emb\.inv_freq",)


def decoder_config(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    """The decoder that a Hugging Face ``config.json`` describes.

    Args:
        raw: the parsed file.
        where: its path, for messages.

    Raises:
        InputError: an unsupported ``model_type``, a missing key, or an option this code lacks.
    """
    model_type = raw.get("model_type")
    if model_type not in SUPPORTED:
        raise InputError(
            f"{where}: expected model_type to be one of {', '.join(SUPPORTED)}, "
            f"got {model_type!r}. Use a checkpoint of one of these families."
        )
    activation = raw.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise InputError(
            f"{where}: expected hidden_act to be one of {', '.join(ACTIVATIONS)}, "
            f"got {activation!r}. This checkpoint cannot be run exactly."
        )
    heads = _required(raw, "num_attention_heads", where)
    width = _required(raw, "hidden_size", where)
    llama = model_type == "llama"
    return DecoderConfig(
        model_type=model_type,
        vocab_size=_required(raw, "vocab_size", where),
        hidden_size=width,
        intermediate_size=_required(raw, "intermediate_size", where),
        num_layers=_required(raw, "num_hidden_layers", where),
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads", heads if llama else 8) or heads,
        head_dim=raw.get("head_dim") or width // heads,
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        activation=activation,
        rope=rope_config(raw, where),
        sliding_window=None if llama else raw.get("sliding_window", 4096),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        attention_bias=llama and bool(raw.get("attention_bias", False)),
        mlp_bias=llama and bool(raw.get("mlp_bias", False)),
        max_length=_required(raw, "max_position_embeddings", where),
    )


def rope_config(raw: Mapping[str, Any], where: str) -> RopeConfig:
    """Rotary settings from ``rope_parameters`` (new) or ``rope_theta`` and ``rope_scaling``."""
    scaling = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    _check_rope(raw, scaling, kind, where)
    theta = float(scaling.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    if kind == "default":
        return RopeConfig(theta=theta)
    original = _original_length(raw, scaling, kind)
    factor = scaling.get("factor")
    if factor is None and kind == "yarn":
        factor = raw.get("max_position_embeddings", 2048) / original
    if factor is None:
        raise InputError(
            f"{where}: expected a 'factor' in the rope scaling of type {kind!r}, got none. "
            "Correct the config."
        )
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=float(factor),
        original_length=int(original),
        low_freq_factor=float(scaling.get("low_freq_factor", 1.0)),
        high_freq_factor=float(scaling.get("high_freq_factor", 4.0)),
        beta_fast=float(scaling.get("beta_fast") or 32.0),
        beta_slow=float(scaling.get("beta_slow") or 1.0),
        attention_factor=_attention_factor(scaling, kind, float(factor)),
        truncate=bool(scaling.get("truncate", True)),
    )


def _check_rope(raw: Mapping[str, Any], scaling: Mapping[str, Any], kind: str, where: str) -> None:
    """Refuse what would be silently misread: another type, tables per layer, partial rotation."""
    if any(isinstance(value, Mapping) for value in scaling.values()):
        raise InputError(
            f"{where}: expected one set of rope parameters, got one for each kind of layer "
            f"({', '.join(scaling)}). This checkpoint cannot be run exactly."
        )
    known = ("default", "linear", "dynamic", "llama3", "yarn")
    if kind not in known:
        raise InputError(
            f"{where}: expected the rope type to be one of {', '.join(known)}, got {kind!r}. "
            "This checkpoint cannot be run exactly."
        )
    partial = scaling.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise InputError(
            f"{where}: expected partial_rotary_factor to be 1, got {partial}. "
            "This checkpoint cannot be run exactly."
        )


def _original_length(raw: Mapping[str, Any], scaling: Mapping[str, Any], kind: str) -> int:
    """Context of pretraining; as in transformers, ``dynamic`` measures from the configured one."""
    context = raw.get("max_position_embeddings", 2048)
    if kind == "dynamic":
        return context
    key = "original_max_position_embeddings"
    return raw.get(key) or scaling.get(key) or context


def _attention_factor(scaling: Mapping[str, Any], kind: str, factor: float) -> float:
    """YaRN's temperature on cos and sin. Source: the YaRN paper; DeepSeek's two mscales."""
    if kind != "yarn":
        return 1.0
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return mscale(float(scaling["mscale"])) / mscale(float(scaling["mscale_all_dim"]))
    return mscale(1.0)


def _required(raw: Mapping[str, Any], key: str, where: str) -> Any:
    if raw.get(key) is None:
        raise InputError(
            f"{where}: expected the key {key!r}, got none. Use the config.json that was "
            "saved with the weights."
        )
    return raw[key]


def weight_rules(config: DecoderConfig) -> tuple[WeightRule, ...]:
    """The weight-name table of a decoder's checkpoint."""
    rules = [
        WeightRule("embed_tokens.embedding", "model.embed_tokens.weight", False),
        WeightRule("norm.scale", "model.norm.weight", False),
    ]
    if not config.tie_word_embeddings:
        rules.append(WeightRule("lm_head.embedding", "lm_head.weight", False))
    biased = {"self_attn": config.attention_bias, "mlp": config.mlp_bias}
    linears = [("self_attn", name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    linears += [("mlp", name) for name in ("gate_proj", "up_proj", "down_proj")]
    for block, name in linears:
        stem, source = f"layers.{block}.{name}", f"model.layers.{{i}}.{block}.{name}"
        rules.append(WeightRule(f"{stem}.kernel", f"{source}.weight", True))
        if biased[block]:
            rules.append(WeightRule(f"{stem}.bias", f"{source}.bias", False))
    for name in ("input_layernorm", "post_attention_layernorm"):
        rules.append(WeightRule(f"layers.{name}.scale", f"model.layers.{{i}}.{name}.weight", False))
    return tuple(rules)


def ignored_weights(config: DecoderConfig) -> tuple[str, ...]:
    """Patterns of checkpoint names that may be left over; a tied head may be stored as well."""
    tied = (r"lm_head\.weight",) if config.tie_word_embeddings else ()
    return IGNORED_WEIGHTS + tied


def linear_shapes(
    config: DecoderConfig, frozen: Mapping[str, jax.ShapeDtypeStruct]
) -> tuple[LinearShape, ...]:
    """The stacked linear layers that may be adapted (the head and embeddings stay frozen)."""
    shapes = []
    for rule in weight_rules(config):
        if rule.path.startswith("layers.") and rule.path.endswith(".kernel"):
            layers, d_in, d_out = frozen[rule.path].shape
            names = tuple(name.removesuffix(".weight") for name in rule.names(layers))
            shapes.append(LinearShape(rule.path.removesuffix(".kernel"), names, d_in, d_out))
    return tuple(shapes)
