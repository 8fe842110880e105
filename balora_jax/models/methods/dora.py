"""The method ``dora``: A, B and the length of every output's weights train."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from balora_jax.array_types import Array, Float
from balora_jax.models.methods.lora import Lora
from balora_jax.models.methods.method import AdaptedCall, Part, scaled_factors
from balora_jax.models.products import as_last, low_rank, rescaled


class Dora(Lora):
    """``x (W + s·Δ) · m / ‖W + s·Δ‖ + b``, the norm of every output a constant for the gradient.

    Source: DoRA (arXiv 2402.09353), section 4.3, and PEFT; the bias is added afterwards.
    """

    name = "dora"
    allows_dropout = False  # the norm is that of the whole weight

    def parts(self, *, origin: bool) -> dict[str, Part]:
        """Those of LoRA, the lengths, and the squared lengths of W."""
        return {
            **super().parts(origin=origin),
            "lora_magnitude": Part(("layers", "out"), trains=True),
            "origin_norm": Part(("layers", "out")),
        }

    def output(self, call: AdaptedCall) -> Float[Array, "... F"]:
        """The layer with the delta, rescaled."""
        down, up = scaled_factors(call.values)
        gain = call.by_row(_gain(call, down, up))
        y = rescaled(call.y + low_rank(call.x, down, up, call.product), gain)
        return y if call.bias is None else y + as_last(call.bias, y)

    def begun(
        self, kernel: Float[Array, "L D F"], down: Float[Array, "L D R"], up: Float[Array, "L R F"]
    ) -> dict[str, Array]:
        """With the lengths of W."""
        squares = squared_norms(kernel)
        norms = {"lora_magnitude": jnp.sqrt(squares), "origin_norm": squares}
        return super().begun(kernel, down, up) | norms

    def given(self, kernel: Float[Array, "L D F"], values: Mapping[str, Array]) -> dict[str, Array]:
        """The lengths: those given, or those of ``W + s·A B``, which is then plain LoRA."""
        scale, squares = values["lora_scale"][:, None], squared_norms(kernel)
        down, up = values["lora_a"] * scale[..., None], values["lora_b"]
        # One layer at a time; where none is adapted both factors are zero and the norm is W's.
        layers = (kernel, squares, down, up)
        norms: Array = jax.lax.map(lambda layer: column_norms(*layer), layers)
        magnitude = jnp.where(scale == 0.0, norms, values.get("lora_magnitude", norms))
        return {"lora_magnitude": magnitude, "origin_norm": squares}


DORA = Dora()


def _gain(call: AdaptedCall, down: Array, up: Array) -> Float[Array, "*E F"]:
    """The factor m / ‖W + s·Δ‖ of every output, float32."""
    norm = column_norms(call.kernel(), call.values["origin_norm"], down, up)
    gain = magnitude_gain(call.values["lora_magnitude"], norm)
    # A layer of the stack that is not adapted has the scale 0 and stays as it is.
    return jnp.where(call.values["lora_scale"][..., None] == 0.0, 1.0, gain)


@jax.jit
def squared_norms(kernel: Float[Array, "L D F"]) -> Float[Array, "L F"]:
    """``Σ_d W_df²`` of every output, summed in float32 without a float32 copy of W."""
    return jnp.sum(jnp.square(kernel.astype(jnp.float32)), axis=1)


def column_norms(
    kernel: Float[Array, "*L D F"],
    squares: Float[Array, "*L F"],
    down: Float[Array, "*L D R"],
    up: Float[Array, "*L R F"],
) -> Float[Array, "*L F"]:
    """Length of every column of ``W + down up``, float32, a constant for the gradient.

    ``‖W_j‖² + 2 (downᵀ W)_j · up_j + up_jᵀ (downᵀ down) up_j``: nothing of the size of W is formed,
    and where the product of the factors is exactly zero the norm is exactly that of W.

    Args:
        kernel: W in its dtype; the factor it meets is rounded to it, as in the forward.
        squares: ``‖W_j‖²`` of every column, float32.
        down: float32, the first factor of ``s·Δ``, scale included.
        up: float32, the second one.
    """
    down, up = jax.lax.stop_gradient(down), jax.lax.stop_gradient(up)
    across, highest = jnp.swapaxes(down, -1, -2), jax.lax.Precision.HIGHEST
    cross = jnp.matmul(
        across.astype(kernel.dtype),
        kernel,
        precision=highest if kernel.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    gram = jnp.matmul(across, down, precision=highest)
    inner = 2.0 * cross + jnp.matmul(gram, up, precision=highest)
    total = squares + jnp.sum(inner * up, axis=-2)
    # A column that the delta cancels may come out below zero by rounding.
    return jnp.sqrt(jnp.maximum(total, jnp.finfo(jnp.float32).eps * squares))


def magnitude_gain(
    magnitude: Float[Array, "*L F"], norm: Float[Array, "*L F"]
) -> Float[Array, "*L F"]:
    """``magnitude / norm``, exactly 1 where they are equal, and 1 where the norm is 0.

    Example:
        >>> import jax.numpy as jnp
        >>> magnitude_gain(jnp.array([3.0, 0.1, 0.0]), jnp.array([2.0, 0.1, 0.0])).tolist()
        [1.5, 1.0, 1.0]
    """
    # Not the quotient itself: division is approximate on some devices, a difference of 0 is not.
    nothing = norm == 0.0
    return 1.0 + jnp.where(nothing, 0.0, (magnitude - norm) / jnp.where(nothing, 1.0, norm))
