"""Building blocks of the decoders: normalisation, attention, MLP."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from balora_jax.array_types import Array, Bool, Float, Int
from balora_jax.models.decoder_config import DecoderConfig, NormKind
from balora_jax.models.linear import Linear
from balora_jax.models.options import AttentionKernel, Options
from balora_jax.models.products import as_last
from balora_jax.models.rotary import rotate
from balora_jax.models.variables import Ends, declared
from balora_jax.parallel.token_split import gather_tokens, parts

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


class Tables(NamedTuple):
    """Inputs of attention besides its rows: rotary tables (None where there are none), mask."""

    cos: Float[Array, "B T 1 K2"] | None
    sin: Float[Array, "B T 1 K2"] | None
    mask: Bool[Array, "B 1 T S"]


def attention_mask(
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    key_segments: Int[Array, "B S"],
    window: int | None,
) -> Bool[Array, "B 1 T S"]:
    """Who may attend to whom: the same segment, not the future, not beyond the window.

    Padding is segment 0: it attends to padding only, so no row of the softmax is empty.
    """
    distance = positions[:, :, None] - key_positions[:, None, :]
    allowed = (segments[:, :, None] == key_segments[:, None, :]) & (distance >= 0)
    if window is not None:
        allowed &= distance < window
    return allowed[:, None]


def attend(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    mask: Bool[Array, "B 1 T S"],
    kernel: AttentionKernel,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "B T H K"]:
    """Scaled dot-product attention with grouped queries; softmax in float32.

    ``scale`` multiplies the scores (1/√K where not given); ``soft_cap`` bounds them by
    ``cap · tanh(score / cap)``, which no fused kernel here does.
    """
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    k, v = gather_tokens(k), gather_tokens(v)
    fused = kernel == "cudnn" or (kernel == "auto" and _cudnn_serves(q))
    if fused and soft_cap is None:
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation="cudnn")
    return _attend_by_products(q, k, v, mask, scale, soft_cap)


def _attend_by_products(
    q: Array, k: Array, v: Array, mask: Array, scale: float, soft_cap: float | None
) -> Array:
    """Attention as two batched products, heads before tokens.

    In this order no operand of a product is copied into another one, forward or backward, which
    halves the time on a CPU against ``jax.nn.dot_product_attention``. The queries that share keys
    lie side by side for each token, so that keys are not repeated and a device keeps its tokens.
    """
    batch, tokens, heads, width = q.shape
    groups, keys = k.shape[2], k.shape[1]
    share = heads // groups
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    q = q.reshape(batch, tokens, groups, share, width).transpose(0, 2, 1, 3, 4)
    q = q.reshape(batch, groups, tokens * share, width)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum(
        "bgtk,bgsk->bgts", q, k, precision=precision, preferred_element_type=jnp.float32
    ).reshape(batch, groups, tokens, share, keys)
    scores = scores * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(mask[:, :, :, None], scores, jnp.finfo(jnp.float32).min / 2)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    weights = weights.reshape(batch, groups, tokens * share, keys)
    out = jnp.einsum("bgts,bgsk->bgtk", weights, v, precision=precision)
    out = out.reshape(batch, groups, tokens, share, width).transpose(0, 2, 1, 3, 4)
    return out.reshape(batch, tokens, heads, width)


def _cudnn_serves(q: Array) -> bool:
    """Whether cuDNN's fused attention takes it: whole rows, 16 bit, heads of 8 n up to 128."""
    sixteen_bit = q.dtype in (jnp.bfloat16, jnp.float16)
    return (
        jax.default_backend() == "gpu"
        and sixteen_bit
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 128
        and q.shape[1] > 1
        and parts() == 1
    )


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
