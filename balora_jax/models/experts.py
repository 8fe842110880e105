"""A mixture of experts: a router takes some of a layer's MLPs for each token."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from balora_jax.array_types import Array, Float, Int, PRNGKeyArray
from balora_jax.models.decoder_config import DecoderConfig
from balora_jax.models.layers import ACTIVATIONS, INTO_INNER, OUT_OF_INNER
from balora_jax.models.linear import Linear
from balora_jax.models.options import Options
from balora_jax.models.quantized import Kind, dequantize_kernel
from balora_jax.models.variables import Ends, declared
from balora_jax.parallel.axes import EXPERTS


class Groups(NamedTuple):
    """Which rows belong to which expert.

    Attributes:
        sizes: how many rows each of the experts here has, one after another.
        before: where there are others on other devices, the rows of those before ours. Ours are
            then the first ones, and the order of all rows is that of one device, turned by this.
    """

    sizes: Int[Array, "E"]
    before: Int[Array, ""] | None = None


class ExpertLinear(Linear):
    """A stack of L·E linear layers; the call sees those of the E experts of one layer held here.

    Rows come sorted by expert. An adapter is in delta form, as in ``Linear``.
    """

    def __call__(
        self,
        x: Float[Array, "M D_in"],
        dropout_key: PRNGKeyArray | None = None,
        *,
        groups: Groups,
    ) -> Float[Array, "M D_out"]:
        """Each row through its own expert; 0 for the rows of experts that are not here."""
        product = functools.partial(grouped_matmul, groups=groups)
        spread = functools.partial(
            jnp.repeat, repeats=groups.sizes, axis=0, total_repeat_length=len(x)
        )
        dropped = self._dropped_alike(x, dropout_key, groups.before)
        return self._adapted(dropped, self._grouped(x, groups), product, spread)

    def _dropped_alike(self, x: Array, key: PRNGKeyArray | None, before: Array | None) -> Array:
        """With the dropout that one device would choose for all rows."""
        if before is None or key is None:
            return self._dropped(x, key)
        return jnp.roll(self._dropped(jnp.roll(x, before, axis=0), key), -before, axis=0)

    def _grouped(self, x: Array, groups: Groups) -> Array:
        """Each row times its expert's kernel, dequantised here if need be."""
        if self.quantization == "none":
            return grouped_matmul(x, self.kernel[...], groups)
        return quantized_grouped_matmul(x, self._codes(), groups, self.quantization)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def quantized_grouped_matmul(
    x: Float[Array, "M D"], values: Mapping[str, Array], groups: Groups, kind: Kind
) -> Float[Array, "M F"]:
    """:func:`grouped_matmul` with kernels [E, D, F] that are dequantised here.

    As in ``quantized_matmul`` what is kept for the backward are the codes, whose gradient is zero.
    """
    return grouped_matmul(x, dequantize_kernel(values, kind, x.dtype), groups)


def _grouped_forward(x: Array, values: Mapping[str, Array], groups: Groups, kind: Kind):
    return quantized_grouped_matmul(x, values, groups, kind), (values, groups)


def _grouped_backward(kind: Kind, kept: tuple[Mapping[str, Array], Groups], dy: Array):
    values, groups = kept
    kernels = dequantize_kernel(values, kind, dy.dtype)
    return grouped_matmul(dy, kernels.swapaxes(-1, -2), groups), None, None


quantized_grouped_matmul.defvjp(_grouped_forward, _grouped_backward)


def grouped_matmul(
    x: Float[Array, "M D"], kernels: Float[Array, "E D F"], groups: Groups
) -> Float[Array, "M F"]:
    """Each group of rows times the kernel of its own expert; 0 for rows of no group here."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    # What a device computes for rows of no group is its own affair, forward and backward.
    x = _of_groups(x, groups)
    y = jax.lax.ragged_dot(
        x, kernels, groups.sizes, precision=precision, preferred_element_type=x.dtype
    )
    return _of_groups(y, groups)


def _of_groups(x: Array, groups: Groups) -> Array:
    """The rows with 0 in place of those of no group; there are none on one device."""
    if groups.before is None:
        return x
    own = jnp.arange(len(x)) < jnp.sum(groups.sizes)
    return jnp.where(own[:, None], x, jnp.zeros((), x.dtype))


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
            stack="experts",
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
        self, x: Float[Array, "M D"], groups: Groups, keys: dict[str, Array | None]
    ) -> Float[Array, "M D"]:
        """Rows sorted by expert, each through its own."""
        gate = ACTIVATIONS[self.activation](self.w1(x, keys["w1"], groups=groups))
        return self.w2(gate * self.w3(x, keys["w3"], groups=groups), keys["w2"], groups=groups)


class Router(nnx.Module):
    """The stack of tables [L, D, E] that score the experts; frozen, and never adapted."""

    def __init__(self, config: DecoderConfig, dtype: jnp.dtype):
        shape = (config.num_layers, config.hidden_size, config.experts)
        self.weight = declared(jnp.zeros(shape, dtype), "layers", "width", None)


class Routed(NamedTuple):
    """Tokens with the experts that they take.

    Attributes:
        rows: the tokens.
        weights: of the k experts of each, float32.
        order: their N·k pairs, sorted by expert.
        sizes: pairs of each expert.
    """

    rows: Float[Array, "N D"]
    weights: Float[Array, "N K"]
    order: Int[Array, "M"]
    sizes: Int[Array, "E"]


def _mixed(
    experts: Experts, routed: Routed, groups: Groups, keys: dict[str, Array | None]
) -> Float[Array, "N D"]:
    """What the experts here add to each token: their outputs times their weights."""
    rows, weights, order, _ = routed
    token = order // weights.shape[-1]
    out = experts(rows[token], groups, keys)
    out = out * weights.reshape(-1)[order, None].astype(out.dtype)
    return jnp.zeros_like(rows).at[token].add(out)


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
        self.taken, self.groups = config.experts_per_token, config.expert_groups
        self.shares_sum_to_one = config.shares_sum_to_one

    def __call__(
        self, x: Float[Array, "B T D"], keys: dict[str, Array | None]
    ) -> Float[Array, "B T D"]:
        """Route, sort the token copies by expert, compute, put them back and add up."""
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = self.route(rows)
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        sizes = jnp.bincount(chosen.reshape(-1), length=self.gate.weight.shape[-1])
        routed = Routed(rows, weights, order, sizes.astype(jnp.int32))
        run = self.mixed if self.groups == 1 else self.mixed_over_devices
        return run(routed, keys).reshape(x.shape)

    def mixed(self, routed: "Routed", keys: dict[str, Array | None]) -> Float[Array, "N D"]:
        """The sum over experts, all of which are here."""
        return _mixed(self.experts, routed, Groups(routed.sizes), keys)

    def mixed_over_devices(
        self, routed: "Routed", keys: dict[str, Array | None]
    ) -> Float[Array, "N D"]:
        """The sum over experts, of which each device along the axis ``EXPERTS`` holds a group.

        Each of them sees the rows of all and computes what its own experts add; these are added up
        in float32.
        """
        graph, held = nnx.split(self.experts)
        dtype = routed.rows.dtype
        each = len(routed.sizes) // self.groups

        def own(held: nnx.State, first: Array, routed: Routed, keys: Any) -> Array:
            sizes = jax.lax.dynamic_slice_in_dim(routed.sizes, first[0], each)
            before = jnp.sum(jnp.where(jnp.arange(len(routed.sizes)) < first[0], routed.sizes, 0))
            turned = routed._replace(
                rows=routed.rows.astype(dtype), order=jnp.roll(routed.order, -before)
            )
            out = _mixed(nnx.merge(graph, held), turned, Groups(sizes, before), keys)
            return jax.lax.psum(out.astype(jnp.float32), EXPERTS)

        across = jax.shard_map(
            own,
            axis_names={EXPERTS},
            in_specs=(P(EXPERTS), P(EXPERTS), P(), P()),
            out_specs=P(),
            check_vma=False,
        )
        # In float32, so that gradients of the rows are added up in it too.
        routed = routed._replace(rows=routed.rows.astype(jnp.float32))
        first = jnp.arange(self.groups) * each
        return across(held, first, routed, keys).astype(dtype)

    def route(self, rows: Float[Array, "N D"]) -> tuple[Float[Array, "N E"], Int[Array, "N E"]]:
        """The best experts of every token and their weights, float32."""
        precision = jax.lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None
        scores = jnp.matmul(rows, self.gate.weight[...], precision=precision)
        shares = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
        best, chosen = jax.lax.top_k(shares, self.taken)
        if self.shares_sum_to_one:
            best = best / jnp.sum(best, axis=-1, keepdims=True)
        return best, chosen
