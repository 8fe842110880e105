"""A bidirectional encoder (BERT, RoBERTa, DeBERTa) with a classification or regression head.

As in ``decoder.py`` the module defines parameters and the forward, and weights live outside as flat
dicts by dotted path. The encoder is frozen and may carry adapters below ``layers.``; the head
(pooler included) trains as a whole, in float32, below ``head.``.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from balora_jax.array_types import Array, Bool, Float, Int, PRNGKeyArray
from balora_jax.models.decoder import Embedding, checkpointed, linear_keys
from balora_jax.models.disentangled import (
    DisentangledConfig,
    DisentangledSelfAttention,
    Keys,
    SelfAttention,
)
from balora_jax.models.encoder_config import EncoderConfig
from balora_jax.models.layers import (
    ACTIVATIONS,
    INTO_INNER,
    OUT_OF_HEADS,
    OUT_OF_INNER,
    LayerNorm,
    MakeLinear,
    stacked_linear,
)
from balora_jax.models.options import Options, Remat
from balora_jax.models.products import matmul
from balora_jax.models.variables import Ends, HeadParam, declared

ENCODER_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    **ACTIVATIONS,
    "tanh": jnp.tanh,
}


class Embeddings(nnx.Module):
    """Word, position and token-type embeddings, summed and normalised."""

    def __init__(self, config: EncoderConfig, dtype: jnp.dtype):
        width = config.hidden_size
        self.config = config
        self.word_embeddings = Embedding(config.vocab_size, width, dtype)
        if config.absolute_positions:
            self.position_embeddings = Embedding(config.max_positions, width, dtype)
        if config.type_vocab_size > 0:
            self.token_type_embeddings = Embedding(config.type_vocab_size, width, dtype)
        self.LayerNorm = LayerNorm(width, layers=None, eps=config.norm_eps, dtype=dtype)

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        attention_mask: Int[Array, "B T"],
        token_type_ids: Int[Array, "B T"] | None,
    ) -> Float[Array, "B T D"]:
        """Embed; DeBERTa's padding becomes zero."""
        config = self.config
        x = self.word_embeddings(input_ids)
        if config.absolute_positions:
            x = x + self.position_embeddings(token_positions(config, input_ids))
        if config.type_vocab_size > 0:
            types = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            x = x + self.token_type_embeddings(types)
        x = self.LayerNorm(x)
        if config.disentangled is not None:
            x = x * attention_mask[..., None].astype(x.dtype)
        return x


def token_positions(config: EncoderConfig, input_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Row of the position table of every token.

    RoBERTa counts the tokens that are not padding from ``pad_token_id + 1`` on, whatever the
    attention mask says, and gives padding the row ``pad_token_id``; the others count columns.
    """
    if config.position_offset == 0:
        return jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
    tokens = (input_ids != config.pad_token_id).astype(jnp.int32)
    return jnp.cumsum(tokens, axis=1) * tokens + config.position_offset - 1


class Intermediate(nnx.Module):
    """The MLP's first half, a stack."""

    def __init__(self, config: EncoderConfig, linear: MakeLinear):
        self.dense = linear("dense", config.hidden_size, config.intermediate_size, INTO_INNER, True)
        self.activation = config.activation

    def __call__(self, x: Float[Array, "B T D"], key: Array | None) -> Float[Array, "B T F"]:
        """Project and activate."""
        return ENCODER_ACTIVATIONS[self.activation](self.dense(x, key))


class Output(nnx.Module):
    """A projection, the residual and a norm behind them, a stack."""

    def __init__(
        self,
        config: EncoderConfig,
        d_in: int,
        axes: Ends,
        linear: MakeLinear,
        dtype: jnp.dtype,
    ):
        self.dense = linear("dense", d_in, config.hidden_size, axes, True)
        self.LayerNorm = LayerNorm(
            config.hidden_size, layers=config.num_layers, eps=config.norm_eps, dtype=dtype
        )

    def __call__(
        self, x: Float[Array, "B T F"], residual: Float[Array, "B T D"], key: Array | None
    ) -> Float[Array, "B T D"]:
        """Project, add and normalise."""
        return self.LayerNorm(self.dense(x, key) + residual)


class EncoderAttention(nnx.Module):
    """Self-attention with its output projection, a stack; names as in the checkpoints."""

    def __init__(self, config: EncoderConfig, make: Callable[[str], MakeLinear], dtype: jnp.dtype):
        width, heads = config.hidden_size, config.num_heads
        linear = make("layers.attention.self")
        self.self = (
            SelfAttention(width, heads, linear=linear)
            if config.disentangled is None
            else DisentangledSelfAttention(width, heads, config.disentangled, linear=linear)
        )
        self.output = Output(config, width, OUT_OF_HEADS, make("layers.attention.output"), dtype)

    def __call__(
        self, x: Float[Array, "B T D"], mask: Bool[Array, "B 1 #T T"], keys: Keys, table
    ) -> Float[Array, "B T D"]:
        """Attend, project, add and normalise."""
        return self.output(self.self(x, mask, keys, table), x, keys["attention_output"])


class EncoderLayer(nnx.Module):
    """The stack of encoder layers: attention and MLP, each with a norm behind its residual."""

    def __init__(
        self,
        config: EncoderConfig,
        options: Options,
    ):
        def make(prefix: str) -> MakeLinear:
            return stacked_linear(prefix, config.num_layers, options)

        dtype = options.dtype
        self.attention = EncoderAttention(config, make, dtype)
        self.intermediate = Intermediate(config, make("layers.intermediate"))
        inner, linear = config.intermediate_size, make("layers.output")
        self.output = Output(config, inner, OUT_OF_INNER, linear, dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Bool[Array, "B 1 #T T"],
        dropout_key: PRNGKeyArray | None,
        table: Float[Array, "P D"] | None,
    ) -> Float[Array, "B T D"]:
        """One layer."""
        keys = linear_keys(dropout_key, USES)
        x = self.attention(x, mask, keys, table)
        return self.output(self.intermediate(x, keys["intermediate"]), x, keys["output"])


# Uses of linear layers, in the order of their dropout keys: a shared one serves twice.
IN_ATTENTION = ("query", "key", "value", "pos_key", "pos_query")
USES = (*IN_ATTENTION, "attention_output", "intermediate", "output")


class RelativeTable(nnx.Module):
    """Embeddings of DeBERTa's relative positions, shared by all layers."""

    def __init__(self, config: EncoderConfig, relative: DisentangledConfig, dtype: jnp.dtype):
        width = config.hidden_size
        self.rel_embeddings = Embedding(2 * relative.span, width, dtype)
        self.normed = relative.norm_rel_ebd
        if self.normed:
            self.LayerNorm = LayerNorm(width, layers=None, eps=config.norm_eps, dtype=dtype)

    def __call__(self) -> Float[Array, "P D"]:
        """The table as the layers use it."""
        table = self.rel_embeddings.embedding[...]
        return self.LayerNorm(table) if self.normed else table


class HeadLinear(nnx.Module):
    """One trainable linear layer in float32."""

    def __init__(self, d_in: int, d_out: int, *, use_bias: bool = True):
        self.kernel = declared(jnp.zeros((d_in, d_out), jnp.float32), None, None, kind=HeadParam)
        bias = jnp.zeros((d_out,), jnp.float32)
        self.bias = declared(bias, None, kind=HeadParam) if use_bias else None

    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B F"]:
        """Apply the layer."""
        y = matmul(x, self.kernel[...])
        return y if self.bias is None else y + self.bias[...][None, :]


class Head(nnx.Module):
    """Pooler and classifier: ``out(act(dense(x)))`` in float32."""

    def __init__(self, config: EncoderConfig):
        self.dense = HeadLinear(config.hidden_size, config.hidden_size)
        self.out = HeadLinear(config.hidden_size, config.num_labels)
        self.activation = config.pooler_activation

    def __call__(self, features: Float[Array, "B D"]) -> Float[Array, "B C"]:
        """Logits, or the regression's value."""
        pooled = self.dense(features.astype(jnp.float32))
        return self.out(ENCODER_ACTIVATIONS[self.activation](pooled))


class Classifier(nnx.Module):
    """Token ids to hidden states, to the features of a row, to logits; subclasses say the first.

    Attributes:
        hidden: final hidden states [B, T, D] of the arguments of the other two.
        head: from features to logits.
    """

    hidden: Callable[..., Float[Array, "B T D"]]
    head: Callable[[Float[Array, "B D"]], Float[Array, "B C"]]

    def features(
        self,
        input_ids: Int[Array, "B T"],
        attention_mask: Int[Array, "B T"] | None = None,
        token_type_ids: Int[Array, "B T"] | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B D"]:
        """Hidden state of the first column, which the head reads: pad on the right."""
        return self.hidden(input_ids, attention_mask, token_type_ids, dropout_key)[:, 0]

    def head_logits(self, features: Float[Array, "B D"]) -> Float[Array, "B C"]:
        """Logits of features, float32."""
        return self.head(features)

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        attention_mask: Int[Array, "B T"] | None = None,
        token_type_ids: Int[Array, "B T"] | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B C"]:
        """Logits of every row, float32."""
        features = self.features(input_ids, attention_mask, token_type_ids, dropout_key)
        return self.head_logits(features)


class Encoder(Classifier):
    """BERT and its like: every layer normed behind its residuals."""

    def __init__(self, config: EncoderConfig, options: Options):
        self.config = config
        self.remat: Remat = options.remat
        self.embeddings = Embeddings(config, options.dtype)
        self.layers = EncoderLayer(config, options)
        if config.disentangled is not None:
            self.encoder = RelativeTable(config, config.disentangled, options.dtype)
        self.head = Head(config)

    def hidden(
        self,
        input_ids: Int[Array, "B T"],
        attention_mask: Int[Array, "B T"] | None = None,
        token_type_ids: Int[Array, "B T"] | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B T D"]:
        """Final hidden states; ``attention_mask`` is 1 on tokens, 0 on padding.

        ``dropout_key`` switches the adapters' dropout on; the checkpoint's own is never used.
        """
        valid = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
        x = self.embeddings(input_ids, valid, token_type_ids)
        mask, table = (valid > 0)[:, None, None, :], None
        if self.config.disentangled is not None:
            # DeBERTa's padding attends to nothing; that reaches padding's own states alone.
            mask, table = mask & mask.swapaxes(-1, -2), self.encoder()
        graph, stack = nnx.split(self.layers)
        keys = None
        if dropout_key is not None:
            keys = jax.random.split(dropout_key, self.config.num_layers)

        def body(x, layer):
            weights, key = layer
            return nnx.merge(graph, weights)(x, mask, key, table), None

        return jax.lax.scan(checkpointed(body, self.remat), x, (stack, keys))[0]


def init_head(config: EncoderConfig, key: PRNGKeyArray) -> dict[str, Array]:
    """A new head, float32: normal kernels of the checkpoint's ``initializer_range``, zero biases.

    Source: ``transformers``' initialisation of a head that a checkpoint does not have.
    """
    width, labels, deviation = config.hidden_size, config.num_labels, config.initializer_range
    dense, out = jax.random.split(key)
    return {
        "head.dense.kernel": deviation * jax.random.normal(dense, (width, width), jnp.float32),
        "head.dense.bias": jnp.zeros((width,), jnp.float32),
        "head.out.kernel": deviation * jax.random.normal(out, (width, labels), jnp.float32),
        "head.out.bias": jnp.zeros((labels,), jnp.float32),
    }
