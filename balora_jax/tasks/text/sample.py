"""A random share of the rows of a micro-batch, for a term that needs the teacher."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from balora_jax.array_types import Array, Bool, Int, PRNGKeyArray

_FOLD = 2**31 - 1  # no layer and no micro-batch has this number


def alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as it is, on one device."""
    return function


@dataclass(frozen=True)
class RowSample:
    """As many rows of every device, drawn anew for each micro-batch without putting back.

    Every row is as likely as any other, so the sum over the drawn rows times :attr:`factor` is on
    average the sum over all rows, whatever they hold.

    Attributes:
        rows: on each of the devices that rows are split over.
        taken: of them, at least 1.
        parts: devices that rows are split over.
        across: runs a function of arrays [B, T, …] and [parts, …] on every device's own rows.
    """

    rows: int
    taken: int
    parts: int = 1
    across: Callable[[Callable[..., Any]], Callable[..., Any]] = alone

    @property
    def factor(self) -> float:
        """Rows there are for each that is drawn."""
        return self.rows / self.taken

    def draw(self, key: PRNGKeyArray) -> Int[Array, "P S"]:
        """Numbers of the drawn rows on each device, ascending; ``key`` is also that of dropout."""
        keys = jax.random.split(jax.random.fold_in(key, _FOLD), self.parts)
        order = jax.vmap(lambda one: jax.random.permutation(one, self.rows))(keys)
        return jnp.sort(order[:, : self.taken], axis=1)

    def mask(self, drawn: Int[Array, "P S"]) -> Bool[Array, "B"]:
        """Which rows were drawn."""
        there = jnp.arange(self.rows)[None, :, None] == drawn[:, None, :]
        return jnp.any(there, axis=2).reshape(-1)

    def take(self, array: Array, drawn: Int[Array, "P S"]) -> Array:
        """The drawn rows of an array [B, …]."""
        return self.across(lambda own, at: own[at[0]])(array, drawn)

    def put_back(self, values: Array, drawn: Int[Array, "P S"]) -> Array:
        """Values of the drawn rows in their places, [B, …]; other rows have a neighbour's."""
        place = jnp.sum(jnp.arange(self.rows)[None, :, None] >= drawn[:, None, :], axis=2) - 1
        return self.across(lambda own, at: own[at[0]])(values, jnp.maximum(place, 0))


@dataclass(frozen=True)
class Share:
    """``regularizers.teacher_fraction`` on the devices of a mesh.

    Attributes:
        fraction: below 1.
        parts, across: of :class:`RowSample`.
    """

    fraction: float
    parts: int = 1
    across: Callable[[Callable[..., Any]], Callable[..., Any]] = alone

    def of(self, rows: int) -> RowSample | None:
        """The sample of micro-batches of so many rows; None where none of them is left out.

        >>> [Share(0.25).of(rows).taken for rows in (8, 5, 2)], Share(0.25).of(1)
        ([2, 2, 1], None)
        """
        own = rows // self.parts
        taken = min(own, math.ceil(own * self.fraction - 1e-9))
        return None if taken == own else RowSample(own, taken, self.parts, self.across)
