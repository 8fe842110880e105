"""A mixture of experts: a router takes some of a layer's MLPs for each token."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from balora_jax.array_types import Array, Float, Int, PRNGKeyArray
from balora_jax.models.decoder_config import DecoderConfig
from balora_jax.models.layers import ACTIVATIONS, INTO_INNER, OUT_OF_INNER
from balora_jax.models.linear import Linear
from balora_jax.models.options import Options
from balora_jax.models.quantized import Kind, dequantize_kernel
from balora_jax.models.variables import Ends, declared


class ExpertLinear(Linear):
    """A stack of L·E linear layers; the call sees the E experts of one layer.

    Rows come sorted by expert. An adapter is in delta form, as in ``Linear``.
    """

    def __call__(
        self,
        x: Float[Array, "M D_in"],
        dropout_key: PRNGKeyArray | None = None,
        *,
        sizes: Int[Array, "E"],
    ) -> Float[Array, "M D_out"]:
        """Each row through its own expert; ``sizes`` says how many rows belong to each."""
        product = functools.partial(grouped_matmul, sizes=sizes)
        spread = functools.partial(jnp.repeat, repeats=sizes, axis=0, total_repeat_length=len(x))
        return self._adapted(x, self._grouped(x, sizes), dropout_key, product, spread)

    def _grouped(self, x: Array, sizes: Array) -> Array:
        """Each row times its expert's kernel, dequantised here if need be."""
        if self.quantization == "none":
            return grouped_matmul(x, self.kernel[...], sizes)
        return quantized_grouped_matmul(x, self._codes(), sizes, self.quantization)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def quantized_grouped_matmul(
    x: Float[Array, "M D"], values: Mapping[str, Array], sizes: Int[Array, "E"], kind: Kind
) -> Float[Array, "M F"]:
    """:func:`grouped_matmul` with kernels [E, D, F] that are dequantised here.

    As in ``quantized_matmul`` what is kept for the backward are the codes, whose gradient is zero.
    """
    return grouped_matmul(x, dequantize_kernel(values, kind, x.dtype), sizes)


def _grouped_forward(x: Array, values: Mapping[str, Array], sizes: Array, kind: Kind):
    return quantized_grouped_matmul(x, values, sizes, kind), (values, sizes)


def _grouped_backward(kind: Kind, kept: tuple[Mapping[str, Array], Array], dy: Array):
    values, sizes = kept
    kernels = dequantize_kernel(values, kind, dy.dtype)
    return grouped_matmul(dy, kernels.swapaxes(-1, -2), sizes), None, None


quantized_grouped_matmul.defvjp(_grouped_forward, _grouped_backward)


def grouped_matmul(
    x: Float[Array, "M D"], kernels: Float[Array, "E D F"], sizes: Int[Array, "E"]
) -> Float[Array, "M F"]:
    """Each group of ``sizes[e]`` rows times the kernel of its own expert."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.ragged_dot(
        x, kernels, sizes, precision=precision, preferred_element_type=x.dtype
    )


def stacked_experts(prefix: str, layers: int, options: Options) -> Callable[..., ExpertLinear]:
    """As ``stacked_linear``, for experts; ``layers`` are those of all layers."""

    def make(name: str, d_in: int, d_out: int, axes: Ends) -> ExpertLinear:
        return ExpertLinear(
            d_in,
            d_out,
            layers=layers,
            axes=axes,
            adapter=options.adapters.get(f"{prefix}.{name}"),
            dtype=options.dtype,
            quantization=options.quantization,
            name=f"{prefix}.{name}.kernel",
        )

    return make


class Experts(nnx.Module):
    """The experts of all layers: gated MLPs ``w2(act(w1(x)) · w3(x))``."""

    def __init__(self, config: DecoderConfig, *, linear: Callable[..., ExpertLinear]):
        width, inner = config.hidden_size, config.intermediate_size
        self.w1 = linear("w1", width, inner, INTO_INNER)
        self.w2 = linear("w2", inner, width, OUT_OF_INNER)
        self.w3 = linear("w3", width, inner, INTO_INNER)
        self.activation = config.activation

    def __call__(
        self, x: Float[Array, "M D"], sizes: Int[Array, "E"], keys: dict[str, Array | None]
    ) -> Float[Array, "M D"]:
        """Rows sorted by expert, each through its own."""
        gate = ACTIVATIONS[self.activation](self.w1(x, keys["w1"], sizes=sizes))
        return self.w2(gate * self.w3(x, keys["w3"], sizes=sizes), keys["w2"], sizes=sizes)


class Router(nnx.Module):
    """The stack of tables [L, D, E] that score the experts; frozen, and never adapted."""

    def __init__(self, config: DecoderConfig, dtype: jnp.dtype):
        shape = (config.num_layers, config.hidden_size, config.experts)
        self.weight = declared(jnp.zeros(shape, dtype), "layers", "width", None)


class SparseMLP(nnx.Module):
    """Each token's output is the weighted sum of its best experts' outputs.

    Source: Mixtral (arXiv 2401.04088), weights renormalised over the experts taken; Qwen3-MoE does
    so where its config says so. No expert has a capacity, so no token is dropped.
    """

    def __init__(self, config: DecoderConfig, options: Options):
        self.gate = Router(config, options.dtype)
        count = config.num_layers * config.experts
        prefix = "layers.block_sparse_moe.experts"
        self.experts = Experts(config, linear=stacked_experts(prefix, count, options))
        self.taken = config.experts_per_token
        self.shares_sum_to_one = config.shares_sum_to_one

    def __call__(
        self, x: Float[Array, "B T D"], keys: dict[str, Array | None]
    ) -> Float[Array, "B T D"]:
        """Route, sort the token copies by expert, compute, put them back and add up."""
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = self.route(rows)
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        token = order // self.taken
        sizes = jnp.bincount(chosen.reshape(-1), length=self.gate.weight.shape[-1])
        out = self.experts(rows[token], sizes.astype(jnp.int32), keys)
        out = out * weights.reshape(-1)[order, None].astype(out.dtype)
        return jnp.zeros_like(rows).at[token].add(out).reshape(x.shape)

    def route(self, rows: Float[Array, "N D"]) -> tuple[Float[Array, "N E"], Int[Array, "N E"]]:
        """The best experts of every token and their weights, float32."""
        precision = jax.lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None
        scores = jnp.matmul(rows, self.gate.weight[...], precision=precision)
        shares = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
        best, chosen = jax.lax.top_k(shares, self.taken)
        if self.shares_sum_to_one:
            best = best / jnp.sum(best, axis=-1, keepdims=True)
        return best, chosen
