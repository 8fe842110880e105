"""Which encoder a checkpoint is: its ``config.json`` to our config, and the names of its weights.

Names are those of ``transformers``' classes for sequence classification; a checkpoint without a
head (a pretrained base) has all but those of ``head_weight_rules``.
"""

from collections.abc import Mapping
from typing import Any

from balora_jax.errors import InputError
from balora_jax.models.disentangled import DisentangledConfig
from balora_jax.models.encoder import ENCODER_ACTIVATIONS, EncoderConfig
from balora_jax.models.registry import required
from balora_jax.models.weight_names import WeightRule

# Of each family: the prefix of its weights, and what transformers assumes where a key is missing.
PREFIXES = {"bert": "bert", "roberta": "roberta", "deberta-v2": "deberta"}
DEFAULTS = {
    "bert": {"layer_norm_eps": 1e-12, "type_vocab_size": 2, "pad_token_id": 0},
    "roberta": {"layer_norm_eps": 1e-12, "type_vocab_size": 2, "pad_token_id": 1},
    "deberta-v2": {"layer_norm_eps": 1e-7, "type_vocab_size": 0, "pad_token_id": 0},
}

# Heads of pretraining and buffers of old versions; RoBERTa's pooler is not used for classes.
IGNORED_WEIGHTS = {
    "bert": (r"cls\..*", r"bert\.embeddings\.position_ids"),
    "roberta": (r"lm_head\..*", r"roberta\.embeddings\.position_ids", r"roberta\.pooler\..*"),
    "deberta-v2": (
        r"(cls|lm_predictions|mask_predictions)\..*",
        r"deberta\.embeddings\.position_ids",
    ),
}


def encoder_config(raw: Mapping[str, Any], where: str, *, num_labels: int) -> EncoderConfig:
    """The encoder that a Hugging Face ``config.json`` describes.

    Args:
        raw: the parsed file.
        where: its path, for messages.
        num_labels: classes of the head, 1 for regression.

    Raises:
        InputError: an unsupported ``model_type``, a missing key, or an option this code lacks.
    """
    model_type = raw.get("model_type")
    if model_type not in PREFIXES:
        raise InputError(
            f"{where}: expected model_type to be one of {', '.join(PREFIXES)}, "
            f"got {model_type!r}. Use a checkpoint of one of these families."
        )
    raw = {"hidden_act": "gelu", "initializer_range": 0.02, **DEFAULTS[model_type], **raw}
    deberta, roberta = model_type == "deberta-v2", model_type == "roberta"
    positions = required(raw, "max_position_embeddings", where)
    offset = required(raw, "pad_token_id", where) + 1 if roberta else 0
    _check_options(raw, where)
    return EncoderConfig(
        model_type=model_type,
        vocab_size=required(raw, "vocab_size", where),
        hidden_size=required(raw, "hidden_size", where),
        intermediate_size=required(raw, "intermediate_size", where),
        num_layers=required(raw, "num_hidden_layers", where),
        num_heads=required(raw, "num_attention_heads", where),
        norm_eps=float(raw["layer_norm_eps"]),
        activation=_activation(raw, "hidden_act", where),
        max_positions=positions,
        position_offset=offset,
        type_vocab_size=raw["type_vocab_size"],
        pad_token_id=raw["pad_token_id"] or 0,
        num_labels=num_labels,
        max_length=positions - offset,
        pooler_activation=_pooler_activation(raw, where) if deberta else "tanh",
        initializer_range=float(raw["initializer_range"]),
        disentangled=_disentangled(raw, where) if deberta else None,
    )


def _check_options(raw: Mapping[str, Any], where: str) -> None:
    """Refuse what would be silently misread: options of other architectures."""
    width, heads = (required(raw, key, where) for key in ("hidden_size", "num_attention_heads"))
    if width % heads:
        raise InputError(
            f"{where}: expected hidden_size to be a multiple of num_attention_heads, "
            f"got {width} and {heads}. Correct the config."
        )
    expected: dict[str, Any] = {
        "is_decoder": False,
        "add_cross_attention": False,
        "position_embedding_type": "absolute",
    }
    if raw["model_type"] == "deberta-v2":
        expected = {
            "relative_attention": True,
            "conv_kernel_size": 0,
            "embedding_size": width,
            "pooler_hidden_size": width,
            "attention_head_size": width // heads,
            "talking_head": False,
        }
    for key, value in expected.items():
        # DeBERTa's relative attention is off where the config does not name it.
        got = raw.get(key, False if key == "relative_attention" else value)
        if got != value:
            raise InputError(
                f"{where}: expected {key} to be {value!r}, got {got!r}. "
                "This checkpoint cannot be run exactly."
            )


def _disentangled(raw: Mapping[str, Any], where: str) -> DisentangledConfig:
    """Relative positions; a range below 1 means the absolute one, buckets below 1 mean none."""
    largest = raw.get("max_relative_positions", -1)
    largest = raw["max_position_embeddings"] if largest < 1 else largest
    buckets = max(raw.get("position_buckets", -1), 0)
    if buckets == 1 or largest - 1 <= buckets // 2:
        raise InputError(
            f"{where}: expected position_buckets to be 0 or at least 2, and half of it to lie "
            f"below max_relative_positions - 1 = {largest - 1}, got {buckets}. Correct the config."
        )
    return DisentangledConfig(
        position_buckets=buckets,
        max_relative_positions=largest,
        share_att_key=bool(raw.get("share_att_key", False)),
        pos_att_type=_choices(raw, "pos_att_type", ("c2p", "p2c"), where),
        norm_rel_ebd="layer_norm" in _choices(raw, "norm_rel_ebd", ("layer_norm", "none"), where),
        position_biased_input=bool(raw.get("position_biased_input", True)),
    )


def _choices(
    raw: Mapping[str, Any], key: str, known: tuple[str, ...], where: str
) -> tuple[str, ...]:
    """Entries of a list, or of a text with bars between them, sorted."""
    value = raw.get(key) or ("none" if "none" in known else [])
    parts = value.lower().split("|") if isinstance(value, str) else value
    parts = tuple(sorted({part.strip() for part in parts}))
    if not parts or any(part not in known for part in parts):
        raise InputError(
            f"{where}: expected {key} to name one or more of {', '.join(known)}, "
            f"got {raw.get(key)!r}. This checkpoint cannot be run exactly."
        )
    return parts


def _pooler_activation(raw: Mapping[str, Any], where: str) -> str:
    return _activation({"pooler_hidden_act": "gelu", **raw}, "pooler_hidden_act", where)


def _activation(raw: Mapping[str, Any], key: str, where: str) -> str:
    if raw[key] not in ENCODER_ACTIVATIONS:
        raise InputError(
            f"{where}: expected {key} to be one of {', '.join(ENCODER_ACTIVATIONS)}, "
            f"got {raw[key]!r}. This checkpoint cannot be run exactly."
        )
    return raw[key]


def encoder_weight_rules(config: EncoderConfig) -> tuple[WeightRule, ...]:
    """The weight-name table of the encoder, which stays frozen."""
    prefix, relative = PREFIXES[config.model_type], config.disentangled
    tables = ["embeddings.word_embeddings"]
    if config.absolute_positions:
        tables.append("embeddings.position_embeddings")
    if config.type_vocab_size > 0:
        tables.append("embeddings.token_type_embeddings")
    norms = {"embeddings.LayerNorm": "embeddings.LayerNorm"}
    if relative is not None:
        tables.append("encoder.rel_embeddings")
        if relative.norm_rel_ebd:
            norms["encoder.LayerNorm"] = "encoder.LayerNorm"
    for block in ("attention.output", "output"):
        norms[f"layers.{block}.LayerNorm"] = f"encoder.layer.{{i}}.{block}.LayerNorm"
    rules = [WeightRule(f"{name}.embedding", f"{prefix}.{name}.weight", False) for name in tables]
    for path, name in norms.items():
        rules.append(WeightRule(f"{path}.scale", f"{prefix}.{name}.weight", False))
        rules.append(WeightRule(f"{path}.bias", f"{prefix}.{name}.bias", False))
    for name in _layer_linears(config):
        rules += _linear_rules(f"layers.{name}", f"{prefix}.encoder.layer.{{i}}.{name}")
    return tuple(rules)


def _layer_linears(config: EncoderConfig) -> tuple[str, ...]:
    """Linear layers of one encoder layer, as the checkpoints name them."""
    names = ["query", "key", "value"]
    if config.disentangled is not None:
        names = [f"{name}_proj" for name in names]
        if not config.disentangled.share_att_key:
            own = {"c2p": "pos_key_proj", "p2c": "pos_query_proj"}
            names += [own[kind] for kind in config.disentangled.pos_att_type]
    inside = tuple(f"attention.self.{name}" for name in names)
    return (*inside, "attention.output.dense", "intermediate.dense", "output.dense")


def head_weight_rules(config: EncoderConfig) -> tuple[WeightRule, ...]:
    """The weight-name table of the head: pooler and classifier, both trainable."""
    dense, out = {
        "bert": ("bert.pooler.dense", "classifier"),
        "roberta": ("classifier.dense", "classifier.out_proj"),
        "deberta-v2": ("pooler.dense", "classifier"),
    }[config.model_type]
    return (*_linear_rules("head.dense", dense), *_linear_rules("head.out", out))


def _linear_rules(path: str, name: str) -> tuple[WeightRule, WeightRule]:
    kernel = WeightRule(f"{path}.kernel", f"{name}.weight", True)
    return kernel, WeightRule(f"{path}.bias", f"{name}.bias", False)


def encoder_ignored_weights(config: EncoderConfig) -> tuple[str, ...]:
    """Patterns of checkpoint names that may be left over."""
    patterns = IGNORED_WEIGHTS[config.model_type]
    unused = r"deberta\.embeddings\.position_embeddings\..*"
    return patterns if config.absolute_positions else (*patterns, unused)
