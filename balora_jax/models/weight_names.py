"""Where each array of a decoder lies in a Hugging Face checkpoint."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import jax

from balora_jax.models.adapters import LinearShape
from balora_jax.models.decoder_config import DecoderConfig


@dataclass(frozen=True)
class WeightRule:
    """Where one of our arrays lives in a checkpoint.

    Attributes:
        path: our dotted path, ``layers.self_attn.q_proj.kernel``.
        name: the checkpoint's name, with ``{i}`` for the layer of a stacked array and ``{e}`` for
            the expert.
        transpose: whether the checkpoint stores [out, in] where we hold [in, out].
        experts: tensors of one layer.
    """

    path: str
    name: str
    transpose: bool
    experts: int = 1

    @property
    def stacked(self) -> bool:
        """Whether our array stacks the checkpoint's tensors on its leading axis."""
        return "{i}" in self.name

    def names(self, count: int) -> tuple[str, ...]:
        """Names of the checkpoint's tensors, in the order of our array's leading axis."""
        if not self.stacked:
            return (self.name,)
        pairs = (divmod(j, self.experts) for j in range(count))
        return tuple(self.name.format(i=i, e=e) for i, e in pairs)

    @property
    def pattern(self) -> str:
        """A regular expression of the checkpoint's names."""
        name = self.name.replace("{i}", "0").replace("{e}", "0")
        return "^" + re.sub(r"(?<=\\.)0(?=\\.)", r"\\d+", re.escape(name)) + "$"


# Checkpoint entries that carry no weight: old conversions stored the rotary frequencies, and
# GPT-2's the triangle of its mask.
IGNORED_WEIGHTS = (r".*rotary_emb\.inv_freq", r".*\.attn\.(masked_)?bias")


def weight_rules(config: DecoderConfig) -> tuple[WeightRule, ...]:
    """The weight-name table of a decoder's checkpoint."""
    if config.model_type == "gpt2":
        return _gpt2_rules(config)
    rules = [
        WeightRule("embed_tokens.embedding", "model.embed_tokens.weight", False),
        WeightRule("norm.scale", "model.norm.weight", False),
    ]
    if not config.tie_word_embeddings:
        rules.append(WeightRule("lm_head.embedding", "lm_head.weight", False))
    rules += _linear_rules(config)
    if config.experts:
        rules += _expert_rules(config)
    norms = ["input_layernorm", "post_attention_layernorm"]
    if config.sandwich_norms:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    if config.qk_norm:
        norms += ["self_attn.q_norm", "self_attn.k_norm"]
    for name in norms:
        rules.append(WeightRule(f"layers.{name}.scale", f"model.layers.{{i}}.{name}.weight", False))
    return tuple(rules)


def _linear_rules(config: DecoderConfig) -> list[WeightRule]:
    """The linear layers of attention and of an MLP that always runs, with their biases."""
    qkv = ["qkv_proj"] if config.fused_projections else ["q_proj", "k_proj", "v_proj"]
    linears = [(f"self_attn.{name}", config.qkv_bias) for name in qkv]
    linears.append(("self_attn.o_proj", config.output_bias))
    if not config.experts:
        gates = ["gate_up_proj"] if config.fused_projections else ["gate_proj", "up_proj"]
        linears += [(f"mlp.{name}", config.mlp_bias) for name in (*gates, "down_proj")]
    rules = []
    for name, biased in linears:
        source = f"model.layers.{{i}}.{name}"
        rules.append(WeightRule(f"layers.{name}.kernel", f"{source}.weight", True))
        if biased:
            rules.append(WeightRule(f"layers.{name}.bias", f"{source}.bias", False))
    return rules


def _expert_rules(config: DecoderConfig) -> list[WeightRule]:
    block, source = "layers.block_sparse_moe", "model.layers.{i}.block_sparse_moe"
    rules = [WeightRule(f"{block}.gate.weight", f"{source}.gate.weight", True)]
    for name in ("w1", "w2", "w3"):
        stored = f"{source}.experts.{{e}}.{name}.weight"
        rules.append(WeightRule(f"{block}.experts.{name}.kernel", stored, True, config.experts))
    return rules


def _gpt2_rules(config: DecoderConfig) -> tuple[WeightRule, ...]:
    """GPT-2 stores its kernels [in, out] (Conv1D), as we hold them."""
    rules = [
        WeightRule("embed_tokens.embedding", "transformer.wte.weight", False),
        WeightRule("embed_positions.embedding", "transformer.wpe.weight", False),
        WeightRule("norm.scale", "transformer.ln_f.weight", False),
        WeightRule("norm.bias", "transformer.ln_f.bias", False),
    ]
    if not config.tie_word_embeddings:
        rules.append(WeightRule("lm_head.embedding", "lm_head.weight", False))
    linears = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    leaves = [(name, "kernel") for name in linears] + [("ln_1", "scale"), ("ln_2", "scale")]
    for name, leaf in leaves:
        source = f"transformer.h.{{i}}.{name}"
        rules.append(WeightRule(f"layers.{name}.{leaf}", f"{source}.weight", False))
        rules.append(WeightRule(f"layers.{name}.bias", f"{source}.bias", False))
    return tuple(rules)


def ignored_weights(config: DecoderConfig) -> tuple[str, ...]:
    """Patterns of checkpoint names that may be left over; a tied head may be stored as well."""
    tied = (r"lm_head\.weight",) if config.tie_word_embeddings else ()
    return IGNORED_WEIGHTS + tied


def linear_shapes(
    rules: Iterable[WeightRule], frozen: Mapping[str, jax.ShapeDtypeStruct]
) -> tuple[LinearShape, ...]:
    """The stacked linear layers that may be adapted (the head and embeddings stay frozen)."""
    shapes = []
    for rule in rules:
        if rule.path.startswith("layers.") and rule.path.endswith(".kernel"):
            layers, d_in, d_out = frozen[rule.path].shape
            names = tuple(name.removesuffix(".weight") for name in rule.names(layers))
            shapes.append(LinearShape(rule.path.removesuffix(".kernel"), names, d_in, d_out))
    return tuple(shapes)


def stored_names(names: Iterable[str], rules: Iterable[WeightRule]) -> dict[str, str]:
    """The name that the table uses → the name in the files, for every tensor of a checkpoint.

    A checkpoint of the bare model lacks the prefix (``model.``, ``transformer.``, ``bert.``), and
    old conversions call a norm's weight gamma and its bias beta.

    Example:
        >>> rule = WeightRule("embed_tokens.embedding", "transformer.wte.weight", False)
        >>> stored_names(["wte.weight"], [rule])
        {'transformer.wte.weight': 'wte.weight'}
    """
    names, rules = list(names), list(rules)
    prefix = rules[0].name.partition(".")[0] + "." if rules else ""
    bare = not any(name.startswith(prefix) for name in names)

    def usual(name: str) -> str:
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        return prefix + name if bare and not name.startswith("lm_head.") else name

    return {usual(name): name for name in names}
