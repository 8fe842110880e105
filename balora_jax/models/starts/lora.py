"""The start ``lora``: random A and zero B."""

import jax
import jax.numpy as jnp
import numpy as np

from balora_jax.array_types import Array, Float, PRNGKeyArray
from balora_jax.models.starts.start import Factors, Start


class Lora(Start):
    """Random A and zero B. Source: PEFT's default, Kaiming uniform with a = √5."""

    name = "lora"
    has_origin = False

    def factors(
        self,
        kernel: Float[Array, "D F"],
        rank: int,
        scale: Float[Array, ""] | float,
        key: PRNGKeyArray,
        moment: Float[Array, "D D"] | None,
    ) -> Factors:
        """A uniform up to ``1 / √D``."""
        del scale, moment
        d_in, d_out = kernel.shape
        bound = 1.0 / np.sqrt(d_in)
        a = jax.random.uniform(key, (d_in, rank), jnp.float32, -bound, bound)
        return a, jnp.zeros((rank, d_out), jnp.float32)
