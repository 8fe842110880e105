"""Gemma 3 with images, as 4B to 27B are stored: its language model is read, on text alone."""

import functools

from balora_jax.errors import InputError
from balora_jax.models.decoder_config import DecoderConfig
from balora_jax.models.families import gemma3_text
from balora_jax.models.families.base import FAMILIES, DecoderFamily, GgufLayout
from balora_jax.models.families.llama_names import weight_rules
from balora_jax.untyped.fields import Fields

# What ``text_config`` leaves out where it is ``transformers``' default.
DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "max_position_embeddings": 131072,
}
# Linear layers of the tower of images: an adapter's endings must not mean them.
VISION = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def read(raw: Fields) -> DecoderConfig:
    """The language model; as in ``transformers`` this class caps no logits and ties by itself."""
    if not raw.has("text_config"):
        raise InputError(
            f"{raw.where}: expected the key 'text_config', got none. {raw.remedy} A Gemma 3 of "
            "text alone has the model_type gemma3_text."
        )
    text = {
        **DEFAULTS,
        **raw.section("text_config"),
        "model_type": raw.values["model_type"],
        "tie_word_embeddings": raw.flag("tie_word_embeddings", default=True),
        "final_logit_softcapping": None,
    }
    return gemma3_text.read(Fields(text, f"{raw.where}, text_config"))


GEMMA3 = FAMILIES.register(
    DecoderFamily(
        "gemma3",
        read,
        functools.partial(weight_rules, prefix="model.language_model"),
        leftovers=(r"(model\.)?(vision_tower|multi_modal_projector)\..*",),
        other_linears=tuple(f"model.vision_tower.{name}" for name in VISION),
        gguf=GgufLayout("gemma3"),
    )
)
