"""BERT."""

from balora_jax.models.encoder_config import EncoderConfig
from balora_jax.models.families.base import FAMILIES, EncoderFamily
from balora_jax.models.families.read_bert import read_encoder, refuse_decoders
from balora_jax.untyped.fields import Fields


def read(raw: Fields) -> EncoderConfig:
    """BERT."""
    refuse_decoders(raw)
    return read_encoder(raw)


BERT = FAMILIES.register(
    EncoderFamily(
        "bert",
        read,
        prefix="bert",
        head=("bert.pooler.dense", "classifier"),
        architecture="BertForSequenceClassification",
        leftovers=(r"cls\..*", r"bert\.embeddings\.position_ids"),
    )
)
