"""The start ``milora``: the part of the weight's smallest singular values."""

import jax.numpy as jnp

from balora_jax.array_types import Array, Float, PRNGKeyArray
from balora_jax.models.starts.pissa import balanced
from balora_jax.models.starts.start import Factors, Start
from balora_jax.numerics import linalg


class Milora(Start):
    """``scale · A B`` is the part of the R smallest singular values.

    Source: MiLoRA (arXiv 2406.09044), split as PiSSA splits the largest ones.
    """

    name = "milora"

    def factors(
        self,
        kernel: Float[Array, "D F"],
        rank: int,
        scale: Float[Array, ""] | float,
        key: PRNGKeyArray,
        moment: Float[Array, "D D"] | None,
    ) -> Factors:
        """Both factors with the roots of the smallest singular values."""
        del key, moment
        u, s, vt = linalg.truncated_svd(kernel.astype(jnp.float32), min(kernel.shape))
        return balanced(u[:, -rank:], s[-rank:], vt[-rank:], scale)
