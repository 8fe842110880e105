"""Inputs of the linear layers, for starts that read data: second moments as gradients.

A layer of this method computes what the plain one does, and holds an array M [D, D] of zeros whose
gradient is ``Σ x xᵀ`` over its inputs x, whatever the loss: the forward adds ``Σ x·(x M)``, which
is zero, to the loss. So the moments of every family, of experts too, come out of the scan over
layers as any gradient does, laid out as M is.
"""

import jax
import jax.numpy as jnp

from balora_jax.array_types import Array, Float, Scalar
from balora_jax.models.adapters import AdapterShape
from balora_jax.models.methods.method import AdaptedCall, Method, Part

MOMENT = "input_moment"


class InputMoments(Method):
    """No adapter: it measures what enters the layer."""

    name = "input_moments"
    allows_dropout = False

    def parts(self, *, origin: bool) -> dict[str, Part]:
        """M of every layer."""
        del origin
        return {MOMENT: Part(("layers", "in", "in_whole"), trains=True)}

    def output(self, call: AdaptedCall) -> Float[Array, "... F"]:
        """The plain layer."""
        x = jax.lax.stop_gradient(call.x.astype(jnp.float32))
        return carrying(call.biased, jnp.sum(x * call.product(x, call.values[MOMENT])))


MEASURED = AdapterShape(rank=1, origin=False, method=InputMoments())
"""Of a stacked layer whose inputs are measured."""


@jax.custom_vjp
def carrying(y: Float[Array, "..."], loss: Scalar) -> Float[Array, "..."]:
    """``y``, which carries a further loss along: its derivative is 1, whatever becomes of ``y``.

    Example:
        >>> import jax
        >>> jax.grad(lambda x: carrying(5.0 * x, x * x))(3.0).item()
        11.0
    """
    del loss
    return y


def _forward(y: Array, loss: Array) -> tuple[Array, None]:
    del loss
    return y, None


def _backward(_: None, dy: Array) -> tuple[Array, Array]:
    return dy, jnp.ones((), jnp.float32)


carrying.defvjp(_forward, _backward)
