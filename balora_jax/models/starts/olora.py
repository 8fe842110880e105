"""The start ``olora``: the first columns and rows of the weight's QR factors."""

import jax.numpy as jnp

from balora_jax.array_types import Array, Float, PRNGKeyArray
from balora_jax.models.starts.start import Factors, Start


class Olora(Start):
    """The first R columns and rows of ``Wᵀ = Q R`` (W in our orientation).

    Source: OLoRA (arXiv 2406.01775) as PEFT has it: with ``[out, in]`` weights B = Q[:, :R] and
    A = R[:R], whatever the scale.
    """

    name = "olora"

    def factors(
        self,
        kernel: Float[Array, "D F"],
        rank: int,
        scale: Float[Array, ""] | float,
        key: PRNGKeyArray,
        moment: Float[Array, "D D"] | None,
    ) -> Factors:
        """Orthonormal rows in B."""
        del scale, key, moment
        q, r = jnp.linalg.qr(kernel.astype(jnp.float32).T)
        return r[:rank].T, q[:, :rank].T
