"""Settings that the configs of encoders with BERT's keys state alike."""

from typing import Any

from balora_jax.errors import InputError
from balora_jax.models.encoder import ENCODER_ACTIVATIONS
from balora_jax.models.encoder_config import EncoderConfig
from balora_jax.models.sizes import HEADS, LAYERS, POSITIONS, VOCABULARY, WIDTH
from balora_jax.untyped.fields import Fields

MOST_LABELS = 2**20


def read_encoder(
    raw: Fields,
    *,
    norm_eps: float = 1e-12,
    type_vocab_size: int = 2,
    pad_token_id: int = 0,
    offset: int = 0,
    **options: Any,
) -> EncoderConfig:
    """A config of BERT's keys.

    Args:
        raw: the parsed ``config.json``.
        norm_eps: what ``transformers`` assumes where the key is missing.
        type_vocab_size: likewise.
        pad_token_id: likewise.
        offset: row of the first token's position.
        options: fields that the family reads in its own way.
    """
    width = raw.integer("hidden_size", most=WIDTH)
    heads = raw.integer("num_attention_heads", most=HEADS)
    if width % heads:
        raise InputError(
            f"{raw.where}: expected hidden_size to be a multiple of num_attention_heads, "
            f"got {width} and {heads}. Correct the config."
        )
    positions = raw.integer("max_position_embeddings", least=offset + 1, most=POSITIONS)
    return EncoderConfig(
        model_type=raw.values["model_type"],
        vocab_size=raw.integer("vocab_size", most=VOCABULARY),
        hidden_size=width,
        intermediate_size=raw.integer("intermediate_size", most=WIDTH),
        num_layers=raw.integer("num_hidden_layers", most=LAYERS),
        num_heads=heads,
        norm_eps=raw.number("layer_norm_eps", norm_eps, most=1.0),
        activation=raw.choice("hidden_act", ENCODER_ACTIVATIONS, "gelu"),
        max_positions=positions,
        position_offset=offset,
        type_vocab_size=raw.integer("type_vocab_size", type_vocab_size, least=0),
        pad_token_id=pad_token(raw, pad_token_id),
        num_labels=_labels(raw),
        max_length=positions - offset,
        initializer_range=raw.number("initializer_range", 0.02, most=100.0),
        **options,
    )


def refuse_decoders(raw: Fields) -> None:
    """Raises InputError for options of BERT and RoBERTa that would be silently misread."""
    raw.must_be("is_decoder", False, default=False)
    raw.must_be("add_cross_attention", False, default=False)
    raw.must_be("position_embedding_type", "absolute", default="absolute")


def pad_token(raw: Fields, default: int) -> int:
    """The padding token; ``null`` is 0."""
    if raw.says_null("pad_token_id"):
        return 0
    return raw.integer("pad_token_id", default, least=0, most=VOCABULARY)


def _labels(raw: Fields) -> int:
    """Classes of the head that the checkpoint was saved with; two where it says nothing."""
    if raw.has("num_labels"):
        return raw.integer("num_labels", most=MOST_LABELS)
    return len(raw.section("id2label")) or 2
