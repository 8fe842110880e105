"""OLMo-2: norms behind attention and MLP, and norms over the whole of q and of k."""

from balora_jax.models.decoder_config import DecoderConfig
from balora_jax.models.families.base import FAMILIES, DecoderFamily, GgufLayout
from balora_jax.models.families.read_llama import attention_bias, read_decoder
from balora_jax.untyped.fields import Fields


def read(raw: Fields) -> DecoderConfig:
    """OLMo-2 (arXiv 2501.00656)."""
    return read_decoder(
        raw,
        norm_eps=1e-5,
        norm="rms_float32",
        norms="after",
        qk_norm="whole",
        **attention_bias(raw),
    )


OLMO2 = FAMILIES.register(DecoderFamily("olmo2", read, gguf=GgufLayout("olmo2")))
