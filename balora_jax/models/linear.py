"""A stack of linear layers, each with or without a low-rank adapter in delta form.

Every adapter is measured from its own start (``origin``):

    y = x W + s · ((x A) B − (x A₀) B₀)

``W`` is the checkpoint's weight and is never modified, so the frozen model *is* the teacher.
Starts that begin at zero (plain LoRA) have no origin. Source: PiSSA (arXiv 2404.02948) as BA-LoRA
uses it; with ``W_res = W − s·A₀B₀`` this is algebraically PiSSA's ``W_res + s·A B``.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from balora_jax.array_types import Array, Float, PRNGKeyArray
from balora_jax.models.adapters import AdapterShape
from balora_jax.models.methods.method import AdaptedCall, Dimension
from balora_jax.models.products import as_last, matmul
from balora_jax.models.quantized import (
    Quantization,
    dequantize_kernel,
    quantized_matmul,
    quantized_shapes,
)
from balora_jax.models.variables import Ends, Origin, declared, prefixed


class Linear(nnx.Module):
    """A stack of linear layers ``y = x W (+ b)``, each optionally with an adapter in delta form.

    Parameters are stacked on a leading axis [L, …]; the forward sees one layer at a time (inside
    the decoder's ``lax.scan``), so the call works on ``kernel`` [D_in, D_out]. ``axes`` are the
    logical axes of these two and ``stack`` of the leading one; those of all other arrays follow.

    Source: delta form of this project. The start is subtracted from the *factors* in float32,
    ``s·(x [A − A₀, A₀]) [B; B − B₀]``, before they are cast to the activations' dtype: it is the
    same sum, exactly zero at the start whatever the order of summation, and small updates survive
    bfloat16, where the difference of two rounded products would lose them.

    What the adapter's arrays are, and what is computed with them, is its method's to say.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        layers: int,
        axes: Ends = (None, None),
        use_bias: bool = False,
        adapter: AdapterShape | None = None,
        dtype: jnp.dtype = jnp.float32,
        quantization: Quantization = "none",
        name: str = "kernel",
        stack: str = "layers",
    ):
        self.quantization: Quantization = quantization
        kernel, (d_in, d_out) = (
            jax.ShapeDtypeStruct((layers, in_features, out_features), dtype),
            axes,
        )
        stored = quantized_shapes(kernel, quantization, name=name)
        self.kernel = declared(jnp.zeros_like(stored["kernel"]), stack, d_in, d_out)
        if quantization != "none":
            scale = jnp.zeros_like(stored["kernel_scale"])
            self.kernel_scale = declared(scale, stack, prefixed("blocks", d_in), d_out)
        # A vector over the model's width is small, and lies whole on every device.
        across, bias = None if d_out == "width" else d_out, jnp.zeros((layers, out_features), dtype)
        self.bias = declared(bias, stack, across) if use_bias else None
        self.adapter = adapter
        if adapter is not None:
            self._adapt(adapter, kernel, (stack, *axes))

    def _adapt(
        self,
        adapter: AdapterShape,
        kernel: jax.ShapeDtypeStruct,
        axes: tuple[str | None, str | None, str | None],
    ) -> None:
        """The adapter's arrays; a factor's long axis has a name of its own: it is split further."""
        (layers, d_in, d_out), (stack, across_in, across_out) = kernel.shape, axes
        long_in, long_out = prefixed("adapter", across_in), prefixed("adapter", across_out)
        sizes: dict[Dimension, tuple[int, str | None]] = {
            "layers": (layers, stack),
            "in": (d_in, long_in),
            "in_whole": (d_in, None),
            "out": (d_out, long_out),
            "rank": (adapter.rank, None),
        }
        for name, part in adapter.parts.items():
            shape = tuple(sizes[dim][0] for dim in part.dims)
            logical = tuple(sizes[dim][1] for dim in part.dims)
            value = jnp.zeros(shape, kernel.dtype if part.as_kernel else jnp.float32)
            kind = nnx.LoRAParam if part.trains else Origin
            setattr(self, name, declared(value, *logical, kind=kind))

    def __call__(
        self, x: Float[Array, "... D_in"], dropout_key: PRNGKeyArray | None = None
    ) -> Float[Array, "... D_out"]:
        """Apply the layer; ``dropout_key`` switches LoRA dropout on (training only)."""
        return self._adapted(
            self._dropped(x, dropout_key), self._frozen(x), matmul, lambda value: value
        )

    def _adapted(
        self,
        x: Float[Array, "... D_in"],
        y: Float[Array, "... D_out"],
        product: Callable[[Array, Array], Array],
        by_row: Callable[[Array], Array],
    ) -> Float[Array, "... D_out"]:
        """From ``y = x W``, and x with dropout, to the layer's output.

        ``AdaptedCall`` says what the last two are.
        """
        bias = None if self.bias is None else self.bias[...]
        if self.adapter is None:
            return y if bias is None else y + as_last(bias, y)
        values = {name: getattr(self, name)[...] for name in self.adapter.parts}
        call = AdaptedCall(x, y, bias, values, self._kernel, product, by_row)
        return self.adapter.method.output(call)

    def _frozen(self, x: Array) -> Array:
        """``x W``, W dequantised here if need be."""
        if self.quantization == "none":
            return matmul(x, self.kernel[...])
        return quantized_matmul(x, self._codes(), self.quantization)

    def _codes(self) -> dict[str, Array]:
        return {"kernel": self.kernel[...], "kernel_scale": self.kernel_scale[...]}

    def _dropped(self, x: Array, key: PRNGKeyArray | None) -> Array:
        if key is None or self.adapter is None or self.adapter.dropout == 0.0:
            return x
        keep = 1.0 - self.adapter.dropout
        kept = jax.random.bernoulli(key, keep, x.shape)
        return jnp.where(kept, x / keep, jnp.zeros((), x.dtype)).astype(x.dtype)

    def _kernel(self) -> Float[Array, "*E D_in D_out"]:
        """W, dequantised to float32 if need be."""
        if self.quantization == "none":
            return self.kernel[...]
        return dequantize_kernel(self._codes(), self.quantization, jnp.float32)
