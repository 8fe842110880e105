"""The protocol of an adapter method: its arrays, its layer, and how they begin."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp

from balora_jax.array_types import Array, Float
from balora_jax.models.products import as_last

Dimension = Literal["layers", "in", "in_whole", "out", "rank"]
"""Of an array of a stack: L, D_in, D_in on every device, D_out, R."""

DOWN: tuple[Dimension, ...] = ("layers", "in", "rank")
UP: tuple[Dimension, ...] = ("layers", "rank", "out")
"""Of A and B."""


@dataclass(frozen=True)
class Part:
    """One array of an adapter.

    Attributes:
        dims: its dimensions; shape and logical axes follow from the layer's kernel.
        trains: the optimizer changes it; otherwise it is a constant.
        as_kernel: kept in the kernel's dtype; otherwise float32.
    """

    dims: tuple[Dimension, ...]
    trains: bool = False
    as_kernel: bool = False


class AdaptedCall(NamedTuple):
    """Arrays that a layer hands its method: one layer of a stack, or the experts of one layer.

    Attributes:
        x: its input [..., D_in], with dropout where that is on.
        y: ``x W`` [..., D_out].
        bias: [D_out], or None.
        values: the adapter's arrays by name.
        kernel: gives W [*E, D_in, D_out], in floating point.
        product: of rows and a kernel.
        by_row: from a value of every output [*E, D_out] to that of every row [..., D_out].
    """

    x: Array
    y: Array
    bias: Array | None
    values: Mapping[str, Array]
    kernel: Callable[[], Array]
    product: Callable[[Array, Array], Array]
    by_row: Callable[[Array], Array]

    @property
    def biased(self) -> Array:
        """``x W + b``."""
        return self.y if self.bias is None else self.y + as_last(self.bias, self.y)


@runtime_checkable
class Method(Protocol):
    """Choice of what trains, in an adapted layer or the whole model; a subclass is one method.

    Attributes:
        name: what ``adapter.method`` calls it.
        trains_base: every weight of the model trains, and no layer has an adapter: no
            quantisation.
        allows_dropout: the input of its adapters may be dropped.
    """

    name: str
    trains_base: bool = False
    allows_dropout: bool = True

    def parts(self, *, origin: bool) -> dict[str, Part]:
        """The arrays of an adapter by name, with or without a frozen start."""
        ...

    def output(self, call: AdaptedCall) -> Float[Array, "... F"]:
        """What the adapted layer computes, bias included."""
        ...

    def begun(
        self, kernel: Float[Array, "L D F"], down: Float[Array, "L D R"], up: Float[Array, "L R F"]
    ) -> dict[str, Array]:
        """The arrays of a stack that begins with factors; those that ``parts`` lacks are dropped.

        The factors themselves are the origin, and what trains a float32 copy even where the dtype
        agrees: the step donates what trains, not the origin.
        """
        del kernel
        a, b = (jnp.array(stack, jnp.float32, copy=True) for stack in (down, up))
        return {"lora_a": a, "lora_b": b, "origin_a": down, "origin_b": up}

    def given(self, kernel: Any, values: Mapping[str, Array]) -> dict[str, Array]:
        """What a stack lacks whose factors and scale, measured from zero, were saved before.

        Args:
            kernel: [L, D, F], or its shape alone where the method reads no more.
            values: A, B, the scale of every layer, and what else was saved.
        """
        del kernel, values
        return {}

    def parameters(self, rank: int, d_in: int, d_out: int) -> int:
        """Trainable numbers of one layer's adapter."""
        sizes = {"layers": 1, "in": d_in, "in_whole": d_in, "out": d_out, "rank": rank}
        trained = (part for part in self.parts(origin=False).values() if part.trains)
        return sum(math.prod(sizes[dim] for dim in part.dims) for part in trained)

    def flops(self, rank: int, d_in: int, d_out: int, *, origin: bool, backward: bool) -> float:
        """Operations of a layer's two products for one token.

        Two for each number of a factor going forward, two back to its input and two for its own
        gradient, if it trains; twice that where both factors are joined with their start.
        """
        parts = self.parts(origin=origin)
        total = 0.0
        for name, size in (("lora_a", rank * d_in), ("lora_b", rank * d_out)):
            passes = (6.0 if parts[name].trains else 4.0) if backward else 2.0
            total += passes * size
        return total * (2 if "origin_a" in parts else 1)


def scaled_factors(
    values: Mapping[str, Array],
) -> tuple[Float[Array, "*E D R"], Float[Array, "*E R F"]]:
    """Float32 factors of s·Δ, the scale in the first one; of one layer or of several."""
    origin = values.get("origin_a"), values.get("origin_b")
    down, up = delta_factors(values["lora_a"], values["lora_b"], *origin)
    # Scaled while still float32: a scale such as 1/√2 is not a bfloat16 number.
    return down * values["lora_scale"][..., None, None], up


def delta_factors(
    lora_a: Float[Array, "*L D R"],
    lora_b: Float[Array, "*L R F"],
    origin_a: Float[Array, "*L D R"] | None,
    origin_b: Float[Array, "*L R F"] | None,
) -> tuple[Array, Array]:
    """The two factors whose product is ``A B − A₀ B₀`` (or ``A B`` without an origin), float32.

    Returns:
        ``[A − A₀, A₀]`` [*L, D, 2R] and ``[B; B − B₀]`` [*L, 2R, F]; with ``origin_b`` alone, A is
        its own start and ``A`` [*L, D, R], ``B − B₀`` [*L, R, F] are the whole of it.

    Example:
        >>> import jax.numpy as jnp
        >>> a, b = jnp.ones((3, 1)), jnp.full((1, 2), 2.0)
        >>> down, up = delta_factors(a, b, a, b)
        >>> float(jnp.abs(down @ up).max())  # measured from itself: exactly nothing
        0.0
    """
    if origin_b is None:
        return lora_a, lora_b
    moved = lora_b - origin_b.astype(jnp.float32)
    if origin_a is None:
        return lora_a, moved
    origin_a = origin_a.astype(jnp.float32)
    down = jnp.concatenate([lora_a - origin_a, origin_a], axis=-1)
    return down, jnp.concatenate([lora_b, moved], axis=-2)
