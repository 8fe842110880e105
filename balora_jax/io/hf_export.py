"""A fine-tuned model written as an ordinary Hugging Face checkpoint."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np

from balora_jax.errors import InputError
from balora_jax.io.beside import OF_A_MODEL, OURS, Beside, entries, found_beside, put_beside
from balora_jax.io.folders import replaced_folder
from balora_jax.io.hf_files import (
    CONFIG_FILE,
    FLOAT_DTYPES,
    INDEX_FILE,
    SINGLE_FILE,
    StoredTensor,
    open_tensors,
    read_json_config,
    shortened,
)
from balora_jax.io.lora_pairs import delta_pair, magnitude_of
from balora_jax.io.placed import placed
from balora_jax.models.adapters import AdaptedModule
from balora_jax.models.weight_names import WeightRule
from balora_jax.progress import progress_bar

MAX_SHARD_BYTES = 4 * 2**30

_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_PROGRESS_FROM_BYTES = 200_000_000
_OF_A_MERGED = re.compile(
    rf"{re.escape(CONFIG_FILE)}|{re.escape(SINGLE_FILE)}|{re.escape(INDEX_FILE)}|"
    rf"model-\d{{5}}-of-\d{{5}}\.safetensors|{OURS.pattern}|{OF_A_MODEL.pattern}"
)
# What a base says of the form that its weights are stored in, which is not that of the new ones.
_OF_THE_STORED = ("auto_map", "quantization_config", "compression_config")
_NAMED = {"F64": "float32", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# From a checkpoint tensor's name and its stored value to the new value, None for no change.
Deltas = Callable[[str, np.ndarray], np.ndarray | None]


@dataclass(frozen=True)
class MergeReport:
    """Result of a merged export: its folder, files, tensors, changed tensors, bytes and dtype."""

    folder: Path
    files: int
    tensors: int
    merged: int
    total_bytes: int
    dtype: str


@dataclass(frozen=True)
class _Held:
    """A tensor in memory, read as one of an open checkpoint is."""

    value: np.ndarray

    def get_tensor(self, name: str) -> np.ndarray:
        """The tensor, whatever its name."""
        del name
        return self.value


@dataclass(frozen=True)
class _Entry:
    """One tensor to be written, with its name and the code of its dtype in the new file."""

    name: str
    source: StoredTensor
    dtype: str
    itemsize: int

    @property
    def nbytes(self) -> int:
        return self.itemsize * math.prod(self.source.shape)


def merged_delta(
    module: AdaptedModule, adapters: Mapping[str, Any], origin: Mapping[str, Any]
) -> np.ndarray:
    """The change of one checkpoint weight, ``scale · (A B − A₀ B₀)ᵀ``, [out, in] float32."""
    down, up = delta_pair(module, adapters, origin)
    return np.float32(module.scale) * (down @ up).T


def merged_weight(
    module: AdaptedModule,
    adapters: Mapping[str, Any],
    origin: Mapping[str, Any],
    weight: np.ndarray,
) -> np.ndarray:
    """The fine-tuned weight, ``W + s·Δ``, for DoRA ``m · (W + s·Δ) / ‖W + s·Δ‖`` per output.

    Args:
        module: the adapted layer.
        adapters: stacks by path, as :func:`~balora_jax.io.peft_writer.export_peft` takes them.
        origin: likewise.
        weight: as stored, [out, in], of any float dtype.

    Returns:
        [out, in] float32. An output whose weights are all zero keeps them.

    Raises:
        ValueError: a weight of another shape than the adapter.
    """
    delta = merged_delta(module, adapters, origin)
    if delta.shape != weight.shape:
        raise ValueError(f"{module.name}: delta is {delta.shape}, weight is {weight.shape}")
    tuned = weight.astype(np.float32) + delta
    magnitude = magnitude_of(module, adapters)
    if magnitude is None:
        return tuned
    norm = np.linalg.norm(tuned, axis=1)
    gain = np.divide(magnitude, norm, out=np.ones_like(norm), where=norm > 0)
    return tuned * gain[:, None]


def module_deltas(
    modules: Sequence[AdaptedModule],
    adapters: Mapping[str, Any],
    origin: Mapping[str, Any],
    *,
    transposed: Collection[str] = (),
) -> Deltas:
    """Function from a checkpoint weight's name and value to its new value, None where unchanged.

    Each weight is computed when asked for, so that one at a time is in memory.

    Args:
        modules: the adapted layers.
        adapters: stacks by path.
        origin: likewise.
        transposed: names of the modules whose weight is stored [in, out], as GPT-2's are.
    """
    by_weight = {f"{module.name}.weight": module for module in modules}

    def merge(name: str, weight: np.ndarray) -> np.ndarray | None:
        module = by_weight.get(name)
        if module is None:
            return None
        if module.name in transposed:
            return merged_weight(module, adapters, origin, weight.T).T
        return merged_weight(module, adapters, origin, weight)

    return merge


def export_merged(
    folder: str | Path,
    *,
    source: str | Path,
    deltas: Deltas,
    dtype: str | None,
    rules: Sequence[WeightRule] = (),
    added: Mapping[str, np.ndarray] = MappingProxyType({}),
    settings: Mapping[str, Any] = MappingProxyType({}),
    beside: Beside = MappingProxyType({}),
    overwrite: bool = False,
) -> MergeReport:
    """Write the source checkpoint with the weights of ``deltas``, as sharded safetensors.

    Tensors are streamed one at a time: read, changed in float32, cast, written. The config says
    the dtype that they have and no quantisation; generation config, processor, tokenizer and
    licence are copied; code and pickles are not.

    Args:
        folder: new or empty folder; it appears complete or not at all.
        source: folder of the original checkpoint.
        deltas: from a tensor's name and stored value to the new value, None for no change.
        dtype: of all floating-point tensors: ``float32``, ``bfloat16`` or ``float16``; None for
            that of each in the source (``float32`` for float64), and for what is added that of
            most numbers there.
        rules: the weight-name table; with it a tensor is written (and its change looked up) under
            the table's name, whatever older one the source has.
        added: whole tensors by name, in place of those of the source or beside them.
        settings: of the new ``config.json``, in place of the source's.
        beside: what else the folder gets, by names; a file of the source stands back.
        overwrite: replace a merged export that is already there.

    Raises:
        InputError: an unknown dtype, a source that is broken or quantised, a folder that may not
            be written, or deltas that match no tensor of the source.
        ValueError: a delta or a new value of another shape than its weight.
    """
    if dtype not in (None, *_DTYPES):
        raise InputError(
            f"dtype: expected one of {', '.join(_DTYPES)}, got {dtype!r}. Choose one of them."
        )
    source, target = Path(source), Path(folder)
    replaced = replaced_folder(target, may_replace=lambda old: overwrite and is_merged(old))
    with open_tensors(source) as tensors, replaced as draft:
        named = placed(tensors, rules)
        usual = dtype or _usual(tensors)
        for name, value in added.items():
            named[name] = StoredTensor(name, source, value.shape, _DTYPES[usual], _Held(value))
        shards = _plan(source, named, dtype, MAX_SHARD_BYTES)
        merged = _write_shards(draft, shards, deltas)
        if not merged:
            raise InputError(
                f"{source}: expected the weights that were adapted, got none of their names. "
                "Name the checkpoint that was trained."
            )
        _write_config(draft, source, usual, settings)
        put_beside(draft, {**found_beside(source, OF_A_MODEL), **beside})
    planned = [entry for shard in shards for entry in shard]
    total = sum(entry.nbytes for entry in planned)
    return MergeReport(target, len(shards), len(planned), merged, total, usual)


def _usual(tensors: Mapping[str, StoredTensor]) -> str:
    """The dtype of most numbers of a checkpoint."""
    counts: Counter[str] = Counter()
    for tensor in tensors.values():
        if tensor.dtype in FLOAT_DTYPES:
            counts[_NAMED[tensor.dtype]] += math.prod(tensor.shape)
    return counts.most_common(1)[0][0] if counts else "float32"


def is_merged(folder: Path) -> bool:
    """Whether a folder holds a merged export and nothing that overwriting it would lose."""
    there = entries(folder)
    known = (_OF_A_MERGED.fullmatch(name) and path.is_file() for name, path in there.items())
    return CONFIG_FILE in there and all(known)


def _plan(
    source: Path, tensors: Mapping[str, StoredTensor], dtype: str | None, limit: int
) -> list[list[_Entry]]:
    """Split the tensors into files, in the order of the source."""
    unusable = [
        f"{t.name} is {t.dtype}"
        for t in tensors.values()
        if t.dtype not in FLOAT_DTYPES and not t.dtype.startswith(("I", "U", "BOOL"))
    ]
    if unusable:
        raise InputError(
            f"{source}: expected tensors of {'/'.join(FLOAT_DTYPES)}, got {shortened(unusable)}. "
            "Merge into the unquantised checkpoint."
        )
    shards: list[list[_Entry]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        code = tensor.dtype
        if code in FLOAT_DTYPES:
            code = _DTYPES[dtype or _NAMED[code]]
        itemsize = {"F32": 4, "BF16": 2, "F16": 2}.get(code, tensor.itemsize)
        entry = _Entry(name, tensor, code, itemsize)
        if shards[-1] and size + entry.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def _write_shards(folder: Path, shards: Sequence[Sequence[_Entry]], deltas: Deltas) -> int:
    """Write all weight files and their index; returns how many tensors a delta changed."""
    count = len(shards)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    names = [SINGLE_FILE] if count == 1 else names
    total = sum(entry.nbytes for shard in shards for entry in shard)
    merged = 0
    with progress_bar(
        total=total, desc="merge", unit="B", unit_scale=True, disable=total < _PROGRESS_FROM_BYTES
    ) as bar:
        for name, shard in zip(names, shards, strict=True):
            with (folder / name).open("wb") as stream:
                # Wide numbers first keeps every tensor aligned to its own size.
                ordered = sorted(
                    shard, key=lambda e: -e.nbytes // max(1, math.prod(e.source.shape))
                )
                _write_header(stream, ordered)
                for entry in ordered:
                    merged += _write_tensor(stream, entry, deltas)
                    bar.update(entry.nbytes)
    if count > 1:
        where = {e.name: n for n, s in zip(names, shards, strict=True) for e in s}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return merged


def _write_header(stream: BinaryIO, entries: Sequence[_Entry]) -> None:
    """Header of a safetensors file: its length, then JSON padded to eight bytes.

    Written here and not by ``safetensors``, which wants all tensors of a file in memory, twice.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.source.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little"))
    stream.write(text)


def _write_tensor(stream: BinaryIO, entry: _Entry, deltas: Deltas) -> bool:
    """Append one tensor; returns whether a delta changed it."""
    name = entry.name
    value = entry.source.value()
    changed = deltas(name, value)
    if changed is not None:
        if changed.shape != value.shape:
            raise ValueError(f"{name}: new value is {changed.shape}, weight is {value.shape}")
        value = changed
    if entry.source.dtype in FLOAT_DTYPES:
        value = value.astype(_NAMED[entry.dtype], copy=False)
    stream.write(value.tobytes())
    return changed is not None


def _write_config(folder: Path, source: Path, dtype: str, settings: Mapping[str, Any]) -> None:
    """The source's config, as it is true of the new weights; so its sections, of text or images."""
    config = {**read_json_config(source), **settings}
    if "torch_dtype" not in config:  # the name before transformers 4.56
        config["dtype"] = dtype
    inner = [config[key] for key in config if key.endswith("_config")]
    for section in (config, *(part for part in inner if isinstance(part, dict))):
        for key in _OF_THE_STORED:
            section.pop(key, None)
        section |= {key: dtype for key in ("dtype", "torch_dtype") if key in section}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
