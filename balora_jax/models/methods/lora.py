"""The method ``lora``: A and B train."""

from balora_jax.array_types import Array, Float
from balora_jax.models.methods.method import DOWN, UP, AdaptedCall, Method, Part, scaled_factors
from balora_jax.models.products import low_rank


class Lora(Method):
    """``x W + s·(x A B − x A₀ B₀)``. Source: LoRA (arXiv 2106.09685), in delta form."""

    name = "lora"

    def parts(self, *, origin: bool) -> dict[str, Part]:
        """Two factors, their start, and the scale of every layer."""
        start = {"origin_a": Part(DOWN, as_kernel=True), "origin_b": Part(UP, as_kernel=True)}
        return {
            "lora_a": Part(DOWN, trains=True),
            "lora_b": Part(UP, trains=True),
            "lora_scale": Part(("layers",)),
            **(start if origin else {}),
        }

    def output(self, call: AdaptedCall) -> Float[Array, "... F"]:
        """The plain layer and the delta."""
        return call.biased + low_rank(call.x, *scaled_factors(call.values), call.product)


LORA = Lora()
