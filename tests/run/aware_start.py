"""A start from outside the package: the best rank-R part of the weight on rows of data."""

import jax
import jax.numpy as jnp

from balora_jax.models.starts import STARTS
from balora_jax.models.starts.start import Start


class Aware(Start):
    """``scale · A B`` is the product of rank R that changes ``x W`` least over the rows."""

    name = "aware"
    rows = 6

    def factors(self, kernel, rank, scale, key, moment):
        """By the decomposition of ``√M W``, M the second moment of what enters the layer."""
        del key
        with jax.default_matmul_precision("highest"):
            values, vectors = jnp.linalg.eigh(moment)
            roots = jnp.sqrt(jnp.maximum(values, 1e-6 * values[-1]))
            weight = kernel.astype(jnp.float32)
            u, s, vt = jnp.linalg.svd(roots[:, None] * (vectors.T @ weight), full_matrices=False)
            root = jnp.sqrt(s[:rank] / scale)
            a = vectors @ (u[:, :rank] / roots[:, None]) * root[None]
            return a, root[:, None] * vt[:rank]


STARTS.register(Aware())
