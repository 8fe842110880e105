"""ModernBERT: norms before, rotary positions, gated MLPs, a window in most layers, few biases."""

import jax
import jax.numpy as jnp
from flax import nnx

from balora_jax.array_types import Array, Bool, Float, Int, PRNGKeyArray
from balora_jax.models.attention import Tables
from balora_jax.models.blockwise import Reach
from balora_jax.models.decoder import Embedding, checkpointed, linear_keys
from balora_jax.models.disentangled import attend_by_scores, products, split_heads
from balora_jax.models.encoder import ENCODER_ACTIVATIONS, Classifier, HeadLinear
from balora_jax.models.encoder_config import EncoderConfig, ModernConfig
from balora_jax.models.layers import (
    INTO_HEADS,
    INTO_INNER,
    OUT_OF_HEADS,
    OUT_OF_INNER,
    LayerNorm,
    MakeLinear,
    stacked_linear,
)
from balora_jax.models.options import Options, Remat
from balora_jax.models.rotary import RopeConfig, rotary_tables, rotate
from balora_jax.models.variables import HeadParam, declared

Keys = dict[str, Array | None]
# Uses of linear layers, in the order of their dropout keys.
USES = ("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo")


class ModernAttention(nnx.Module):
    """A stack of self-attention layers with q, k and v in one; names as in the checkpoints."""

    def __init__(self, config: EncoderConfig, modern: ModernConfig, *, linear: MakeLinear):
        width, bias = config.hidden_size, modern.attention_bias
        self.Wqkv = linear("Wqkv", width, 3 * width, INTO_HEADS, bias)
        self.Wo = linear("Wo", width, width, OUT_OF_HEADS, bias)
        self.heads = config.num_heads

    def __call__(
        self, x: Float[Array, "B T D"], tables: Tables, keys: Keys
    ) -> Float[Array, "B T D"]:
        """Attend where the mask allows."""
        assert tables.cos is not None
        assert tables.sin is not None
        assert not isinstance(tables.mask, Reach)
        q, k, v = jnp.split(self.Wqkv(x, keys["attn.Wqkv"]), 3, axis=-1)
        q, k = (part.reshape(*x.shape[:2], self.heads, -1) for part in (q, k))
        q, k = (rotate(part, tables.cos, tables.sin).transpose(0, 2, 1, 3) for part in (q, k))
        scores = products(q, k) * q.shape[-1] ** -0.5
        out = attend_by_scores(scores, tables.mask, split_heads(v, self.heads))
        return self.Wo(out, keys["attn.Wo"])


class ModernMLP(nnx.Module):
    """A stack of gated MLPs, both halves of the first layer in one."""

    def __init__(self, config: EncoderConfig, modern: ModernConfig, *, linear: MakeLinear):
        width, inner, bias = config.hidden_size, config.intermediate_size, modern.mlp_bias
        self.Wi = linear("Wi", width, 2 * inner, INTO_INNER, bias)
        self.Wo = linear("Wo", inner, width, OUT_OF_INNER, bias)
        self.activation = config.activation

    def __call__(self, x: Float[Array, "B T D"], keys: Keys) -> Float[Array, "B T D"]:
        """Apply the MLP."""
        inner, gate = jnp.split(self.Wi(x, keys["mlp.Wi"]), 2, axis=-1)
        return self.Wo(ENCODER_ACTIVATIONS[self.activation](inner) * gate, keys["mlp.Wo"])


class ModernLayer(nnx.Module):
    """The stack of layers, but for the norm before attention."""

    def __init__(self, config: EncoderConfig, modern: ModernConfig, options: Options):
        layers = config.num_layers
        attention, mlp = (
            stacked_linear(f"layers.{name}", layers, options) for name in ("attn", "mlp")
        )
        self.attn = ModernAttention(config, modern, linear=attention)
        self.mlp = ModernMLP(config, modern, linear=mlp)
        self.mlp_norm = _norm(config, options.dtype, layers=layers)

    def __call__(
        self, x: Float[Array, "B T D"], normed: Float[Array, "B T D"], tables: Tables, keys: Keys
    ) -> Float[Array, "B T D"]:
        """One layer; ``normed`` is what attention reads."""
        x = x + self.attn(normed, tables, keys)
        return x + self.mlp(self.mlp_norm(x), keys)


class ModernEmbeddings(nnx.Module):
    """Token embeddings, normalised."""

    def __init__(self, config: EncoderConfig, dtype: jnp.dtype):
        self.tok_embeddings = Embedding(config.vocab_size, config.hidden_size, dtype)
        self.norm = _norm(config, dtype, layers=None)

    def __call__(self, input_ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Embed."""
        return self.norm(self.tok_embeddings(input_ids))


class HeadNorm(nnx.Module):
    """A trainable norm in float32, without a bias."""

    def __init__(self, width: int, eps: float):
        self.scale = declared(jnp.ones((width,), jnp.float32), None, kind=HeadParam)
        self.eps = eps

    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B D"]:
        """Normalise the last axis."""
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return x * self.scale[...][None, :]


class ModernHead(nnx.Module):
    """``out(norm(act(dense(x))))`` in float32."""

    def __init__(self, config: EncoderConfig):
        width = config.hidden_size
        self.dense = HeadLinear(width, width, use_bias=False)
        self.norm = HeadNorm(width, config.norm_eps)
        self.out = HeadLinear(width, config.num_labels)
        self.activation = config.pooler_activation

    def __call__(self, features: Float[Array, "B D"]) -> Float[Array, "B C"]:
        """Logits, or the regression's value."""
        pooled = self.dense(features.astype(jnp.float32))
        return self.out(self.norm(ENCODER_ACTIVATIONS[self.activation](pooled)))


class ModernEncoder(Classifier):
    """ModernBERT (arXiv 2412.13663): the first layer has no norm before its attention."""

    def __init__(self, config: EncoderConfig, options: Options):
        assert config.modern is not None
        self.config, self.modern = config, config.modern
        self.remat: Remat = options.remat
        self.embeddings = ModernEmbeddings(config, options.dtype)
        if config.num_layers > 1:
            self.attn_norm = _norm(config, options.dtype, layers=config.num_layers - 1)
        self.layers = ModernLayer(config, self.modern, options)
        self.final_norm = _norm(config, options.dtype, layers=None)
        self.head = ModernHead(config)

    def hidden(
        self,
        input_ids: Int[Array, "B T"],
        attention_mask: Int[Array, "B T"] | None = None,
        token_type_ids: Int[Array, "B T"] | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B T D"]:
        """Final hidden states; ``attention_mask`` is 1 on tokens, 0 on padding."""
        del token_type_ids
        valid = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
        everywhere, local = self._tables(valid > 0)
        count = self.config.num_layers
        graph, stack = nnx.split(self.layers)
        keys = None if dropout_key is None else jax.random.split(dropout_key, count)
        norm_graph, norms = nnx.split(self.attn_norm) if count > 1 else (None, None)
        # The first layer gets the second one's norm, and leaves it alone.
        norms = jax.tree.map(lambda leaf: jnp.concatenate([leaf[:1], leaf]), norms)
        slides = jnp.asarray(self.modern.sliding_layers)

        def body(x, layer):
            weights, norm, key, slide, first = layer
            read = jax.tree.map(lambda a, b: jnp.where(slide, b, a), everywhere, local)
            normed = x
            if norm_graph is not None:
                normed = jnp.where(first, x, nnx.merge(norm_graph, norm)(x))
            return nnx.merge(graph, weights)(x, normed, read, linear_keys(key, USES)), None

        layers = (stack, norms, keys, slides, jnp.arange(count) == 0)
        x = self.embeddings(input_ids)
        return self.final_norm(jax.lax.scan(checkpointed(body, self.remat), x, layers)[0])

    def features(
        self,
        input_ids: Int[Array, "B T"],
        attention_mask: Int[Array, "B T"] | None = None,
        token_type_ids: Int[Array, "B T"] | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B D"]:
        """Hidden state of the first column, or the mean over the tokens, as the config says."""
        x = self.hidden(input_ids, attention_mask, token_type_ids, dropout_key)
        if not self.modern.pools_mean:
            return x[:, 0]
        valid = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = (valid > 0).astype(jnp.float32)[..., None]
        total = jnp.sum(x.astype(jnp.float32) * mask, axis=1)
        return (total / jnp.maximum(jnp.sum(mask, axis=1), 1.0)).astype(x.dtype)

    def _tables(self, valid: Bool[Array, "B T"]) -> tuple[Tables, Tables]:
        """What attention reads in the layers that see everything, and in those with a window."""
        columns = jnp.arange(valid.shape[1])
        positions = jnp.broadcast_to(columns, valid.shape)
        near = jnp.abs(columns[:, None] - columns[None, :]) <= self.modern.window
        mask = jnp.broadcast_to(valid[:, None, None, :], (len(valid), 1, *near.shape))

        def tables(rope: RopeConfig, mask: Bool[Array, "B 1 T T"]) -> Tables:
            width = self.config.hidden_size // self.config.num_heads
            return Tables(*rotary_tables(rope, width, positions), mask)

        return (
            tables(self.modern.rope, mask),
            tables(self.modern.local_rope, mask & near[None, None]),
        )


def _norm(config: EncoderConfig, dtype: jnp.dtype, *, layers: int | None) -> LayerNorm:
    eps = config.norm_eps
    return LayerNorm(config.hidden_size, layers=layers, eps=eps, dtype=dtype, use_bias=False)


def init_modern_head(
    config: EncoderConfig, modern: ModernConfig, key: PRNGKeyArray
) -> dict[str, Array]:
    """A new head, float32: cut normal kernels, scales 1, biases 0.

    Source: ``transformers``' initialisation of a head that a checkpoint does not have.
    """
    width, labels, cutoff = config.hidden_size, config.num_labels, modern.cutoff
    dense, out = jax.random.split(key)
    deviation = config.initializer_range / (2.0 * config.num_layers) ** 0.5

    def cut(key: PRNGKeyArray, shape: tuple[int, int]) -> Array:
        return jax.random.truncated_normal(key, -cutoff, cutoff, shape, jnp.float32)

    return {
        "head.dense.kernel": deviation * cut(dense, (width, width)),
        "head.norm.scale": jnp.ones((width,), jnp.float32),
        "head.out.kernel": width**-0.5 * cut(out, (width, labels)),
        "head.out.bias": jnp.zeros((labels,), jnp.float32),
    }
