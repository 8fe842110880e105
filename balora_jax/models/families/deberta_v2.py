"""DeBERTa-v2 and DeBERTaV3: relative positions."""

from balora_jax.errors import InputError
from balora_jax.models.disentangled import DisentangledConfig
from balora_jax.models.encoder import ENCODER_ACTIVATIONS
from balora_jax.models.encoder_config import EncoderConfig
from balora_jax.models.families.base import FAMILIES, EncoderFamily
from balora_jax.models.families.read_bert import read_encoder
from balora_jax.models.sizes import POSITIONS
from balora_jax.untyped.fields import Fields


def read(raw: Fields) -> EncoderConfig:
    """DeBERTa-v2; options of this architecture that this code lacks are refused."""
    config = read_encoder(
        raw,
        norm_eps=1e-7,
        type_vocab_size=0,
        pooler_activation=raw.choice("pooler_hidden_act", ENCODER_ACTIVATIONS, "gelu"),
        disentangled=_disentangled(raw),
    )
    width, each = config.hidden_size, config.hidden_size // config.num_heads
    # Relative attention is off where a config does not name it.
    raw.must_be("relative_attention", True, default=False)
    raw.must_be("conv_kernel_size", 0, default=0)
    raw.must_be("embedding_size", width, default=width)
    raw.must_be("pooler_hidden_size", width, default=width)
    raw.must_be("attention_head_size", each, default=each)
    raw.must_be("talking_head", False, default=False)
    return config


def _disentangled(raw: Fields) -> DisentangledConfig:
    """Relative positions; a range below 1 means the absolute one, buckets below 1 mean none."""
    largest = raw.integer("max_relative_positions", -1, least=-1, most=POSITIONS)
    if largest < 1:
        largest = raw.integer("max_position_embeddings", most=POSITIONS)
    buckets = max(raw.integer("position_buckets", -1, least=-1, most=POSITIONS), 0)
    if buckets == 1 or largest - 1 <= buckets // 2:
        raise InputError(
            f"{raw.where}: expected position_buckets to be 0 or at least 2, and half of it to lie "
            f"below max_relative_positions - 1 = {largest - 1}, got {buckets}. Correct the config."
        )
    return DisentangledConfig(
        position_buckets=buckets,
        max_relative_positions=largest,
        share_att_key=raw.flag("share_att_key", default=False),
        pos_att_type=_words(raw, "pos_att_type", ("c2p", "p2c")),
        norm_rel_ebd="layer_norm" in _words(raw, "norm_rel_ebd", ("layer_norm", "none")),
        position_biased_input=raw.flag("position_biased_input", default=True),
    )


def _words(raw: Fields, key: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Entries of a list, or of a text with bars between them, sorted."""
    value = raw.values.get(key) or ("none" if "none" in known else [])
    parts = value.lower().split("|") if isinstance(value, str) else value
    listed = isinstance(parts, list | tuple) and all(isinstance(part, str) for part in parts)
    words = tuple(sorted({part.strip() for part in parts})) if listed else ()
    if not words or any(word not in known for word in words):
        raise InputError(
            f"{raw.where}: expected {key} to name one or more of {', '.join(known)}, "
            f"got {raw.values.get(key)!r}. This checkpoint cannot be run exactly."
        )
    return words


DEBERTA_V2 = FAMILIES.register(
    EncoderFamily(
        "deberta-v2",
        read,
        prefix="deberta",
        head=("pooler.dense", "classifier"),
        architecture="DebertaV2ForSequenceClassification",
        leftovers=(
            r"(cls|lm_predictions|mask_predictions)\..*",
            r"deberta\.embeddings\.position_ids",
            # Of the pretraining, beside the weight itself.
            r"deberta\.embeddings\.word_embeddings\._weight",
        ),
    )
)
