"""Kinds of a model's arrays, and how a module declares one: with its logical axes."""

from flax import nnx

from balora_jax.array_types import Array, Axes

Ends = tuple[str | None, str | None]
"""Logical axes of a kernel's D_in and D_out."""


class Origin(nnx.Variable):
    """A frozen constant of an adapter: the start it is measured from, its scale, norms of W."""


class HeadParam(nnx.Param):
    """A parameter of the head: trained as a whole, without an adapter."""


def declared(value: Array, *axes: str | None, kind: type[nnx.Variable] = nnx.Param) -> nnx.Variable:
    """An array of a module that says what its axes are.

    Args:
        value: the array.
        axes: the name of each of its dimensions, or None; see ``Axes``.
        kind: frozen weight, factor of an adapter, constant of it, or parameter of a head.
    """
    # A name of our own: what flax reads, such as ``out_sharding``, would lay the array out.
    metadata: dict = {"logical_axes": axes}
    return kind(value, **metadata)


def prefixed(prefix: str, axis: str | None) -> str | None:
    """The logical axis ``prefix_axis``; None where there is none."""
    return axis and f"{prefix}_{axis}"


def axes_of(variable: nnx.Variable) -> Axes:
    """What :func:`declared` was told."""
    return variable.get_metadata()["logical_axes"]
