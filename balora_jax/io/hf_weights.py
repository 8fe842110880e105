"""A Hugging Face checkpoint onto the devices, without a copy of it on the host.

A parameter is read block by block, and a block piece by piece: for each distinct block that a
device of this process needs, only the rows and columns of that block are read from the
memory-mapped files, cast, transposed and written into the block. On an accelerator the
block lies on the device from the beginning and a piece is sent and written there in place; on a CPU
the block is a host buffer that the device takes over as its own memory.

Bound: beside what lies on the devices, the host holds less than 1.2 times the largest tensor of the
checkpoint's files (or 10 MiB, if that is more), however many layers a stack has and whatever the
mesh. A piece has at most an eighth of that tensor, 64 MiB at most, and five copies of one exist
at a time at most: as stored, cast, transposed, in the runtime's transfer, and one not yet let go.
One thread reads. An accelerator holds one piece more for as long as it is written.

The mapped pages of a file come on top, but are not the program's own memory: the kernel drops them
when it needs room, and they are unmapped once a block's part of a tensor is read, so that there is
one tensor's share of them at most. ``python -m balora_jax.figures.load_memory`` measures this.
"""

import functools
import gc
import math
import mmap
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from balora_jax.errors import InputError
from balora_jax.io.hf_files import (
    CONFIG_FILE,
    FLOAT_DTYPES,
    StoredTensor,
    find_checkpoint,
    fingerprint,
    open_tensors,
    read_json_config,
    shortened,
)
from balora_jax.io.placed import placed
from balora_jax.models.weight_names import WeightRule
from balora_jax.progress import progress_bar

__all__ = ["find_checkpoint", "fingerprint", "load_weights", "read_json_config"]

_PIECE_BYTES = 64 * 2**20
_SMALLEST_PIECE_BYTES = 2**20
_PIECES_OF_A_TENSOR = 8
_PROGRESS_FROM_BYTES = 200_000_000

Bounds = tuple[tuple[int, int], ...]
Piece = tuple[tuple[int, ...], Callable[[], np.ndarray]]


@dataclass(frozen=True)
class _Parameter:
    """A target and the tensors that make it: one per layer if stacked, else exactly one."""

    rule: WeightRule
    struct: jax.ShapeDtypeStruct
    names: tuple[str, ...]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        inner = self.struct.shape[1:] if self.rule.stacked else self.struct.shape
        return tuple(inner[::-1] if self.rule.transpose else inner)


def load_weights(
    folder: str | Path,
    targets: Mapping[str, jax.ShapeDtypeStruct],
    rules: Sequence[WeightRule],
    *,
    ignore: Sequence[str] = (r"rotary_emb\.inv_freq$",),
) -> dict[str, jax.Array]:
    """Read the parameters ``targets`` from a checkpoint, each device only its own blocks.

    Args:
        folder: a folder as :func:`find_checkpoint` returns it.
        targets: shape, dtype and (optionally) sharding of every parameter, by dotted path.
            Stored numbers are cast to the dtype; no sharding means the first local device.
        rules: the weight-name table; rows whose path is not in ``targets`` are not loaded.
        ignore: regular expressions, searched in the names of tensors that may be left over.

    Returns:
        The arrays, by the same paths and in the same order as ``targets``.

    Raises:
        InputError: a broken or refused file, or one report of all missing, unexpected, misshaped
            and unusable tensors together.
        ValueError: a target that no rule names.
    """
    by_path = {rule.path: rule for rule in rules}
    unnamed = sorted(set(targets) - set(by_path))
    if unnamed:
        raise ValueError(f"no weight rule names these parameters: {shortened(unnamed)}")
    parameters = {path: _parameter(by_path[path], struct) for path, struct in targets.items()}
    with open_tensors(folder) as stored:
        tensors = placed(stored, rules)
        _check_fit(Path(folder), parameters.values(), tensors, ignore)
        size = sum(_bytes_to_read(p, tensors) for p in parameters.values())
        quiet = size < _PROGRESS_FROM_BYTES or jax.process_index() != 0
        limit = _piece_bytes(tensors.values())
        with progress_bar(
            total=size, desc="weights", unit="B", unit_scale=True, unit_divisor=1024, disable=quiet
        ) as bar:
            return {p: _load(parameters[p], tensors, limit, bar.update) for p in parameters}


def _piece_bytes(tensors: Iterable[StoredTensor]) -> int:
    """Most bytes of a piece, as stored or as wanted, whichever are more."""
    largest = max((math.prod(t.shape) * t.itemsize for t in tensors), default=0)
    return min(_PIECE_BYTES, max(_SMALLEST_PIECE_BYTES, largest // _PIECES_OF_A_TENSOR))


def _parameter(rule: WeightRule, struct: jax.ShapeDtypeStruct) -> _Parameter:
    return _Parameter(rule, struct, rule.names(struct.shape[0]))


def _check_fit(folder: Path, parameters, tensors: Mapping[str, StoredTensor], ignore) -> None:
    """Raise one report of everything that does not fit."""
    wanted = {name: p.stored_shape for p in parameters for name in p.names}
    missing = sorted(set(wanted) - set(tensors), key=_natural)
    extra = sorted(set(tensors) - set(wanted), key=_natural)
    extra = [name for name in extra if not any(re.search(pattern, name) for pattern in ignore)]
    present = {name: tensors[name] for name in wanted if name in tensors}
    misshaped = [
        f"{name} is {list(t.shape)}, expected {list(wanted[name])}"
        for name, t in present.items()
        if t.shape != wanted[name]
    ]
    unusable = [f"{n} is {t.dtype}" for n, t in present.items() if t.dtype not in FLOAT_DTYPES]
    kinds = {
        "missing": missing,
        "unexpected": extra,
        "misshaped": misshaped,
        f"of a dtype other than {'/'.join(FLOAT_DTYPES)}": unusable,
    }
    found = [f"{len(names)} {kind} ({shortened(names)})" for kind, names in kinds.items() if names]
    if found:
        raise InputError(
            f"{folder}: expected the {len(wanted)} tensors that its config describes, got "
            f"{'; '.join(found)}. Use the {CONFIG_FILE} and the unquantised weights that belong "
            "together."
        )


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _blocks(struct: jax.ShapeDtypeStruct) -> dict[Bounds, list[SingleDeviceSharding]]:
    """Distinct blocks of an array, each with the local devices that hold it."""
    sharding = _sharding(struct)
    blocks: dict[Bounds, list[SingleDeviceSharding]] = {}
    for device, index in sharding.addressable_devices_indices_map(struct.shape).items():
        parts = index or ()
        bounds = tuple(part.indices(n)[:2] for part, n in zip(parts, struct.shape, strict=True))
        place = SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
        blocks.setdefault(bounds, []).append(place)
    return blocks


def _sharding(struct: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
    return getattr(struct, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])


def _bytes_to_read(parameter: _Parameter, tensors: Mapping[str, StoredTensor]) -> int:
    itemsize = tensors[parameter.names[0]].itemsize
    return itemsize * sum(math.prod(b - a for a, b in block) for block in _blocks(parameter.struct))


def _load(
    parameter: _Parameter,
    tensors: Mapping[str, StoredTensor],
    limit: int,
    read: Callable[[int], Any],
) -> jax.Array:
    """Place a parameter block by block; each distinct block is read once."""
    struct, blocks = parameter.struct, _blocks(parameter.struct)
    sources = [tensors[name] for name in parameter.names]
    pieces = [_pieces(parameter, sources, bounds, limit, read) for bounds in blocks]
    shape = tuple(b - a for a, b in next(iter(blocks)))  # all have the same
    empty = jax.ShapeDtypeStruct(shape, struct.dtype)
    places = list(blocks.values())
    small = math.prod(shape) * struct.dtype.itemsize <= limit
    if small or all(on_host(group) for group in places):
        placed = []
        for group, parts in zip(places, pieces, strict=True):
            placed += _by_host(empty, group, parts)
            _let_go()
    else:
        placed = _by_device(empty, places, pieces)
    return jax.make_array_from_single_device_arrays(struct.shape, _sharding(struct), placed)


def on_host(places: Sequence[SingleDeviceSharding]) -> bool:
    """Whether the devices' memory is the host's own."""
    return all(device.platform == "cpu" for place in places for device in place.device_set)


def _by_host(
    empty: jax.ShapeDtypeStruct, places: Sequence[SingleDeviceSharding], pieces: Iterator[Piece]
) -> list[jax.Array]:
    """Put a block together on the host; a CPU device then takes the buffer over."""
    dtype = np.dtype(empty.dtype)
    block = _pages(math.prod(empty.shape) * dtype.itemsize).view(dtype).reshape(empty.shape)
    for corner, load in pieces:
        piece = load()
        ends = zip(corner, piece.shape, strict=True)
        _copy(block[tuple(slice(a, a + n) for a, n in ends)], piece)
    copies = [jax.device_put(block, place) for place in places]
    return jax.block_until_ready(copies)


def _pages(size: int) -> np.ndarray:
    """Bytes that begin at a page, as a CPU device wants a buffer that it takes over.

    Not by NumPy, which asks for huge pages: to make them the kernel may have to move gigabytes.
    """
    kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return np.frombuffer(mmap.mmap(-1, max(size, 1), flags=kind), np.uint8, size)


def _by_device(
    empty: jax.ShapeDtypeStruct,
    places: Sequence[Sequence[SingleDeviceSharding]],
    pieces: Sequence[Iterator[Piece]],
) -> list[jax.Array]:
    """Put all blocks together where they belong, so that the host never holds one of them.

    The blocks of all devices here are the parts of one array, so that one program serves them all.
    """
    every = [place for group in places for place in group]
    devices = [device for place in every for device in place.device_set]
    mesh = Mesh(np.array(devices), ("device",))
    lanes = NamedSharding(mesh, P("device"), memory_kind=every[0].memory_kind)
    with jax.set_mesh(mesh):
        held = _zeros(_side_by_side(empty.shape, lanes), np.dtype(empty.dtype), lanes)()
        for step in zip(*pieces, strict=True):
            sent: list[jax.Array] = []
            for (_, load), group in zip(step, places, strict=True):
                sent += _sent(load, group)
                _let_go()
            shape = _side_by_side(sent[0].shape, lanes)
            piece = jax.make_array_from_single_device_arrays(shape, lanes, sent)
            held = jax.block_until_ready(_writer(lanes)(held, piece, step[0][0]))
    parts = {shard.device: shard.data for shard in held.addressable_shards}
    return [parts[device] for device in devices]


def _side_by_side(shape: tuple[int, ...], lanes: NamedSharding) -> tuple[int, ...]:
    return (shape[0] * lanes.num_devices, *shape[1:])


def _sent(
    load: Callable[[], np.ndarray], places: Sequence[SingleDeviceSharding]
) -> list[jax.Array]:
    piece = load()
    if not piece.flags.c_contiguous:
        turned = np.empty(piece.shape, piece.dtype)
        _copy(turned, piece)
        piece = turned
    return jax.block_until_ready([jax.device_put(piece, place) for place in places])


@functools.cache
def _zeros(
    shape: tuple[int, ...], dtype: np.dtype, lanes: NamedSharding
) -> Callable[[], jax.Array]:
    """A program that makes zeros in place; ``jnp.zeros`` makes them elsewhere and sends them."""
    return jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=lanes)


@functools.cache
def _writer(lanes: NamedSharding) -> Callable[..., jax.Array]:
    """A program that writes each device's piece into its block, in place."""
    write = jax.shard_map(
        jax.lax.dynamic_update_slice,
        mesh=lanes.mesh,
        in_specs=(lanes.spec, lanes.spec, P()),
        out_specs=lanes.spec,
        check_vma=False,
    )
    return jax.jit(write, donate_argnums=0)


def _let_go() -> None:
    """Host buffers of finished transfers; JAX drops them when Python collects garbage.

    The youngest generation is enough for that.
    """
    gc.collect(0)


def _pieces(
    parameter: _Parameter,
    sources: list[StoredTensor],
    bounds: Bounds,
    limit: int,
    read: Callable[[int], Any],
) -> Iterator[Piece]:
    """The pieces of a block: the first corner of each in the block, and what reads it."""
    rule, dtype = parameter.rule, np.dtype(parameter.struct.dtype)
    inner = bounds[1:] if rule.stacked else bounds
    (first, last), *rest = inner[::-1] if rule.transpose else inner
    layers = range(*bounds[0]) if rule.stacked else (0,)
    for row, layer in enumerate(layers):
        source = sources[layer]
        itemsize = max(dtype.itemsize, source.itemsize)
        row_bytes = max(1, math.prod(b - a for a, b in rest)) * itemsize
        step = max(1, limit // row_bytes)
        with source.mapped() as part:
            for start in range(first, last, step):
                rows = slice(start, min(start + step, last))
                index = (rows, *(slice(a, b) for a, b in rest))
                corner = (start - first, *(0 for _ in rest))
                load = functools.partial(_read, part, index, dtype, rule, read)
                corner = corner[::-1] if rule.transpose else corner
                yield ((row, *corner) if rule.stacked else corner), load


def _read(
    part: Any,
    index: tuple[slice, ...],
    dtype: np.dtype,
    rule: WeightRule,
    read: Callable[[int], Any],
) -> np.ndarray:
    """Rows and columns of a stored tensor in our orientation, one layer of a stack."""
    piece = part[index]
    read(piece.nbytes)
    piece = piece.astype(dtype, copy=False)
    piece = piece.T if rule.transpose else piece
    return piece[None] if rule.stacked else piece


def _copy(out: np.ndarray, piece: np.ndarray) -> None:
    # As plain integers and 64 stored rows at a time: NumPy copies a transposed bfloat16 array in
    # one go about four times slower.
    if not piece.flags.c_contiguous:
        out, piece = out.T, piece.T
    bits = np.dtype(f"u{out.itemsize}")
    for row in range(0, len(out), 64):
        out[row : row + 64].view(bits)[...] = piece[row : row + 64].view(bits)
