"""GPT-2's layer: norms with bias, one projection for q, k and v, and a plain MLP."""

import jax.numpy as jnp
from flax import nnx

from balora_jax.array_types import Array, Float, Int
from balora_jax.models.attention import Tables, attend
from balora_jax.models.blockwise import Reach
from balora_jax.models.decoder_config import DecoderConfig
from balora_jax.models.layers import (
    ACTIVATIONS,
    INTO_HEADS,
    INTO_INNER,
    OUT_OF_HEADS,
    OUT_OF_INNER,
    KeyValues,
    MakeLinear,
    make_norm,
    stacked_linear,
    with_cached,
)
from balora_jax.models.options import AttentionKernel, Options

LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


class Gpt2Attention(nnx.Module):
    """A stack of self-attention layers; positions come with the embeddings."""

    def __init__(self, config: DecoderConfig, *, kernel: AttentionKernel, linear: MakeLinear):
        width = config.hidden_size
        self.c_attn = linear("c_attn", width, 3 * width, INTO_HEADS, True)
        self.c_proj = linear("c_proj", width, width, OUT_OF_HEADS, True)
        self.config = config
        self.kernel: AttentionKernel = kernel

    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Array | Reach,
        keys: dict[str, Array | None],
        cached: KeyValues | None,
        column: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "B T D"], KeyValues]:
        """Attend; with ``cached`` keys and values, write this call's at ``column`` first."""
        parts = jnp.split(self.c_attn(x, keys["attn.c_attn"]), 3, axis=-1)
        q, k, v = (part.reshape(*x.shape[:2], -1, self.config.head_dim) for part in parts)
        k, v = with_cached(k, v, cached, column)
        out = attend(q, k, v, mask, self.kernel, scale=self.config.query_scale)
        return self.c_proj(out.reshape(x.shape), keys["attn.c_proj"]), (k, v)


class Gpt2MLP(nnx.Module):
    """A stack of MLPs: ``c_proj(act(c_fc(x)))``."""

    def __init__(self, config: DecoderConfig, *, linear: MakeLinear):
        width, inner = config.hidden_size, config.intermediate_size
        self.c_fc = linear("c_fc", width, inner, INTO_INNER, True)
        self.c_proj = linear("c_proj", inner, width, OUT_OF_INNER, True)
        self.activation = config.activation

    def __call__(self, x: Float[Array, "B T D"], keys: dict[str, Array | None]) -> Array:
        """Apply the MLP."""
        inner = ACTIVATIONS[self.activation](self.c_fc(x, keys["mlp.c_fc"]))
        return self.c_proj(inner, keys["mlp.c_proj"])


class Gpt2Layer(nnx.Module):
    """The stack of GPT-2's layers. Source: ``GPT2Block`` of ``transformers``."""

    linears = LINEARS

    def __init__(self, config: DecoderConfig, options: Options):
        layers, dtype = config.num_layers, options.dtype

        def make(prefix: str) -> MakeLinear:
            return stacked_linear(prefix, layers, options)

        self.attn = Gpt2Attention(config, kernel=options.kernel, linear=make("layers.attn"))
        self.mlp = Gpt2MLP(config, linear=make("layers.mlp"))
        self.ln_1 = make_norm(config, dtype, layers=layers)
        self.ln_2 = make_norm(config, dtype, layers=layers)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        tables: Tables,
        keys: dict[str, Array | None],
        cached: KeyValues | None,
        column: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "B T D"], KeyValues]:
        """One layer; also returns the keys and values it attended to."""
        attended, kept = self.attn(self.ln_1(x), tables.mask, keys, cached, column)
        x = x + attended
        return x + self.mlp(self.ln_2(x), keys), kept
