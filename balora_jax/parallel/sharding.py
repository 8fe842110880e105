"""Where every array lies on the device mesh: one table, path pattern → logical axes → mesh axes."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from balora_jax.array_types import Array
from balora_jax.config import MeshConfig
from balora_jax.errors import InputError
from balora_jax.numerics.head import HeadAxes, unwrapped
from balora_jax.parallel import hosts, token_split

# Devices side by side on the last axis exchange most.
AXES = ("data", "fsdp", "sequence", "tensor")
BATCH_AXES = token_split.ROWS
TOKEN_AXES = (*token_split.ROWS, token_split.AXIS)

# Frozen weights, by the first pattern that matches the whole path.
LOGICAL_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(embed_tokens|lm_head)\.embedding", ("vocabulary", "width")),
    (r"embed_positions\.embedding", (None, "width")),
    # Encoders; their vocabularies are small and seldom divide.
    (r"(embeddings|encoder)\.\w+\.embedding", (None, "width")),
    (r"layers\.attention\.self\.\w+\.kernel", ("layers", "width", "heads")),
    (r"layers\.attention\.self\.\w+\.bias", ("layers", "heads")),
    (r"layers\.attention\.output\.dense\.kernel", ("layers", "heads", "width")),
    (r"layers\.intermediate\.dense\.kernel", ("layers", "width", "inner")),
    (r"layers\.intermediate\.dense\.bias", ("layers", "inner")),
    (r"layers\.output\.dense\.kernel", ("layers", "inner", "width")),
    (r"(embeddings|encoder)\.LayerNorm\.(scale|bias)", (None,)),
    (r"head\.\w+\.kernel", (None, None)),
    (r"head\.\w+\.bias", (None,)),
    (r"layers\.(self_attn\.([qkv]|qkv)_proj|attn\.c_attn)\.kernel", ("layers", "width", "heads")),
    (r"layers\.(self_attn\.([qkv]|qkv)_proj|attn\.c_attn)\.bias", ("layers", "heads")),
    (r"layers\.(self_attn\.o_proj|attn\.c_proj)\.kernel", ("layers", "heads", "width")),
    (r"layers\.mlp\.((gate|up|gate_up)_proj|c_fc)\.kernel", ("layers", "width", "inner")),
    (r"layers\.mlp\.((gate|up|gate_up)_proj|c_fc)\.bias", ("layers", "inner")),
    (r"layers\.mlp\.(down_proj|c_proj)\.kernel", ("layers", "inner", "width")),
    (r"layers\.block_sparse_moe\.gate\.weight", ("layers", "width", None)),
    (r"layers\.block_sparse_moe\.experts\.w[13]\.kernel", ("layers", "width", "inner")),
    (r"layers\.block_sparse_moe\.experts\.w2\.kernel", ("layers", "inner", "width")),
    (r"layers\..*\.(bias|scale)", ("layers", None)),
    (r"norm\.(scale|bias)", (None,)),
)

MESH_AXES: dict[str, str | tuple[str, ...] | None] = {
    "layers": None,  # scanned over, so every device needs every layer
    "vocabulary": "tensor",
    "heads": "tensor",
    "inner": "tensor",
    # Devices that share a row share its weights too: they need not each hold a copy.
    "width": ("fsdp", "sequence"),
    # A factor of an adapter has one long axis, so that one takes all mesh axes: else half of the
    # adapters, and of the optimizer's moments, would lie whole on every device.
    "adapter_heads": ("tensor", "fsdp", "sequence"),
    "adapter_inner": ("tensor", "fsdp", "sequence"),
    "adapter_width": ("fsdp", "sequence"),
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh with axes ``AXES`` over all devices here, or those given.

    Raises:
        InputError: sizes whose product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    sizes = [config.data, config.fsdp, config.sequence, config.tensor]
    if -1 in sizes:
        rest = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max(count // rest, 1)
    if math.prod(sizes) != count:
        raise InputError(
            f"mesh: expected {' x '.join(AXES)} to be the {count} device(s) there are, got "
            f"{' x '.join(map(str, sizes))} = {math.prod(sizes)}. Change them; -1 fills one in."
        )
    auto = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes), AXES, axis_types=auto, devices=devices)


def logical_axes(path: str) -> tuple[str | None, ...]:
    """Logical axes of an array; an adapter's follow from the kernel it belongs to.

    Example:
        >>> logical_axes("layers.mlp.down_proj.lora_a")
        ('layers', 'adapter_inner', None)
    """
    stem, _, leaf = path.rpartition(".")
    if leaf == "lora_scale":
        return ("layers",)
    if leaf in ("lora_a", "origin_a", "lora_b", "origin_b"):
        layers, d_in, d_out = logical_axes(f"{stem}.kernel")
        if leaf.endswith("_a"):
            return (layers, f"adapter_{d_in}", None)
        return (layers, None, f"adapter_{d_out}")
    if leaf in ("lora_magnitude", "origin_norm"):
        layers, _, d_out = logical_axes(f"{stem}.kernel")
        return (layers, f"adapter_{d_out}")
    if leaf == "kernel_scale":
        return logical_axes(f"{stem}.kernel")
    for pattern, axes in LOGICAL_AXES:
        if re.fullmatch(pattern, path):
            return axes
    raise KeyError(f"no sharding rule for {path!r}: add one to LOGICAL_AXES")


def spec_of(path: str) -> P:
    """The partition of an array over mesh axes.

    Raises:
        InputError: two dimensions over the same mesh axis.

    Example:
        >>> tuple(spec_of("embed_tokens.embedding"))
        ('tensor', ('fsdp', 'sequence'))
    """
    logical = logical_axes(path)
    spec = P(*(MESH_AXES[axis] if axis else None for axis in logical))
    used = [name for entry in spec for name in _names(entry)]
    twice = sorted({name for name in used if used.count(name) > 1})
    if twice:
        raise InputError(
            f"sharding.LOGICAL_AXES x MESH_AXES: expected every mesh axis in one dimension of an "
            f"array, got {', '.join(twice)} in two of {path} {logical}, by the pattern "
            f"{_pattern_of(path)!r}. Give one of these dimensions another axis, or None."
        )
    return spec


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one dimension."""
    return (entry,) if isinstance(entry, str) else entry or ()


def _pattern_of(path: str) -> str:
    """The row of the table that an array's axes come from: its own, or its kernel's."""
    paths = (path, f"{path.rpartition('.')[0]}.kernel")
    return next(row for row, _ in LOGICAL_AXES if any(re.fullmatch(row, name) for name in paths))


def shardings(arrays: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh) -> dict[str, NamedSharding]:
    """The sharding of each array by path.

    Raises:
        InputError: an axis that the mesh cannot divide.
    """
    return {path: sharding_of(path, leaf.shape, mesh) for path, leaf in arrays.items()}


def sharding_of(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """The sharding of one array, after checking that every axis divides.

    Blocks of a quantised kernel's scale need not: those that do not divide lie whole everywhere.
    """
    spec = list(spec_of(path))
    for i, (size, axis) in enumerate(zip(shape, spec, strict=True)):
        axes = [name for name in _names(axis) if mesh.shape[name] > 1]
        parts = math.prod(mesh.shape[name] for name in axes)
        if size % parts and path.endswith(".kernel_scale") and i == 1:
            spec[i] = None
        elif size % parts:
            raise InputError(
                f"mesh.{' x mesh.'.join(axes)}: expected a divisor of {size}, an axis of {path} "
                f"{shape}, got {parts}. Choose another size for this part of the mesh."
            )
    return NamedSharding(mesh, P(*spec))


def with_shardings(
    arrays: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """The same shapes, each with its sharding attached."""
    placed = shardings(arrays, mesh)
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed[path])
        for path, leaf in arrays.items()
    }


def placed(arrays: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Arrays laid out as the table says."""
    return {
        path: hosts.place(value, sharding_of(path, value.shape, mesh))
        for path, value in arrays.items()
    }


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Arrays [micro-batches, B, T] of a batch: rows over data and fsdp, tokens over sequence.

    Where tokens are not split, an array may have no axis of tokens, or others.
    """
    tokens = ("sequence",) if mesh.shape["sequence"] > 1 else ()
    return NamedSharding(mesh, P(None, BATCH_AXES, *tokens))


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Arrays [B, …] without micro-batches: rows over data and fsdp."""
    return NamedSharding(mesh, P(BATCH_AXES))


def head_axes(mesh: Mesh) -> HeadAxes:
    """The axes that the pass over the logits is split over: rows of the batch, vocabulary."""
    rows = tuple(axis for axis in TOKEN_AXES if mesh.shape[axis] > 1)
    return HeadAxes(rows, "tensor" if mesh.shape["tensor"] > 1 else None)


def across_devices(mesh: Mesh) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Run the head's pass on each device's own rows and vocabulary, by ``jax.shard_map``.

    The head's width is gathered once, not once per chunk; every device closes up its own rows.
    """
    if mesh.size == 1:
        return unwrapped
    rows, vocabulary = P(TOKEN_AXES), P("tensor", None)
    specs = {"in_specs": (rows, vocabulary, P(), P()), "out_specs": (P(), rows)}
    return lambda compute: jax.shard_map(compute, mesh=mesh, check_vma=False, **specs)


def head_layout(mesh: Mesh) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Lay out rows over the axes of tokens and the head over ``tensor``, for the plain head.

    Left alone the partitioner may hold the logits of all rows on every device.
    """
    rows, vocabulary = NamedSharding(mesh, P(TOKEN_AXES)), NamedSharding(mesh, P("tensor", None))
    constrain = jax.lax.with_sharding_constraint
    return lambda parts, table: (
        jax.tree.map(lambda part: constrain(part, rows), parts),
        constrain(table, vocabulary),
    )


def flatten_tokens(mesh: Mesh) -> Callable[[Array], Array]:
    """From [B, T, …] to [N, …] such that every device keeps the rows N of its own tokens.

    Their order is that of the devices where tokens are split; no term depends on it.
    """
    copies, parts = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["sequence"]

    def flatten(x: Array) -> Array:
        rows, tokens, *rest = x.shape
        if parts > 1:
            x = x.reshape(copies, rows // copies, parts, tokens // parts, *rest).swapaxes(1, 2)
        return x.reshape(rows * tokens, *rest)

    return flatten


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, P())


def check_batch(rows: int, mesh: Mesh) -> None:
    """Raises InputError unless a micro-batch of ``rows`` divides over the mesh."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % parts:
        raise InputError(
            f"training.batch_size: expected batch_size / accumulation to be a multiple of "
            f"mesh.data x mesh.fsdp = {parts}, got {rows}. Change the batch or the mesh."
        )


def whole_length(length: int, longest: int, mesh: Mesh) -> int:
    """``length`` tokens of a row, rounded up to a multiple of ``mesh.sequence``.

    Raises:
        InputError: the multiple is more than ``longest``, which is ``data.max_length``.
    """
    parts = mesh.shape["sequence"]
    rounded = math.ceil(length / parts) * parts
    if rounded > longest:
        raise InputError(
            f"data.max_length: expected a multiple of mesh.sequence = {parts}, got {longest}: "
            "tokens of a row are split evenly. Change one of them."
        )
    return rounded
