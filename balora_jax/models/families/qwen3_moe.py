"""Qwen3's mixtures of experts: Qwen3's attention, and experts in every layer."""

import functools

from balora_jax.errors import InputError
from balora_jax.models.decoder_config import DecoderConfig
from balora_jax.models.families.base import FAMILIES, DecoderFamily, GgufLayout
from balora_jax.models.families.llama_names import ExpertNames, weight_rules
from balora_jax.models.families.mixtral import read_experts
from balora_jax.models.families.read_llama import attention_bias, read_decoder, window_size
from balora_jax.models.sizes import WIDTH
from balora_jax.untyped.fields import Fields
from balora_jax.untyped.shown import shown


def read(raw: Fields) -> DecoderConfig:
    """Qwen3-MoE; its window, if it is used, is that of all layers."""
    raw.must_be("decoder_sparse_step", 1, default=1)
    if raw.values.get("mlp_only_layers"):
        raise InputError(
            f"{raw.where}: expected experts in every layer, got mlp_only_layers="
            f"{shown(raw.values['mlp_only_layers'])}. This checkpoint cannot be run exactly."
        )
    used = raw.flag("use_sliding_window", default=False)
    key = "num_local_experts" if raw.has("num_local_experts") else "num_experts"
    return read_decoder(
        raw,
        kv_heads=4,
        intermediate_size=raw.integer("moe_intermediate_size", 768, most=WIDTH),
        qk_norm="head",
        sliding_window=window_size(raw, 4096) if used else None,
        shares_sum_to_one=raw.flag("norm_topk_prob", default=False),
        **attention_bias(raw),
        **read_experts(raw, key, 128, taken=8),
    )


NAMES = ExpertNames("mlp", "gate_proj", "down_proj", "up_proj")
QWEN3_MOE = FAMILIES.register(
    DecoderFamily(
        "qwen3_moe",
        read,
        functools.partial(weight_rules, experts=NAMES),
        gguf=GgufLayout("qwen3moe"),
    )
)
