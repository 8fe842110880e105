"""GPT-2: layers of its own, learned positions, and kernels stored [in, out] (Conv1D)."""

from balora_jax.errors import InputError
from balora_jax.models.decoder_config import DecoderConfig
from balora_jax.models.families.base import FAMILIES, DecoderFamily, GgufLayout
from balora_jax.models.gpt2 import LINEARS, Gpt2Layer
from balora_jax.models.layers import ACTIVATIONS
from balora_jax.models.sizes import HEADS, LAYERS, POSITIONS, VOCABULARY, WIDTH
from balora_jax.models.weight_names import WeightRule
from balora_jax.untyped.fields import Fields


def read(raw: Fields) -> DecoderConfig:
    """GPT-2; its keys are its own."""
    for option in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if raw.flag(option, default=False):
            raise InputError(
                f"{raw.where}: expected {option} to be false, got {raw.values[option]!r}. "
                "This checkpoint cannot be run exactly."
            )
    width, heads = raw.integer("n_embd", most=WIDTH), raw.integer("n_head", most=HEADS)
    if width % heads:
        raise InputError(
            f"{raw.where}: expected n_embd to be a multiple of n_head, got {width} and {heads}. "
            "Use the config.json that was saved with the weights."
        )
    inner = raw.integer("n_inner", most=WIDTH) if raw.has("n_inner") else 4 * width
    return DecoderConfig(
        model_type=raw.values["model_type"],
        vocab_size=raw.integer("vocab_size", most=VOCABULARY),
        hidden_size=width,
        intermediate_size=inner,
        num_layers=raw.integer("n_layer", most=LAYERS),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        norm_eps=raw.number("layer_norm_epsilon", 1e-5, most=1.0),
        norm="layer",
        activation=raw.choice("activation_function", ACTIVATIONS, "gelu_new"),
        rope=None,
        max_length=raw.integer("n_positions", most=POSITIONS),
        tie_word_embeddings=raw.flag("tie_word_embeddings", default=True),
        query_scale=None if raw.flag("scale_attn_weights", default=True) else 1.0,
    )


def weight_rules(config: DecoderConfig) -> tuple[WeightRule, ...]:
    """The weight-name table; kernels are stored as we hold them."""
    rules = [
        WeightRule("embed_tokens.embedding", "transformer.wte.weight", False),
        WeightRule("embed_positions.embedding", "transformer.wpe.weight", False),
        WeightRule("norm.scale", "transformer.ln_f.weight", False),
        WeightRule("norm.bias", "transformer.ln_f.bias", False),
    ]
    if not config.tie_word_embeddings:
        rules.append(WeightRule("lm_head.embedding", "lm_head.weight", False))
    leaves = [(name, "kernel") for name in LINEARS] + [("ln_1", "scale"), ("ln_2", "scale")]
    for name, leaf in leaves:
        source = f"transformer.h.{{i}}.{name}"
        rules.append(WeightRule(f"layers.{name}.{leaf}", f"{source}.weight", False))
        rules.append(WeightRule(f"layers.{name}.bias", f"{source}.bias", False))
    return tuple(rules)


# Old conversions stored the triangle of the mask.
GPT2 = FAMILIES.register(
    DecoderFamily(
        "gpt2",
        read,
        weight_rules,
        Gpt2Layer,
        (r".*\.attn\.(masked_)?bias",),
        gguf=GgufLayout("gpt2"),
    )
)
