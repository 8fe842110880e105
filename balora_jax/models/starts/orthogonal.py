"""The start ``orthogonal``: random factors whose product is zero though neither is."""

import jax
import jax.numpy as jnp

from balora_jax.array_types import Array, Float, PRNGKeyArray
from balora_jax.models.starts.start import Factors, Start


class Orthogonal(Start):
    """Random factors in two halves of a rotation; an even rank.

    Source: PEFT's ``init_lora_weights="orthogonal"``: A lies in the span of one half of the rows
    of a random rotation, B in that of the other half, entries scaled by 1/10.
    """

    name = "orthogonal"
    rank_divisor = 2

    def factors(
        self,
        kernel: Float[Array, "D F"],
        rank: int,
        scale: Float[Array, ""] | float,
        key: PRNGKeyArray,
        moment: Float[Array, "D D"] | None,
    ) -> Factors:
        """Whatever the weight and the scale; only the weight's shape is read."""
        del scale, moment
        d_in, d_out = kernel.shape
        half, highest = rank // 2, jax.lax.Precision.HIGHEST
        key_q, key_a, key_b = jax.random.split(key, 3)
        q, _ = jnp.linalg.qr(jax.random.normal(key_q, (rank, rank)))
        a = jnp.matmul(jax.random.normal(key_a, (d_in, half)), q[0::2], precision=highest)
        b = jnp.matmul(q[1::2].T, jax.random.normal(key_b, (half, d_out)), precision=highest)
        return a / 10.0, b / 10.0
