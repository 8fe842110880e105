"""The starts ``pissa`` and ``pissa_niter_N``: the principal part of the weight.

Source: PiSSA (arXiv 2404.02948): A = U_r √S_r and B = √S_r V_rᵀ in the orientation y = x W, with S
divided by the scale first, so that alpha does not change the product.
"""

import re
from dataclasses import dataclass

import jax.numpy as jnp

from balora_jax.array_types import Array, Float, PRNGKeyArray
from balora_jax.models.starts.start import Factors, Start
from balora_jax.numerics import linalg


class Pissa(Start):
    """``scale · A B`` is the rank-R principal part, by an exact decomposition."""

    name = "pissa"

    def factors(
        self,
        kernel: Float[Array, "D F"],
        rank: int,
        scale: Float[Array, ""] | float,
        key: PRNGKeyArray,
        moment: Float[Array, "D D"] | None,
    ) -> Factors:
        """Both factors with the roots of the largest singular values."""
        del key, moment
        return balanced(*linalg.truncated_svd(kernel.astype(jnp.float32), rank), scale)


@dataclass(frozen=True)
class SketchedPissa(Start):
    """The same by a randomized decomposition; registered once, for up to 999 iterations.

    Attributes:
        name: with the number in it.
        iterations: N, power iterations.
    """

    name: str = "pissa_niter_N"
    iterations: int = 0

    def named(self, name: str) -> Start | None:
        """The start with the number of iterations that a name says."""
        found = re.fullmatch(r"pissa_niter_([0-9]{1,3})", name)
        return SketchedPissa(name, int(found[1])) if found else None

    def factors(
        self,
        kernel: Float[Array, "D F"],
        rank: int,
        scale: Float[Array, ""] | float,
        key: PRNGKeyArray,
        moment: Float[Array, "D D"] | None,
    ) -> Factors:
        """Both factors with the roots of the largest singular values, nearly."""
        del moment
        matrix = kernel.astype(jnp.float32)
        return balanced(*linalg.randomized_svd(matrix, rank, self.iterations, key), scale)


def balanced(
    u: Float[Array, "D R"],
    s: Float[Array, "R"],
    vt: Float[Array, "R F"],
    scale: Float[Array, ""] | float,
) -> Factors:
    """Factors whose product times ``scale`` is ``u · diag(s) · vt``, the roots of s in both."""
    root = jnp.sqrt(s / scale)
    return u * root[None, :], root[:, None] * vt
