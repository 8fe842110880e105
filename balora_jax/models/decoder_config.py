"""Shape and options of a causal language model, as its ``config.json`` fixes them."""

from dataclasses import dataclass
from typing import Literal

from balora_jax.models.rotary import RopeConfig
from balora_jax.numerics.head_types import LINEAR, LogitMap

EMBEDDING, HEAD = "embed_tokens.embedding", "lm_head.embedding"
"""Paths of the two tables of the vocabulary; a tied model has the first alone."""

NormKind = Literal["rms", "rms_float32", "rms_plus_one", "layer"]
NormPlace = Literal["before", "both", "after"]
QKNorm = Literal["none", "head", "whole"]


@dataclass(frozen=True)
class DecoderConfig:
    """One decoder; the defaults are Llama's.

    Attributes:
        model_type: family name in Hugging Face configs.
        vocab_size: V.
        hidden_size: D.
        intermediate_size: F.
        num_layers: L.
        num_heads: H.
        num_kv_heads: G; H / G queries share a key.
        head_dim: K.
        norm_eps: epsilon of the norms.
        activation: of the MLP.
        rope: rotary positions; None for a learned table (GPT-2).
        max_length: positions the checkpoint was made for.
        tie_word_embeddings: the head is the embedding table.
        sliding_window: tokens a query looks back over, itself included; None for all.
        sliding_layers: which layers have the window; empty for all of them.
        local_rope: rotary positions of the layers with a window, where they differ (Gemma 3).
        rotated_layers: which layers have positions at all (SmolLM3); empty for all of them.
        qkv_bias: biases on q, k and v.
        output_bias: bias on o.
        mlp_bias: biases on gate, up and down.
        fused_projections: q, k, v in one layer, and gate and up in one (Phi-3).
        qk_norm: RMS norms of q and k over each ``head`` (Qwen3, Gemma 3), over the ``whole``
            projection (OLMo-2), or ``none``.
        norm: ``rms``, ``rms_float32`` (multiplied by its scale before it is rounded, OLMo-2),
            ``rms_plus_one`` (likewise, scale 1 + w, Gemma), or ``layer`` (mean and bias, GPT-2).
        norms: where norms stand: ``before`` attention and MLP, ``after`` them (OLMo-2), or
            ``both`` (Gemma 2 and 3); always within the residual.
        embedding_scale: factor of the embeddings (Gemma, Granite).
        residual_scale: factor of what attention and MLP add (Granite).
        query_scale: factor of the attention scores; None for 1/√K.
        attention_soft_cap: largest size of an attention score (Gemma 2).
        experts: MLPs of a layer, of which a router takes some; 0 for one that always runs.
        experts_per_token: how many it takes (Mixtral).
        expert_groups: devices over which the experts of a layer are spread. A stack of experts has
            the axes [groups, L, E / groups, …], the first three in one; of one group that is L·E.
        shares_sum_to_one: whether the shares of those taken are divided by their sum.
        logit_map: from ``hidden · head`` to logits: a soft cap, a factor.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    activation: str
    rope: RopeConfig | None
    max_length: int
    tie_word_embeddings: bool
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()
    local_rope: RopeConfig | None = None
    rotated_layers: tuple[bool, ...] = ()
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    fused_projections: bool = False
    qk_norm: QKNorm = "none"
    norm: NormKind = "rms"
    norms: NormPlace = "before"
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    query_scale: float | None = None
    attention_soft_cap: float | None = None
    experts: int = 0
    experts_per_token: int = 0
    expert_groups: int = 1
    shares_sum_to_one: bool = True
    logit_map: LogitMap = LINEAR

    @property
    def token_table(self) -> str:
        """Path of the embeddings of the tokens."""
        return EMBEDDING

    @property
    def head_path(self) -> str:
        """Path of the table that scores the vocabulary."""
        return EMBEDDING if self.tie_word_embeddings else HEAD

    @property
    def layer_kinds(self) -> tuple[tuple[bool, bool], ...]:
        """Of each layer, whether it has the window, and whether it has rotary positions."""
        slides = self.sliding_layers or (True,) * self.num_layers
        rotates = self.rotated_layers or (True,) * self.num_layers
        windowed = self.sliding_window is not None or self.local_rope is not None
        return tuple(
            (windowed and slide, turn) for slide, turn in zip(slides, rotates, strict=True)
        )
