"""Places of all arrays on the device mesh: logical axes → mesh axes → devices."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from balora_jax.array_types import Array, Axes
from balora_jax.config import MeshConfig
from balora_jax.errors import InputError
from balora_jax.numerics.head import unwrapped
from balora_jax.numerics.head_types import HeadAxes
from balora_jax.parallel import hosts
from balora_jax.parallel.axes import AXES, EXPERTS, MESH_AXES, ROWS, TOKENS, VOCABULARY

Shapes = Mapping[str, jax.ShapeDtypeStruct]

BLOCKS = "blocks_"
"""Before the name of a logical axis: blocks of it, which lie as the axis itself does."""


# To the type checker a mesh: what asks for the devices is given one with devices.
if TYPE_CHECKING:
    AnyMesh = Mesh
else:
    AnyMesh = Mesh | AbstractMesh
"""Devices, or only how many lie along each axis: enough for shapes and where they lie."""


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh with axes ``AXES`` over all devices here, or those given.

    Between TPU slices is a slower network: only ``data`` goes over it, slice by slice.

    Raises:
        InputError: sizes whose product is not the number of devices, or a size of ``data`` that
            does not go over the slices evenly.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    sizes = [getattr(config, axis) for axis in AXES]
    if -1 in sizes:
        rest = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max(count // rest, 1)
    if math.prod(sizes) != count:
        raise InputError(
            f"mesh: expected {' x '.join(AXES)} to be the {count} device(s) there are, got "
            f"{' x '.join(map(str, sizes))} = {math.prod(sizes)}. Change them; -1 fills one in."
        )
    auto = (AxisType.Auto,) * len(AXES)
    slices = slices_of(devices)
    if slices == 1:
        return jax.make_mesh(tuple(sizes), AXES, axis_types=auto, devices=devices)
    return Mesh(_over_slices(sizes, slices, devices), AXES, axis_types=auto)


def slices_of(devices: Sequence[Any]) -> int:
    """How many TPU slices devices are of; one for other devices."""
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})


def _over_slices(sizes: Sequence[int], slices: int, devices: Sequence[Any]) -> np.ndarray:
    """Devices of several slices on the axes ``sizes``, the first of which goes over them."""
    first, *others = sizes
    if first % slices:
        raise InputError(
            f"mesh.{AXES[0]}: expected a multiple of the {slices} TPU slices that there are, as "
            f"only this axis goes over the network between them, got {first}. Change it."
        )
    between = [slices, *(1 for _ in others)]
    return mesh_utils.create_hybrid_device_mesh([first // slices, *others], between, devices)


def platform_of(mesh: AnyMesh) -> str:
    """The platform of the devices, ``cpu``, ``gpu`` or ``tpu``; or this process's."""
    return mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else jax.default_backend()


@dataclass(frozen=True)
class Layout:
    """Placement of the arrays of a model on a mesh.

    Attributes:
        axes: logical axes of every array by path, as ``Structure.axes`` has them.
        mesh: the devices.
    """

    axes: Mapping[str, Axes]
    mesh: AnyMesh

    def __call__(self, path: str, shape: tuple[int, ...]) -> NamedSharding:
        """The sharding of one array, after checking that every axis divides.

        Blocks that share a scale need not: those that do not divide lie whole on every device.

        Raises:
            InputError: an axis that the mesh cannot divide.
        """
        logical = self.axes[path]
        spec = list(spec_of(path, logical))
        for i, (size, axis) in enumerate(zip(shape, spec, strict=True)):
            axes = [name for name in _names(axis) if self.mesh.shape[name] > 1]
            parts = math.prod(self.mesh.shape[name] for name in axes)
            if size % parts and (logical[i] or "").startswith(BLOCKS):
                spec[i] = None
            elif size % parts:
                raise InputError(
                    f"mesh.{' x mesh.'.join(axes)}: expected a divisor of {size}, an axis of "
                    f"{path} {shape}, got {parts}. Choose another size for this part of the mesh."
                )
        return NamedSharding(self.mesh, P(*spec))

    def attached(self, shapes: Shapes) -> dict[str, jax.ShapeDtypeStruct]:
        """The same shapes, each with its sharding.

        Raises:
            InputError: an axis that the mesh cannot divide.
        """
        return {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self(path, leaf.shape))
            for path, leaf in shapes.items()
        }

    def placed(self, arrays: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Arrays laid out so, wherever they lay before."""
        return {path: hosts.place(value, self(path, value.shape)) for path, value in arrays.items()}


def spec_of(path: str, logical: Axes) -> P:
    """The partition of an array over mesh axes.

    Args:
        path: its name, for the message.
        logical: its logical axes.

    Raises:
        InputError: two dimensions over the same mesh axis.

    Example:
        >>> tuple(spec_of("embed_tokens.embedding", ("vocabulary", "width")))
        ('tensor', ('fsdp', 'sequence'))
    """
    spec = P(*(MESH_AXES[axis.removeprefix(BLOCKS)] if axis else None for axis in logical))
    used = [name for entry in spec for name in _names(entry)]
    twice = sorted({name for name in used if used.count(name) > 1})
    if twice:
        raise InputError(
            f"axes.MESH_AXES: expected every mesh axis in one dimension of an array, got "
            f"{', '.join(twice)} in two of {path} {logical}. Give one of these logical axes "
            "another mesh axis, or None."
        )
    return spec


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one dimension."""
    return (entry,) if isinstance(entry, str) else entry or ()


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """Arrays [micro-batches, B, T] of a batch: rows over ``ROWS``, tokens over ``TOKENS``.

    Where tokens are not split, an array may have no axis of tokens, or others.
    """
    tokens = (TOKENS,) if mesh.shape[TOKENS] > 1 else ()
    return NamedSharding(mesh, P(None, ROWS, *tokens))


def rows_sharding(mesh: AnyMesh) -> NamedSharding:
    """Arrays [B, …] without micro-batches: rows over ``ROWS``."""
    return NamedSharding(mesh, P(ROWS))


def head_axes(mesh: AnyMesh) -> HeadAxes:
    """The axes that the pass over the logits is split over: rows of the batch, vocabulary."""
    rows = tuple(axis for axis in (*ROWS, TOKENS) if mesh.shape[axis] > 1)
    return HeadAxes(rows, VOCABULARY if mesh.shape[VOCABULARY] > 1 else None)


def across_devices(mesh: AnyMesh) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Run the head's pass on each device's own rows and vocabulary, by ``jax.shard_map``.

    The head's width is gathered once, not once per chunk; every device closes up its own rows.
    """
    if mesh.size == 1:
        return unwrapped
    rows, vocabulary = P((*ROWS, TOKENS)), P(VOCABULARY, None)
    specs = {"in_specs": (rows, vocabulary, P(), P()), "out_specs": (P(), (rows, vocabulary))}
    return lambda compute: jax.shard_map(compute, mesh=mesh, check_vma=False, **specs)


def across_rows(mesh: AnyMesh) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Run ``(array [B, T, …], numbers [parts, …]) -> [B, T, …]`` on each device's own rows."""
    if mesh.size == 1:
        return unwrapped
    own = P(ROWS, TOKENS)
    specs = {"in_specs": (own, P(ROWS)), "out_specs": own}
    return lambda compute: jax.shard_map(compute, mesh=mesh, check_vma=False, **specs)


def head_layout(mesh: AnyMesh) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Lay out rows over the axes of tokens and the head over its vocabulary, for the plain head.

    Left alone the partitioner may hold the logits of all rows on every device.
    """
    rows = NamedSharding(mesh, P((*ROWS, TOKENS)))
    vocabulary = NamedSharding(mesh, P(VOCABULARY, None))
    constrain = jax.lax.with_sharding_constraint
    return lambda parts, tables: (
        jax.tree.map(lambda part: constrain(part, rows), parts),
        jax.tree.map(lambda table: constrain(table, vocabulary), tables),
    )


def flatten_tokens(mesh: AnyMesh) -> Callable[[Array], Array]:
    """From [B, T, …] to [N, …] such that every device keeps the rows N of its own tokens.

    Their order is that of the devices where tokens are split; no term depends on it.
    """
    copies, parts = row_parts(mesh), mesh.shape[TOKENS]

    def flatten(x: Array) -> Array:
        rows, tokens, *rest = x.shape
        if parts > 1:
            x = x.reshape(copies, rows // copies, parts, tokens // parts, *rest).swapaxes(1, 2)
        return x.reshape(rows * tokens, *rest)

    return flatten


def replicated(mesh: AnyMesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, P())


def row_parts(mesh: AnyMesh) -> int:
    """Parts into which the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def token_parts(mesh: AnyMesh) -> int:
    """Parts into which the tokens of a row are split."""
    return mesh.shape[TOKENS]


def check_batch(rows: int, mesh: AnyMesh) -> None:
    """Raises InputError unless a micro-batch of ``rows`` divides over the mesh."""
    parts, axes = row_parts(mesh), " x ".join(f"mesh.{axis}" for axis in ROWS)
    if rows % parts:
        raise InputError(
            f"training.batch_size: expected batch_size / accumulation to be a multiple of "
            f"{axes} = {parts}, got {rows}. Change the batch or the mesh."
        )


def check_experts(experts: int, mesh: AnyMesh) -> None:
    """Raises InputError unless the experts of a layer, 0 for none, divide over the mesh."""
    parts = mesh.shape[EXPERTS]
    if parts > 1 and experts == 0:
        raise InputError(
            f"mesh.{EXPERTS}: expected 1 for a model without experts, got {parts}. Set it to 1."
        )
    if experts % parts:
        raise InputError(
            f"mesh.{EXPERTS}: expected a divisor of the {experts} experts of a layer, got {parts}. "
            "Choose another size."
        )


def round_up_length(length: int, longest: int, mesh: AnyMesh) -> int:
    """``length`` tokens of a row, rounded up to a multiple of the devices that share it.

    Raises:
        InputError: the multiple is more than ``longest``, which is ``data.max_length``.
    """
    parts = mesh.shape[TOKENS]
    rounded = math.ceil(length / parts) * parts
    if rounded > longest:
        raise InputError(
            f"data.max_length: expected a multiple of mesh.{TOKENS} = {parts}, got {longest}: "
            "tokens of a row are split evenly. Change one of them."
        )
    return rounded
