"""ModernBERT: layers and a head of its own."""

from balora_jax.errors import InputError
from balora_jax.models.encoder import ENCODER_ACTIVATIONS
from balora_jax.models.encoder_config import EncoderConfig, ModernConfig
from balora_jax.models.families.base import FAMILIES, EncoderFamily
from balora_jax.models.families.bert_names import linear_rules
from balora_jax.models.families.read_bert import read_encoder
from balora_jax.models.families.read_llama import windows_by_layer
from balora_jax.models.modern_encoder import ModernEncoder
from balora_jax.models.rope_settings import rope_by_layer
from balora_jax.models.sizes import LAYERS, POSITIONS
from balora_jax.models.weight_names import WeightRule
from balora_jax.untyped.fields import Fields


def read(raw: Fields) -> EncoderConfig:
    """ModernBERT; norms and the head's first layer have no biases in any checkpoint there is."""
    raw.must_be("norm_bias", False, default=False)
    raw.must_be("classifier_bias", False, default=False)
    known = {
        **raw.values,
        "layer_norm_eps": raw.number("norm_eps", 1e-5, most=1.0),
        "hidden_act": raw.choice("hidden_activation", ENCODER_ACTIVATIONS, "gelu"),
        "type_vocab_size": 0,
    }
    config = read_encoder(
        Fields(known, raw.where),
        pad_token_id=50283,
        pooler_activation=raw.choice("classifier_activation", ENCODER_ACTIVATIONS, "gelu"),
        modern=_modern(raw),
    )
    each = config.hidden_size // config.num_heads
    if each % 2:
        raise InputError(
            f"{raw.where}: expected an even width of the heads, whose halves turn, got {each}. "
            "Use the config.json that was saved with the weights."
        )
    return config


def _modern(raw: Fields) -> ModernConfig:
    """Its own settings; each third layer sees everything, the first one too."""
    layers = raw.integer("num_hidden_layers", most=LAYERS)
    every = raw.integer("global_attn_every_n_layers", 3, most=LAYERS)
    slides = tuple(i % every != 0 for i in range(layers))
    keys = ("global_rope_theta", "local_rope_theta")
    rope, local = rope_by_layer(raw, theta_keys=keys, thetas=(1.6e5, 1e4), scales_both=True)
    pooling = raw.choice("classifier_pooling", ("cls", "mean"), "cls")
    return ModernConfig(
        rope=rope,
        local_rope=local,
        window=raw.integer("local_attention", 128, most=POSITIONS) // 2,
        sliding_layers=windows_by_layer(raw, None, slides)["sliding_layers"],
        pools_mean=pooling == "mean",
        attention_bias=raw.flag("attention_bias", default=False),
        mlp_bias=raw.flag("mlp_bias", default=False),
        cutoff=raw.number("initializer_cutoff_factor", 2.0, least=1e-3),
    )


def weight_rules(config: EncoderConfig, prefix: str) -> tuple[WeightRule, ...]:
    """The weight-name table of the encoder, its head left out."""
    assert config.modern is not None
    rules = [
        WeightRule(
            "embeddings.tok_embeddings.embedding",
            f"{prefix}.embeddings.tok_embeddings.weight",
            False,
        ),
        WeightRule("embeddings.norm.scale", f"{prefix}.embeddings.norm.weight", False),
        WeightRule("final_norm.scale", f"{prefix}.final_norm.weight", False),
        WeightRule("layers.mlp_norm.scale", f"{prefix}.layers.{{i}}.mlp_norm.weight", False),
    ]
    if config.num_layers > 1:
        name = f"{prefix}.layers.{{i}}.attn_norm.weight"
        rules.append(WeightRule("attn_norm.scale", name, False, first=1))
    biased = {"attn": config.modern.attention_bias, "mlp": config.modern.mlp_bias}
    for name in ("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo"):
        kernel, bias = linear_rules(f"layers.{name}", f"{prefix}.layers.{{i}}.{name}")
        rules += [kernel, bias] if biased[name.partition(".")[0]] else [kernel]
    return tuple(rules)


HEAD = (
    WeightRule("head.dense.kernel", "head.dense.weight", True),
    WeightRule("head.norm.scale", "head.norm.weight", False),
    *linear_rules("head.out", "classifier"),
)
MODERNBERT = FAMILIES.register(
    EncoderFamily(
        "modernbert",
        read,
        prefix="model",
        head=("head.dense", "classifier"),
        architecture="ModernBertForSequenceClassification",
        leftovers=(r"decoder\..*",),
        names=weight_rules,
        head_table=HEAD,
        module=ModernEncoder,
    )
)
