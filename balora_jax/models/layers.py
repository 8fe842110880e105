"""Building blocks of the decoders: normalisation, projections of attention, MLP."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from balora_jax.array_types import Array, Float, Int
from balora_jax.models.attention import Tables, attend
from balora_jax.models.decoder_config import DecoderConfig, NormKind
from balora_jax.models.linear import Linear
from balora_jax.models.options import AttentionKernel, Options
from balora_jax.models.products import as_last
from balora_jax.models.rotary import rotate
from balora_jax.models.variables import Ends, declared

MakeLinear = Callable[..., Linear]
# Logical axes of the kernels of attention and of the MLP.
INTO_HEADS, OUT_OF_HEADS = ("width", "heads"), ("heads", "width")
INTO_INNER, OUT_OF_INNER = ("width", "inner"), ("inner", "width")


def norm_vector(value: Array) -> nnx.Variable:
    """A norm's vector [D], or a stack of them [L, D]: small, so whole on every device."""
    return declared(value, *(None,) if value.ndim == 1 else ("layers", None))


class RMSNorm(nnx.Module):
    """A stack of root-mean-square norms, computed in float32.

    Source: Llama rounds before it multiplies by the scale, OLMo-2 and Gemma (1 + w) after.
    """

    def __init__(
        self,
        width: int,
        *,
        layers: int | None,
        eps: float,
        dtype: jnp.dtype,
        kind: NormKind = "rms",
    ):
        shape = (width,) if layers is None else (layers, width)
        self.scale = norm_vector(jnp.ones(shape, dtype))
        self.eps = eps
        self.kind: NormKind = kind

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalise the last axis."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        scale = as_last(self.scale[...], y)
        if self.kind == "rms":
            return scale * y.astype(x.dtype)
        scale = scale.astype(jnp.float32)
        scale = 1.0 + scale if self.kind == "rms_plus_one" else scale
        return (y * scale).astype(x.dtype)


class LayerNorm(nnx.Module):
    """A stack of norms with mean, scale and most often a bias, computed in float32."""

    def __init__(
        self,
        width: int,
        *,
        layers: int | None,
        eps: float,
        dtype: jnp.dtype,
        use_bias: bool = True,
    ):
        shape = (width,) if layers is None else (layers, width)
        self.scale = norm_vector(jnp.ones(shape, dtype))
        self.bias = norm_vector(jnp.zeros(shape, dtype)) if use_bias else None
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalise the last axis."""
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        y = y * as_last(self.scale[...].astype(jnp.float32), y)
        if self.bias is not None:
            y = y + as_last(self.bias[...].astype(jnp.float32), y)
        return y.astype(x.dtype)


def make_norm(
    config: DecoderConfig, dtype: jnp.dtype, *, layers: int | None, width: int | None = None
) -> RMSNorm | LayerNorm:
    """The kind of norm that a config names, of the model's width unless given."""
    width = config.hidden_size if width is None else width
    if config.norm == "layer":
        return LayerNorm(width, layers=layers, eps=config.norm_eps, dtype=dtype)
    return RMSNorm(width, layers=layers, eps=config.norm_eps, dtype=dtype, kind=config.norm)


KeyValues = tuple[Float[Array, "B S G K"], Float[Array, "B S G K"]]


def with_cached(
    k: Array, v: Array, cached: KeyValues | None, column: Int[Array, ""] | int
) -> KeyValues:
    """Keys and values to attend to: these, or the cached ones with these written at ``column``."""
    if cached is None:
        return k, v
    update = jax.lax.dynamic_update_slice_in_dim
    return update(cached[0], k, column, axis=1), update(cached[1], v, column, axis=1)


class Attention(nnx.Module):
    """A stack of grouped-query self-attention layers with rotary positions."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        kernel: AttentionKernel,
        linear: MakeLinear,
        dtype: jnp.dtype,
    ):
        width, heads, groups = config.hidden_size, config.num_heads, config.num_kv_heads
        queries, keys = heads * config.head_dim, groups * config.head_dim
        bias = config.qkv_bias
        if config.fused_projections:
            self.qkv_proj = linear("qkv_proj", width, queries + 2 * keys, INTO_HEADS, bias)
        else:
            self.q_proj = linear("q_proj", width, queries, INTO_HEADS, bias)
            self.k_proj = linear("k_proj", width, keys, INTO_HEADS, bias)
            self.v_proj = linear("v_proj", width, keys, INTO_HEADS, bias)
        self.o_proj = linear("o_proj", queries, width, OUT_OF_HEADS, config.output_bias)
        if config.qk_norm != "none":
            each = config.qk_norm == "head"
            widths = (config.head_dim, config.head_dim) if each else (queries, keys)
            self.q_norm, self.k_norm = (
                make_norm(config, dtype, layers=config.num_layers, width=width) for width in widths
            )
        self.config = config
        self.kernel: AttentionKernel = kernel

    def __call__(
        self,
        x: Float[Array, "B T D"],
        tables: Tables,
        keys: dict[str, Array | None],
        cached: KeyValues | None = None,
        column: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B T D"], KeyValues]:
        """Attend; with ``cached`` keys and values, write this call's at ``column`` first."""
        q, k, v = self._project(x, keys)
        assert tables.cos is not None
        assert tables.sin is not None
        q, k = rotate(q, tables.cos, tables.sin), rotate(k, tables.cos, tables.sin)
        k, v = with_cached(k, v, cached, column)
        out = attend(
            q,
            k,
            v,
            tables.mask,
            self.kernel,
            scale=self.config.query_scale,
            soft_cap=self.config.attention_soft_cap,
        )
        return self.o_proj(out.reshape(*x.shape[:2], -1), keys["o_proj"]), (k, v)

    def _project(self, x: Array, keys: dict[str, Array | None]) -> tuple[Array, Array, Array]:
        """Queries [B, T, H, K], keys and values [B, T, G, K], normed where the config says so."""
        config = self.config
        if config.fused_projections:
            queries = config.num_heads * config.head_dim
            ends = [queries, queries + config.num_kv_heads * config.head_dim]
            parts = jnp.split(self.qkv_proj(x, keys["qkv_proj"]), ends, axis=-1)
        else:
            linears = {"q_proj": self.q_proj, "k_proj": self.k_proj, "v_proj": self.v_proj}
            parts = [linear(x, keys[name]) for name, linear in linears.items()]
        q, k, v = parts
        if config.qk_norm == "whole":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.reshape(*x.shape[:2], -1, config.head_dim) for part in (q, k, v))
        if config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


class GatedMLP(nnx.Module):
    """A stack of gated MLPs: ``down(act(gate(x)) · up(x))``."""

    def __init__(self, config: DecoderConfig, *, linear: MakeLinear):
        width, inner, use_bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.fused = config.fused_projections
        if self.fused:
            self.gate_up_proj = linear("gate_up_proj", width, 2 * inner, INTO_INNER, use_bias)
        else:
            self.gate_proj = linear("gate_proj", width, inner, INTO_INNER, use_bias)
            self.up_proj = linear("up_proj", width, inner, INTO_INNER, use_bias)
        self.down_proj = linear("down_proj", inner, width, OUT_OF_INNER, use_bias)
        self.activation = config.activation

    def __call__(
        self, x: Float[Array, "B T D"], keys: dict[str, Array | None]
    ) -> Float[Array, "B T D"]:
        """Apply the MLP."""
        if self.fused:
            gate, up = jnp.split(self.gate_up_proj(x, keys["gate_up_proj"]), 2, axis=-1)
        else:
            gate = self.gate_proj(x, keys["gate_proj"])
            up = self.up_proj(x, keys["up_proj"])
        return self.down_proj(ACTIVATIONS[self.activation](gate) * up, keys["down_proj"])


def stacked_linear(prefix: str, layers: int, options: Options) -> MakeLinear:
    """A constructor of the linear layers below ``prefix`` that looks up each one's adapter."""

    def make(name: str, d_in: int, d_out: int, axes: Ends, use_bias: bool) -> Linear:
        return Linear(
            d_in,
            d_out,
            layers=layers,
            axes=axes,
            use_bias=use_bias,
            adapter=options.adapters.get(f"{prefix}.{name}"),
            dtype=options.dtype,
            quantization=options.quantization,
            name=f"{prefix}.{name}.kernel",
        )

    return make
