"""A causal language model whose config covers the supported families of decoders.

The module defines parameters and the forward. Everything else holds its weights as flat dicts
``{dotted path: array}`` and binds them to the structure when it computes (``Structure.bind``), so
training is plain ``jax.jit``/``grad``/``scan`` over pytrees.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from balora_jax.array_types import Array, Float, Int, PRNGKeyArray
from balora_jax.models.attention import Tables, attention_mask, by_blocks, reach
from balora_jax.models.blockwise import Reach
from balora_jax.models.decoder_config import DecoderConfig, NormPlace
from balora_jax.models.experts import SparseMLP
from balora_jax.models.layers import (
    Attention,
    GatedMLP,
    KeyValues,
    MakeLinear,
    make_norm,
    stacked_linear,
)
from balora_jax.models.options import AttentionKernel, Options, Remat
from balora_jax.models.rotary import rotary_tables
from balora_jax.models.variables import declared
from balora_jax.numerics.head_types import LogitMap

Cache = dict[str, Array]


class Embedding(nnx.Module):
    """A table [V, D]: token embeddings, or the head that scores every entry.

    ``axis`` is the logical axis of the entries, None for a table too small to be split there.
    """

    def __init__(self, entries: int, width: int, dtype: jnp.dtype, *, axis: str | None = None):
        self.embedding = declared(jnp.zeros((entries, width), dtype), axis, "width")

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Rows of the table."""
        return jnp.take(self.embedding[...], ids, axis=0)


# Checkpoints' names of the norms before and after attention, before and after the MLP.
NORMS: dict[NormPlace, tuple[str | None, ...]] = {
    "before": ("input_layernorm", None, "post_attention_layernorm", None),
    "after": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "both": (
        *("input_layernorm", "post_attention_layernorm"),
        *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
}


class DecoderLayer(nnx.Module):
    """The stack of decoder layers: attention and MLP, each with norms and a residual."""

    # Their order numbers the dropout keys.
    linears = (
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        *("qkv_proj", "gate_up_proj", "w1", "w2", "w3"),
    )

    def __init__(self, config: DecoderConfig, options: Options):
        layers, dtype = config.num_layers, options.dtype

        def make(prefix: str) -> MakeLinear:
            return stacked_linear(prefix, layers, options)

        linear = make("layers.self_attn")
        self.self_attn = Attention(config, kernel=options.kernel, linear=linear, dtype=dtype)
        if config.experts:
            self.block_sparse_moe = SparseMLP(config, options)
        else:
            self.mlp = GatedMLP(config, linear=make("layers.mlp"))
        self.norms: NormPlace = config.norms
        self.residual_scale = config.residual_scale
        for name in filter(None, NORMS[config.norms]):
            setattr(self, name, make_norm(config, dtype, layers=layers))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        tables: Tables,
        keys: dict[str, Array | None],
        cached: KeyValues | None,
        column: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "B T D"], KeyValues]:
        """One layer; also returns the keys and values it attended to."""
        mlp = self.block_sparse_moe if hasattr(self, "block_sparse_moe") else self.mlp
        before, after, before_mlp, after_mlp = (
            getattr(self, name) if name else lambda x: x for name in NORMS[self.norms]
        )
        attended, kept = self.self_attn(before(x), tables, keys, cached, column)
        x = x + self._scaled(after(attended))
        return x + self._scaled(after_mlp(mlp(before_mlp(x), keys))), kept

    def _scaled(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Times the factor of the residuals, which is not rounded first."""
        scale = self.residual_scale
        return x if scale == 1.0 else (x.astype(jnp.float32) * scale).astype(x.dtype)


def linear_keys(key: PRNGKeyArray | None, names: tuple[str, ...]) -> dict[str, Array | None]:
    """A dropout key for each linear layer of a decoder layer."""
    return {
        name: None if key is None else jax.random.fold_in(key, i) for i, name in enumerate(names)
    }


class Decoder(nnx.Module):
    """Token ids to hidden states and logits."""

    def __init__(
        self,
        config: DecoderConfig,
        options: Options,
        layer: Callable[[DecoderConfig, Options], Any] = DecoderLayer,
    ):
        self.config, dtype = config, options.dtype
        self.remat: Remat = options.remat
        self.kernel: AttentionKernel = options.kernel
        table = (config.vocab_size, config.hidden_size, dtype)
        self.embed_tokens = Embedding(*table, axis="vocabulary")
        if config.rope is None:
            self.embed_positions = Embedding(config.max_length, config.hidden_size, dtype)
        self.layers = layer(config, options)
        self.norm = make_norm(config, dtype, layers=None)
        if not config.tie_word_embeddings:
            self.lm_head = Embedding(*table, axis="vocabulary")

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
        """Final hidden states; segment 0 is padding, others attend within themselves.

        Positions rise with the column within a segment. States of padding mean nothing.
        """
        blocks = by_blocks(input_ids.shape[1], self.kernel)
        reach_of = functools.partial(reach, positions, segments) if blocks else None
        tables = self._tables(positions, segments, positions, segments, reach_of)
        x, _ = self._run_layers(self._embed(input_ids, positions), tables, dropout_key)
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
        tables = self._tables(positions, valid, key_positions, key_valid)
        x = self._embed(input_ids, positions)
        cached = (cache["keys"], cache["values"])
        x, (keys, values) = self._run_layers(x, tables, None, cached, column)
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

    def _embed(
        self, input_ids: Int[Array, "B T"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Token embeddings, scaled or with those of the positions added."""
        x = self.embed_tokens(input_ids)
        if self.config.embedding_scale != 1.0:
            # Rounded to the dtype first, as the checkpoints were trained.
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        return x + self.embed_positions(positions) if self.config.rope is None else x

    def _tables(
        self,
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        key_positions: Int[Array, "B S"],
        key_segments: Int[Array, "B S"],
        reach_of: Callable[[int | None], Reach] | None = None,
    ) -> list[Tables]:
        """What attention reads, for every kind of layer; by ``reach_of`` a window where given."""
        config = self.config
        plain = functools.partial(attention_mask, positions, segments, key_positions, key_segments)
        mask: Callable[[int | None], Array | Reach] = reach_of or plain

        def tables(slides: bool, turns: bool) -> Tables:
            rope = (config.local_rope or config.rope) if slides else config.rope
            window = config.sliding_window if slides else None
            if rope is None:
                return Tables(None, None, mask(window))
            cos, sin = rotary_tables(rope, config.head_dim, positions)
            if not turns:
                cos, sin = jnp.ones_like(cos), jnp.zeros_like(sin)
            return Tables(cos, sin, mask(window))

        return [tables(*kind) for kind in sorted(set(config.layer_kinds))]

    def _run_layers(
        self,
        x: Float[Array, "B T D"],
        tables: list[Tables],
        dropout_key: PRNGKeyArray | None,
        cached: tuple[Float[Array, "L B S G K"], Float[Array, "L B S G K"]] | None = None,
        column: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Scan over the stack; keys and values are returned only where there is a cache."""
        count, groups = self.config.num_layers, self.config.expert_groups
        graph, stack = nnx.split(self.layers)
        # Experts lie on the leading axis too: [L·E, …] becomes [L, E, …].
        stack = jax.tree.map(
            lambda leaf: leaf if leaf.shape[0] == count else _by_layer(leaf, count, groups), stack
        )
        keys = None if dropout_key is None else jax.random.split(dropout_key, count)
        each = self.config.layer_kinds
        kinds = sorted(set(each))
        which = jnp.asarray([kinds.index(kind) for kind in each]) if len(kinds) > 1 else None

        def body(x, layer):
            weights, key, kept, kind = layer
            read = tables[0]
            for i, other in enumerate(tables[1:], start=1):
                read = jax.tree.map(lambda a, b, i=i: jnp.where(kind == i, b, a), read, other)
            module = nnx.merge(graph, weights)
            y, kept = module(x, read, linear_keys(key, module.linears), kept, column)
            return y, (kept if cached is not None else None)

        return jax.lax.scan(checkpointed(body, self.remat), x, (stack, keys, cached, which))


def _by_layer(leaf: Array, layers: int, groups: int) -> Array:
    """A stack of experts as [L, E, …]; moves nothing where each device holds one group."""
    inner = leaf.shape[1:]
    if groups > 1:
        leaf = leaf.reshape(groups, layers, -1, *inner).swapaxes(0, 1)
    return leaf.reshape(layers, -1, *inner)


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
