"""A causal language model whose config covers the Llama and Mistral families.

The module defines parameters and the forward. Everything else holds its weights as flat dicts
``{dotted path: array}`` and binds them to the structure when it computes (``Structure.bind``), so
training is plain ``jax.jit``/``grad``/``scan`` over pytrees.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from balora_jax.array_types import Array, Float, Int, PRNGKeyArray
from balora_jax.models.adapters import AdapterShape, Origin
from balora_jax.models.layers import (
    Attention,
    AttentionKernel,
    GatedMLP,
    RMSNorm,
    RopeConfig,
    attention_mask,
    rotary_tables,
    stacked_linear,
)
from balora_jax.numerics.head import LINEAR, LogitMap

Remat = Literal["none", "dots", "full", "offload"]
Cache = dict[str, Array]


@dataclass(frozen=True)
class DecoderConfig:
    """Shape and options of a decoder; every field comes from the checkpoint's ``config.json``.

    Attributes:
        model_type: family name in Hugging Face configs.
        vocab_size: V.
        hidden_size: D.
        intermediate_size: F.
        num_layers: L.
        num_heads: H.
        num_kv_heads: G; H / G queries share a key.
        head_dim: K.
        norm_eps: epsilon of the RMS norms.
        activation: of the MLP's gate.
        rope: rotary positions.
        sliding_window: tokens a query looks back over, itself included; None for all.
        tie_word_embeddings: the head is the embedding table.
        attention_bias: biases on q, k, v and o.
        mlp_bias: biases on gate, up and down.
        max_length: positions the checkpoint was made for.
        logit_map: from ``hidden · head`` to logits: a scale, a soft cap.
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
    rope: RopeConfig
    sliding_window: int | None
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    max_length: int
    logit_map: LogitMap = LINEAR


class Embedding(nnx.Module):
    """A table [V, D]: token embeddings, or the head that scores every entry."""

    def __init__(self, entries: int, width: int, dtype: jnp.dtype):
        self.embedding = nnx.Param(jnp.zeros((entries, width), dtype))

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Rows of the table."""
        return jnp.take(self.embedding[...], ids, axis=0)


class DecoderLayer(nnx.Module):
    """The stack of decoder layers: attention and MLP, each behind a norm and a residual."""

    def __init__(
        self,
        config: DecoderConfig,
        adapters: dict[str, AdapterShape],
        kernel: AttentionKernel,
        dtype: jnp.dtype,
    ):
        layers = config.num_layers
        self.self_attn = Attention(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            use_bias=config.attention_bias,
            kernel=kernel,
            linear=stacked_linear("layers.self_attn", layers, adapters, dtype),
        )
        self.mlp = GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            activation=config.activation,
            use_bias=config.mlp_bias,
            linear=stacked_linear("layers.mlp", layers, adapters, dtype),
        )
        norm = {"layers": layers, "eps": config.norm_eps, "dtype": dtype}
        self.input_layernorm = RMSNorm(config.hidden_size, **norm)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, **norm)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        tables: tuple[Array, Array, Array],
        dropout_key: PRNGKeyArray | None,
        cached: tuple[Array, Array] | None,
        column: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        """One layer; also returns the keys and values it attended to."""
        keys = _linear_keys(dropout_key)
        cos, sin, mask = tables
        attended, kept = self.self_attn(
            self.input_layernorm(x), cos, sin, mask, keys, cached, column
        )
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x), keys), kept


LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _linear_keys(key: PRNGKeyArray | None) -> dict[str, Array | None]:
    return {
        name: None if key is None else jax.random.fold_in(key, i) for i, name in enumerate(LINEARS)
    }


class Decoder(nnx.Module):
    """Token ids to hidden states and logits."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        adapters: dict[str, AdapterShape],
        dtype: jnp.dtype,
        remat: Remat,
        kernel: AttentionKernel,
    ):
        self.config = config
        self.remat: Remat = remat
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype)
        self.layers = DecoderLayer(config, adapters, kernel, dtype)
        self.norm = RMSNorm(config.hidden_size, layers=None, eps=config.norm_eps, dtype=dtype)
        if not config.tie_word_embeddings:
            self.lm_head = Embedding(config.vocab_size, config.hidden_size, dtype)

    @property
    def head(self) -> Float[Array, "V D"]:
        """The table that turns hidden states into logits."""
        tied = self.config.tie_word_embeddings
        return (self.embed_tokens if tied else self.lm_head).embedding[...]

    @property
    def logit_map(self) -> LogitMap:
        """From products with the head to logits."""
        return self.config.logit_map

    def hidden(
        self,
        input_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B T D"]:
        """Final hidden states; segment 0 is padding, others attend within themselves."""
        mask = attention_mask(positions, segments, positions, segments, self.config.sliding_window)
        cos, sin = rotary_tables(self.config.rope, self.config.head_dim, positions)
        x, _ = self._run_layers(self.embed_tokens(input_ids), (cos, sin, mask), dropout_key)
        return self.norm(x)

    def __call__(
        self, input_ids: Int[Array, "B T"], attention_mask: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T V"]:
        """Logits of every position, float32; ``attention_mask`` is 1 on tokens, 0 on padding."""
        mask = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.logits(self.hidden(input_ids, mask_positions(mask), mask))

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Scores of every vocabulary entry, accumulated in float32."""
        precision = jax.lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None
        products = jnp.einsum(
            "...d,vd->...v",
            hidden,
            self.head,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        return self.logit_map(products)

    def extend(
        self,
        input_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        valid: Int[Array, "B T"],
        cache: Cache,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Hidden states of further tokens, and the cache with their keys and values added."""
        column = cache["column"]
        update = jax.lax.dynamic_update_slice_in_dim
        key_positions = update(cache["positions"], positions, column, axis=1)
        key_valid = update(cache["valid"], valid, column, axis=1)
        mask = attention_mask(
            positions, valid, key_positions, key_valid, self.config.sliding_window
        )
        cos, sin = rotary_tables(self.config.rope, self.config.head_dim, positions)
        x = self.embed_tokens(input_ids)
        cached = (cache["keys"], cache["values"])
        x, (keys, values) = self._run_layers(x, (cos, sin, mask), None, cached, column)
        return self.norm(x), {
            "keys": keys,
            "values": values,
            "positions": key_positions,
            "valid": key_valid,
            "column": column + input_ids.shape[1],
        }

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A cache for ``length`` columns in all; unwritten columns are invalid."""
        config = self.config
        shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
        dtype = self.embed_tokens.embedding[...].dtype
        return {
            "keys": jnp.zeros(shape, dtype),
            "values": jnp.zeros(shape, dtype),
            "positions": jnp.zeros((batch, length), jnp.int32),
            "valid": jnp.full((batch, length), -1, jnp.int32),
            "column": jnp.zeros((), jnp.int32),
        }

    def _run_layers(
        self,
        x: Float[Array, "B T D"],
        tables: tuple[Array, Array, Array],
        dropout_key: PRNGKeyArray | None,
        cached: tuple[Array, Array] | None = None,
        column: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Scan over the stack; keys and values are returned only where there is a cache."""
        graph, stack = nnx.split(self.layers)
        keys = None
        if dropout_key is not None:
            keys = jax.random.split(dropout_key, self.config.num_layers)

        def body(x, layer):
            weights, key, kept = layer
            y, kept = nnx.merge(graph, weights)(x, tables, key, kept, column)
            return y, (kept if cached is not None else None)

        return jax.lax.scan(checkpointed(body, self.remat), x, (stack, keys, cached))


def checkpointed(body, remat: Remat):
    """Rematerialise a layer in the backward: nothing, all but matrix products, or all of it.

    ``offload`` is ``dots`` with the products kept in the host's memory.
    """
    if remat == "none":
        return body
    policies = jax.checkpoint_policies
    policy = {
        "full": policies.nothing_saveable,
        "dots": policies.dots_with_no_batch_dims_saveable,
        "offload": policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
    }[remat]
    return jax.checkpoint(body, policy=policy, prevent_cse=False)


def mask_positions(mask: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions that count tokens only, so that left and right padding mean the same text."""
    return jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)


@dataclass(frozen=True)
class Structure:
    """A module without its arrays: the graph, and the shape of every array it needs.

    Attributes:
        graph: NNX graph definition (static, hashable).
        frozen, adapters, origin: shapes by dotted path: checkpoint weights, trainable factors,
            and the constants of the adapters.
    """

    graph: nnx.GraphDef
    frozen: dict[str, jax.ShapeDtypeStruct]
    adapters: dict[str, jax.ShapeDtypeStruct]
    origin: dict[str, jax.ShapeDtypeStruct]

    def bind(self, *parts: Mapping[str, Array]) -> Decoder:
        """The module with these arrays (flat dicts, merged)."""
        tree: dict = {}
        for part in parts:
            for path, value in part.items():
                *parents, leaf = path.split(".")
                node = tree
                for name in parents:
                    node = node.setdefault(name, {})
                node[leaf] = value
        return nnx.merge(self.graph, nnx.State(tree))


def structure(
    config: DecoderConfig,
    *,
    adapters: dict[str, AdapterShape] | None = None,
    dtype: jnp.dtype | str = jnp.float32,
    remat: Remat = "none",
    kernel: AttentionKernel = "auto",
) -> Structure:
    """The decoder of ``config``, from shapes alone (no array is made)."""
    module = nnx.eval_shape(
        lambda: Decoder(
            config, adapters=adapters or {}, dtype=jnp.dtype(dtype), remat=remat, kernel=kernel
        )
    )
    # A LoRAParam is a Param as well, so it is named first.
    graph, lora, origin, frozen = nnx.split(module, nnx.LoRAParam, Origin, nnx.Param)
    return Structure(graph, _flat(frozen), _flat(lora), _flat(origin))


def _flat(state: nnx.State) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        ".".join(str(part) for part in path): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for path, leaf in nnx.to_flat_state(state)
    }
