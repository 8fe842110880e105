"""DistilBERT: BERT without token types, under names of its own."""

from typing import Any

from balora_jax.errors import InputError
from balora_jax.models.encoder import ENCODER_ACTIVATIONS
from balora_jax.models.encoder_config import EncoderConfig
from balora_jax.models.families.base import FAMILIES, EncoderFamily
from balora_jax.models.families.bert_names import linear_rules
from balora_jax.models.families.read_bert import read_encoder
from balora_jax.models.sizes import HEADS, LAYERS, WIDTH
from balora_jax.models.weight_names import WeightRule
from balora_jax.untyped.fields import Fields

# Its keys → BERT's, and their bounds.
SIZES = {
    "dim": ("hidden_size", WIDTH),
    "hidden_dim": ("intermediate_size", WIDTH),
    "n_layers": ("num_hidden_layers", LAYERS),
    "n_heads": ("num_attention_heads", HEADS),
}
# BERT's linear layers and norms of a layer → its.
LINEARS = {
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
}
NORMS = {"attention.output": "sa_layer_norm", "output": "output_layer_norm"}


def read(raw: Fields) -> EncoderConfig:
    """DistilBERT; its norms' epsilon is no setting, and the head's activation is none either."""
    known: dict[str, Any] = {
        **raw.values,
        **{berts: raw.integer(key, most=most) for key, (berts, most) in SIZES.items()},
        "hidden_act": raw.choice("activation", ENCODER_ACTIVATIONS, "gelu"),
        "layer_norm_eps": 1e-12,
        "type_vocab_size": 0,
    }
    if known["hidden_size"] % known["num_attention_heads"]:
        raise InputError(
            f"{raw.where}: expected dim to be a multiple of n_heads, got {known['hidden_size']} "
            f"and {known['num_attention_heads']}. Correct the config."
        )
    return read_encoder(Fields(known, raw.where), pooler_activation="relu")


def weight_rules(config: EncoderConfig, prefix: str) -> tuple[WeightRule, ...]:
    """The weight-name table; every config has the same layers."""
    del config
    tables = ("word_embeddings", "position_embeddings")
    rules = [
        WeightRule(f"embeddings.{name}.embedding", f"{prefix}.embeddings.{name}.weight", False)
        for name in tables
    ]
    layer = f"{prefix}.transformer.layer.{{i}}"
    norms = {"embeddings": f"{prefix}.embeddings.LayerNorm"}
    norms |= {f"layers.{ours}": f"{layer}.{its}" for ours, its in NORMS.items()}
    for path, name in norms.items():
        rules.append(WeightRule(f"{path}.LayerNorm.scale", f"{name}.weight", False))
        rules.append(WeightRule(f"{path}.LayerNorm.bias", f"{name}.bias", False))
    for ours, its in LINEARS.items():
        rules += linear_rules(f"layers.{ours}", f"{layer}.{its}")
    return tuple(rules)


DISTILBERT = FAMILIES.register(
    EncoderFamily(
        "distilbert",
        read,
        prefix="distilbert",
        head=("pre_classifier", "classifier"),
        architecture="DistilBertForSequenceClassification",
        leftovers=(r"vocab_\w+\..*", r"distilbert\.embeddings\.position_ids"),
        names=weight_rules,
    )
)
