"""Names of the arrays of a decoder with Llama's names in a checkpoint."""

from typing import NamedTuple

from balora_jax.models.decoder import NORMS
from balora_jax.models.decoder_config import DecoderConfig
from balora_jax.models.weight_names import WeightRule


class ExpertNames(NamedTuple):
    """What a checkpoint calls the block of experts in a layer, and an expert's three layers."""

    block: str
    gate: str
    down: str
    up: str


MIXTRAL_EXPERTS = ExpertNames("block_sparse_moe", "w1", "w2", "w3")


def weight_rules(
    config: DecoderConfig,
    prefix: str = "model",
    *,
    experts: ExpertNames = MIXTRAL_EXPERTS,
) -> tuple[WeightRule, ...]:
    """The weight-name table; which layers and biases there are follows from the config."""
    rules = [
        WeightRule("embed_tokens.embedding", f"{prefix}.embed_tokens.weight", False),
        WeightRule("norm.scale", f"{prefix}.norm.weight", False),
    ]
    if not config.tie_word_embeddings:
        rules.append(WeightRule("lm_head.embedding", "lm_head.weight", False))
    layer = f"{prefix}.layers.{{i}}"
    rules += _linear_rules(config, layer)
    if config.experts:
        rules += _expert_rules(config, layer, experts)
    norms = [name for name in NORMS[config.norms] if name]
    if config.qk_norm != "none":
        norms += ["self_attn.q_norm", "self_attn.k_norm"]
    rules += [WeightRule(f"layers.{n}.scale", f"{layer}.{n}.weight", False) for n in norms]
    return tuple(rules)


def _linear_rules(config: DecoderConfig, layer: str) -> list[WeightRule]:
    """The linear layers of attention and of an MLP that always runs, with their biases."""
    qkv = ["qkv_proj"] if config.fused_projections else ["q_proj", "k_proj", "v_proj"]
    linears = [(f"self_attn.{name}", config.qkv_bias) for name in qkv]
    linears.append(("self_attn.o_proj", config.output_bias))
    if not config.experts:
        gates = ["gate_up_proj"] if config.fused_projections else ["gate_proj", "up_proj"]
        linears += [(f"mlp.{name}", config.mlp_bias) for name in (*gates, "down_proj")]
    rules = []
    for name, biased in linears:
        rules.append(WeightRule(f"layers.{name}.kernel", f"{layer}.{name}.weight", True))
        if biased:
            rules.append(WeightRule(f"layers.{name}.bias", f"{layer}.{name}.bias", False))
    return rules


def _expert_rules(config: DecoderConfig, layer: str, called: ExpertNames) -> list[WeightRule]:
    """Ours are Mixtral's names."""
    block, source = f"layers.{MIXTRAL_EXPERTS.block}", f"{layer}.{called.block}"
    rules = [WeightRule(f"{block}.gate.weight", f"{source}.gate.weight", True)]
    many = config.experts, 0, config.expert_groups
    for name, its in zip(MIXTRAL_EXPERTS[1:], called[1:], strict=True):
        stored = f"{source}.experts.{{e}}.{its}.weight"
        rules.append(WeightRule(f"{block}.experts.{name}.kernel", stored, True, *many))
    return rules
