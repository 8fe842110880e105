"""The method ``full``: every weight of the model trains, and no layer has an adapter."""

from balora_jax.array_types import Array, Float
from balora_jax.models.methods.method import AdaptedCall, Method, Part


class Full(Method):
    """Full fine-tuning, with the frozen original as the teacher."""

    name = "full"
    trains_base = True
    allows_dropout = False

    def parts(self, *, origin: bool) -> dict[str, Part]:
        """None."""
        del origin
        return {}

    def output(self, call: AdaptedCall) -> Float[Array, "... F"]:
        """The plain layer."""
        return call.biased


FULL = Full()
