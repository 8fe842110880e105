"""How does a Hugging Face checkpoint get onto the devices without a copy of it on the host?

A parameter is read block by block: for each distinct block that a device of this process needs,
only the rows and columns of that block are read from the memory-mapped safetensors files, cast and
transposed into one buffer, and placed. The host never holds more than one device's block of one
parameter (plus a piece of at most ``_PIECE_BYTES``).
"""

import gc
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from tqdm import tqdm

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
from balora_jax.models.weight_names import WeightRule, stored_names

__all__ = ["find_checkpoint", "fingerprint", "load_weights", "read_json_config"]

_PIECE_BYTES = 64 * 2**20
_PROGRESS_FROM_BYTES = 200_000_000

Bounds = tuple[tuple[int, int], ...]


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
        tensors = {ours: stored[name] for ours, name in stored_names(stored, rules).items()}
        _check_fit(Path(folder), parameters.values(), tensors, ignore)
        size = sum(_bytes_to_read(p, tensors) for p in parameters.values())
        quiet = size < _PROGRESS_FROM_BYTES or jax.process_index() != 0
        with tqdm(
            total=size, desc="weights", unit="B", unit_scale=True, unit_divisor=1024, disable=quiet
        ) as bar:
            return {p: _load(parameters[p], tensors, bar.update) for p in parameters}


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
    parameter: _Parameter, tensors: Mapping[str, StoredTensor], read: Callable[[int], Any]
) -> jax.Array:
    """Place a parameter block by block; each distinct block is read once."""
    struct = parameter.struct
    sources = [tensors[name] for name in parameter.names]
    placed: list[jax.Array] = []
    for bounds, places in _blocks(struct).items():
        block = _read_block(parameter, sources, bounds, read)
        copies = [jax.device_put(block, place) for place in places]
        jax.block_until_ready(copies)
        placed += copies
        # The host buffer must go before the next one is made; JAX lets go of finished transfers
        # when Python collects garbage, and the youngest generation is enough for that.
        del block
        gc.collect(0)
    return jax.make_array_from_single_device_arrays(struct.shape, _sharding(struct), placed)


def _read_block(
    parameter: _Parameter, sources: list[StoredTensor], bounds: Bounds, read: Callable[[int], Any]
) -> np.ndarray:
    block = np.empty([b - a for a, b in bounds], np.dtype(parameter.struct.dtype))
    if not parameter.rule.stacked:
        _fill(block, sources[0], bounds, parameter.rule.transpose, read)
        return block
    for row, layer in enumerate(range(*bounds[0])):
        _fill(block[row], sources[layer], bounds[1:], parameter.rule.transpose, read)
    return block


def _fill(
    out: np.ndarray,
    source: StoredTensor,
    bounds: Bounds,
    transpose: bool,
    read: Callable[[int], Any],
) -> None:
    """Copy ``bounds`` of a stored tensor into ``out``, a piece of rows at a time."""
    if transpose:
        out, bounds = out.T, bounds[::-1]
    part = source.handle.get_slice(source.name)
    (first, last), *rest = bounds
    columns = tuple(slice(a, b) for a, b in rest)
    row_bytes = max(1, math.prod(b - a for a, b in rest)) * max(out.itemsize, source.itemsize)
    step = max(1, _PIECE_BYTES // row_bytes)
    for start in range(first, last, step):
        stop = min(start + step, last)
        piece = part[(slice(start, stop), *columns)]
        read(piece.nbytes)
        _copy(out[start - first : stop - first], piece.astype(out.dtype, copy=False))


def _copy(out: np.ndarray, piece: np.ndarray) -> None:
    # As plain integers and 64 rows at a time: NumPy copies a transposed bfloat16 array in one go
    # about four times slower.
    bits = np.dtype(f"u{out.itemsize}")
    for row in range(0, len(out), 64):
        out[row : row + 64].view(bits)[...] = piece[row : row + 64].view(bits)
