"""The method ``lora_fa``: B trains, and A stays as it started."""

from dataclasses import replace

from balora_jax.models.methods.lora import Lora
from balora_jax.models.methods.method import Part


class LoraFa(Lora):
    """A is its own start, so the delta is ``s·(x A)(B − B₀)`` at half the rank.

    Source: LoRA-FA (arXiv 2308.03303).
    """

    name = "lora_fa"

    def parts(self, *, origin: bool) -> dict[str, Part]:
        """Those of LoRA, with A among the constants."""
        parts = super().parts(origin=origin)
        parts.pop("origin_a", None)
        return parts | {"lora_a": replace(parts["lora_a"], trains=False)}


LORA_FA = LoraFa()
