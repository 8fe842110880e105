"""Trained adapters as one GGUF file, in the layout that llama.cpp loads beside a base."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from balora_jax.errors import InputError
from balora_jax.io.beside import Beside, put_beside
from balora_jax.io.folders import replaced_folder
from balora_jax.io.hf_files import shortened
from balora_jax.io.lora_pairs import ExportReport, Pair, check_rank, report_of, trained_pair
from balora_jax.models.adapters import AdaptedModule
from balora_jax.models.decoder_config import DecoderConfig
from balora_jax.models.families.base import GgufLayout

ADAPTER_FILE = "adapter.gguf"

# From a type of the tensors to what gguf calls a file of such tensors.
_FILE_TYPES = {"float32": "ALL_F32", "float16": "MOSTLY_F16"}
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")
MERGE_INSTEAD = (
    "Export it with --format merged, and convert that with llama.cpp's convert_hf_to_gguf.py."
)


class Served(NamedTuple):
    """The base of an adapter as llama.cpp's file speaks of it.

    Attributes:
        config: of the base.
        layout: of its family.
        name: of the base, without the folders of this machine.
        url: its page on the hub; None where it has none.
    """

    config: DecoderConfig
    layout: GgufLayout
    name: str
    url: str | None


@dataclass(frozen=True)
class _Tensors:
    """A and B of one tensor of the base: ``y += scale · B (A x)``.

    Attributes:
        a: [r, in] float32, of experts [E, r, in].
        b: [out, r] float32, of experts [E, out, r].
        scale: the factor.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float

    @property
    def alpha(self) -> float:
        """What llama.cpp divides by r to get the scale."""
        return self.scale * self.b.shape[-1]


def export_gguf(
    folder: str | Path,
    *,
    modules: Sequence[AdaptedModule],
    adapters: Mapping[str, Any],
    base: Served,
    dtype: str = "float32",
    rank: int | None = None,
    beside: Beside = MappingProxyType({}),
) -> ExportReport:
    """Write a folder with one GGUF file that ``llama-server --lora`` loads beside its base.

    llama.cpp computes ``y += (alpha / r) · B (A x)`` with one alpha and each tensor's own r: alpha
    is that of most tensors, and the B of the others gets what is left. Of the families whose q and
    k it keeps in Meta's order, the rows of B are put in that order. Experts lie in one tensor; one
    that has no adapter gets zeros.

    Args:
        folder: new or empty folder; it appears complete or not at all.
        modules: the adapted layers.
        adapters: ``path.lora_a`` [L, in, R] and ``path.lora_b`` [L, R, out], measured from zero.
        base: what it is served beside.
        dtype: of the tensors, ``float32`` or ``float16``.
        rank: recompress every larger module to this rank.
        beside: what else the folder gets, by names.

    Raises:
        InputError: the package ``gguf`` is missing; an unknown dtype; what llama.cpp cannot serve
            (a family or a layer that it is not known to have, DoRA); a number too large for the
            dtype; or a folder that may not be written.

    Source: ``convert_lora_to_gguf.py`` and ``src/llama-adapter.cpp`` of llama.cpp. Departures:
    that program takes one scale for all modules, and turns GPT-2's layers round.
    """
    target = Path(folder)
    check_rank(rank)
    _check(target, modules, base, dtype)
    package = _gguf()
    names = _names(package, target, modules, base)
    pairs = [trained_pair(module, adapters, {}, rank) for module in modules]
    tensors = _grouped(names, pairs, base.config.experts)
    alpha = next((one for one in _alphas(tensors.values()) if one), 1.0)
    written: dict[str, np.ndarray] = {}
    for name, held in tensors.items():
        b = held.b * np.float32(held.alpha / alpha)
        if base.layout.meta_rows:
            b = _in_meta_order(name, b, base.config)
        written[f"{name}.weight.lora_a"] = _cast(target, name, held.a, dtype)
        written[f"{name}.weight.lora_b"] = _cast(target, name, b, dtype)
    with replaced_folder(target) as draft:
        _write(package, draft / ADAPTER_FILE, written, base, alpha, dtype)
        put_beside(draft, beside)
    numbers = sum(value.size for value in written.values())
    return report_of(target, pairs, numbers, recompressed=rank is not None)


def _gguf() -> Any:
    """The package ``gguf``, imported when it is first needed."""
    try:
        import gguf
    except ImportError as error:
        raise InputError(
            "--format gguf: expected the package gguf, which is not installed. "
            "Install balora_jax[gguf]."
        ) from error
    return gguf


def _check(folder: Path, modules: Sequence[AdaptedModule], base: Served, dtype: str) -> None:
    """Raises InputError for what llama.cpp cannot serve, whatever the layers are called."""
    if dtype not in _FILE_TYPES:
        raise InputError(
            f"--dtype: expected {' or '.join(_FILE_TYPES)} with --format gguf, got {dtype}. Choose "
            "one of them."
        )
    if any("lora_magnitude" in module.method.parts(origin=False) for module in modules):
        raise InputError(
            f"{folder}: expected an adapter without DoRA, got one with it. {MERGE_INSTEAD}"
        )
    rope = base.config.rope
    part = rope is not None and rope.rotary_dim not in (None, base.config.head_dim)
    if part and base.layout.meta_rows:
        raise InputError(
            f"{folder}: expected heads that rotate whole, as llama.cpp has them in "
            f"{base.layout.arch}, got a part of each. Use the PEFT adapter."
        )


def _names(package: Any, folder: Path, modules: Sequence[AdaptedModule], base: Served) -> list[str]:
    """What gguf's table calls the layers, ``blk.3.attn_q``; experts of a layer have one name."""
    arch = base.layout.arch
    known = {name: one for one, name in package.MODEL_ARCH_NAMES.items()}
    if arch not in known:
        raise InputError(
            f"--format gguf: expected a package gguf that knows {arch}, got an older one. "
            "Upgrade it."
        )
    table = package.get_tensor_name_map(known[arch], base.config.num_layers)
    found = []
    for module in modules:
        expert = _EXPERT.fullmatch(module.name)
        plain = f"{expert[1]}.{expert[3]}" if expert else module.name
        found.append(table.get_name(plain.replace("model.language_model.", "model.", 1)))
    strange = [m.name for m, name in zip(modules, found, strict=True) if name is None]
    if strange:
        raise InputError(
            f"{folder}: expected layers that gguf has names for in {arch}, got "
            f"{shortened(strange)}. {MERGE_INSTEAD}"
        )
    return found


def _grouped(names: Sequence[str], pairs: Sequence[Pair], experts: int) -> dict[str, _Tensors]:
    """The tensors by name; the experts of a layer together, their ranks padded with zeros."""
    found: dict[str, _Tensors] = {}
    together: dict[str, dict[int, Pair]] = {}
    for name, pair in zip(names, pairs, strict=True):
        expert = _EXPERT.fullmatch(pair.module.name)
        if expert is None:
            found[name] = _Tensors(pair.down.T, pair.up.T, pair.scale)
        else:
            together.setdefault(name, {})[int(expert[2])] = pair
    for name, group in together.items():
        found[name] = _stacked(group, experts)
    return found


def _stacked(group: Mapping[int, Pair], experts: int) -> _Tensors:
    """The experts of a layer by number as one, each scale within its B."""
    first, rank = next(iter(group.values())).module, max(pair.rank for pair in group.values())
    a = np.zeros((experts, rank, first.in_features), np.float32)
    b = np.zeros((experts, first.out_features, rank), np.float32)
    scale = Counter(pair.scale for pair in group.values()).most_common(1)[0][0] or 1.0
    for expert, pair in group.items():
        a[expert, : pair.rank] = pair.down.T
        b[expert, :, : pair.rank] = pair.up.T * np.float32(pair.scale / scale)
    return _Tensors(a, b, scale)


def _alphas(tensors: Any) -> list[float]:
    """The different alphas, the most frequent first."""
    return [alpha for alpha, _ in Counter(one.alpha for one in tensors).most_common()]


def _in_meta_order(name: str, b: np.ndarray, config: DecoderConfig) -> np.ndarray:
    """Rows of q or k with the numbers that rotate together side by side; others as they are.

    A checkpoint has row i of a head beside row i + K/2 of it.
    """
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    count = heads.get(name.rpartition(".")[2])
    if count is None:
        return b
    halves = b.reshape(count, 2, len(b) // count // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(b.shape)


def _cast(folder: Path, name: str, value: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(value, dtype)
    if dtype != "float32" and not np.isfinite(cast).all():
        raise InputError(
            f"{folder}: expected numbers that {dtype} can hold, got {np.abs(value).max():.3g} in "
            f"{name}. Leave out --dtype."
        )
    return cast


def _write(
    package: Any,
    file: Path,
    tensors: Mapping[str, np.ndarray],
    base: Served,
    alpha: float,
    dtype: str,
) -> None:
    """The file: what it is, what it belongs to, and its tensors."""
    writer = package.GGUFWriter(file, base.layout.arch)
    try:
        writer.add_type(package.GGUFType.ADAPTER)
        writer.add_string(package.Keys.Adapter.TYPE, "lora")
        writer.add_float32(package.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base.name)
        if base.url is not None:
            writer.add_base_model_repo_url(0, base.url)
        writer.add_file_type(package.LlamaFileType[_FILE_TYPES[dtype]])
        writer.add_quantization_version(package.GGML_QUANT_VERSION)
        for name, value in tensors.items():
            writer.add_tensor(name, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
