"""Names of the arrays of an encoder with BERT's names in a checkpoint."""

from balora_jax.models.encoder_config import EncoderConfig
from balora_jax.models.weight_names import WeightRule


def weight_rules(config: EncoderConfig, prefix: str) -> tuple[WeightRule, ...]:
    """The weight-name table of the encoder, its head left out."""
    relative = config.disentangled
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
        rules += linear_rules(f"layers.{name}", f"{prefix}.encoder.layer.{{i}}.{name}")
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


def linear_rules(path: str, name: str) -> tuple[WeightRule, WeightRule]:
    """A linear layer's kernel and bias."""
    kernel = WeightRule(f"{path}.kernel", f"{name}.weight", True)
    return kernel, WeightRule(f"{path}.bias", f"{name}.bias", False)
