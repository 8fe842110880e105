"""RoBERTa: positions that leave padding out, and a head of its own."""

from balora_jax.models.encoder_config import EncoderConfig
from balora_jax.models.families.base import FAMILIES, EncoderFamily
from balora_jax.models.families.read_bert import read_encoder, refuse_decoders
from balora_jax.models.sizes import VOCABULARY
from balora_jax.untyped.fields import Fields


def read(raw: Fields) -> EncoderConfig:
    """RoBERTa; its positions begin behind the row of the padding token."""
    refuse_decoders(raw)
    offset = raw.integer("pad_token_id", 1, least=0, most=VOCABULARY) + 1
    return read_encoder(raw, pad_token_id=1, offset=offset)


# The pooler is not used for classes.
ROBERTA = FAMILIES.register(
    EncoderFamily(
        "roberta",
        read,
        prefix="roberta",
        head=("classifier.dense", "classifier.out_proj"),
        architecture="RobertaForSequenceClassification",
        leftovers=(r"lm_head\..*", r"roberta\.embeddings\.position_ids", r"roberta\.pooler\..*"),
    )
)
