"""Layers under a mesh that splits the tokens of a row.

The answer is in the mesh that ``jax.set_mesh`` made current. Where its axis ``TOKENS`` has one
device, or no mesh is current, every function here leaves the program as it is.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from balora_jax.array_types import Array, Float
from balora_jax.parallel.axes import ROWS, TOKENS


def parts() -> int:
    """Devices that share the tokens of a row.

    Example:
        >>> parts()
        1
    """
    return _sizes().get(TOKENS, 1)


def gather_tokens(x: Float[Array, "B S ..."]) -> Float[Array, "B S ..."]:
    """Keys or values of all tokens on each device that holds some of the row.

    Left alone the partitioner may move the larger scores instead.
    """
    return x if parts() == 1 else _laid(x, P.UNCONSTRAINED, None)


def as_rows(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """All but the last axis as one, [N, D], for a product; [B, T, D] where tokens are split.

    One axis makes the gradient of a factor a plain product, where the CPU compiler copies the
    operands of a product over two axes into another order first. But a device's part of split rows
    is no range of that axis, so the tokens would be gathered.
    """
    return x.reshape(-1, x.shape[-1]) if parts() == 1 else _kept(x)


def as_tokens(y: Float[Array, "... F"], shape: Sequence[int]) -> Float[Array, "... F"]:
    """The product of :func:`as_rows` with the leading axes ``shape`` again."""
    return y.reshape(*shape, y.shape[-1]) if parts() == 1 else _kept(y)


def _kept(x: Array) -> Array:
    """Every device goes on with its own rows and tokens, so that it is weights that are gathered.

    Left alone the partitioner moves whichever is smaller. A single new token is on every device.
    """
    if x.ndim < 3 or x.shape[1] % parts():
        return x
    held = tuple(name for name in ROWS if _sizes().get(name, 1) > 1)
    divides = x.shape[0] % math.prod(_sizes()[name] for name in held) == 0
    return _laid(x, held if held and divides else P.UNCONSTRAINED, TOKENS)


def _laid(x: Array, rows: Any, tokens: str | None) -> Array:
    rest = (P.UNCONSTRAINED,) * (x.ndim - 2)
    return jax.lax.with_sharding_constraint(x, P(rows, tokens, *rest))


def _sizes() -> dict[str, int]:
    """Axes of the current mesh; none where there is no mesh."""
    return dict(jax.sharding.get_abstract_mesh().shape)
