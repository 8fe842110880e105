"""Trained adapters as a PEFT folder."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save

from balora_jax.errors import InputError
from balora_jax.io.beside import OF_AN_ADAPTER, Beside, entries, put_beside
from balora_jax.io.folders import replaced_folder
from balora_jax.io.hf_files import shortened
from balora_jax.io.lora_pairs import ExportReport, Pair, check_rank, report_of, trained_pair
from balora_jax.io.peft_reader import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MAGNITUDE,
    PREFIX,
    ROWS,
    UNDER_ROWS,
    is_saved,
)
from balora_jax.models.adapters import AdaptedModule
from balora_jax.models.weight_names import HEAD_NAME

_ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)


class TokenRows(NamedTuple):
    """Rows of an embedding table that trained alone.

    Attributes:
        module: name of the table's module in the checkpoint.
        ids: which rows.
        rows: [n, D] float32.
        tied: the head is the same table.
    """

    module: str
    ids: tuple[int, ...]
    rows: np.ndarray
    tied: bool

    def placed(self, saved: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """These rows and whole tensors by the names that PEFT gives them.

        A whole table lies below its rows.
        """
        head = HEAD_NAME.removesuffix(".weight")
        tables = (self.module, head) if self.tied else (self.module,)
        below = {f"{table}.weight": f"{table}.{UNDER_ROWS}" for table in tables}
        named = {below.get(name, name): value for name, value in saved.items()}
        return {**named, f"{self.module}.{ROWS}": self.rows}


def export_peft(
    folder: str | Path,
    *,
    modules: Sequence[AdaptedModule],
    adapters: Mapping[str, Any],
    origin: Mapping[str, Any],
    base_name: str,
    revision: str | None = None,
    rank: int | None = None,
    task_type: str = "CAUSAL_LM",
    use_rslora: bool = False,
    base_modules: Sequence[str] = (),
    fan_in_fan_out: bool = False,
    saved: Mapping[str, np.ndarray] = MappingProxyType({}),
    modules_to_save: Sequence[str] = (),
    tokens: TokenRows | None = None,
    beside: Beside = MappingProxyType({}),
    overwrite: bool = False,
) -> ExportReport:
    """Write a folder that ``peft`` loads onto the untouched base model.

    Adapters whose rank stays keep alpha and ``use_rslora``. Where it changes (a trained A with an
    origin, or a recompressed module) alpha = scale · (rank written) without ``use_rslora``: the
    same factor, exactly. Modules of other ranks or scales get the factor of most of them, and
    their B what is left, as servers read one factor for all. LoRA-FA leaves as LoRA. DoRA leaves
    with its magnitudes: on the original base PEFT computes the norm of the same ``W + s·Δ``.

    Args:
        folder: new or empty folder; it appears complete or not at all.
        modules: the adapted layers.
        adapters: ``path.lora_a`` [L, in, R] and ``path.lora_b`` [L, R, out] (host or local device),
            for DoRA ``path.lora_magnitude`` [L, out].
        origin: ``path.origin_a`` and ``path.origin_b`` likewise, none for starts at zero; for
            LoRA-FA ``path.lora_a``, unless it is in ``adapters``.
        base_name: Hub name or folder of the base model, written for ``AutoPeftModel``.
        revision: of the base on the hub.
        rank: recompress every larger module to this rank.
        task_type: PEFT's task type, ``CAUSAL_LM`` or ``SEQ_CLS``.
        use_rslora: the modules' scale is alpha / sqrt(rank).
        base_modules: names of all linear layers of the base; with them, ``target_modules`` becomes
            a short suffix list wherever that names exactly ``modules``. Without them suffixes are
            used when every layer of each stack is adapted.
        fan_in_fan_out: the base stores its weights [in, out], as GPT-2 does.
        saved: whole tensors that trained, by checkpoint name (``classifier.weight``).
        modules_to_save: names (or their ends) of the modules that ``saved`` belongs to.
        tokens: rows of an embedding table that trained alone.
        beside: what else the folder gets, by names of ``OF_AN_ADAPTER``.
        overwrite: replace an adapter folder that is already there.

    Raises:
        InputError: nothing to export, a rank below 1, a saved tensor outside
            ``modules_to_save`` that is no table of tokens, or a folder that may not be written.
    """
    _check_export(folder, modules, rank, saved, modules_to_save)
    target = Path(folder)
    with replaced_folder(target, may_replace=lambda old: overwrite and is_adapter(old)) as draft:
        pairs = _under_one_scale(
            [trained_pair(module, adapters, origin, rank) for module in modules]
        )
        heights = {m.path: len(adapters[f"{m.path}.lora_b"]) for m in modules}
        # A rank that was asked for is written plainly, whichever modules it changed.
        kept = rank is None and all(pair.rank == pair.module.rank for pair in pairs)
        config = {
            **_config(pairs, use_rslora and kept),
            "task_type": task_type,
            "base_model_name_or_path": base_name,
            "revision": revision,
            "target_modules": _target_modules(modules, heights, base_modules),
            "fan_in_fan_out": fan_in_fan_out,
            "modules_to_save": list(modules_to_save) or None,
            **_of_tokens(tokens),
        }
        (draft / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        whole = saved if tokens is None else tokens.placed(saved)
        numbers = _save(draft / ADAPTER_WEIGHTS, pairs, whole)
        put_beside(draft, beside)
    return report_of(target, pairs, numbers, recompressed=rank is not None)


def _config(pairs: Sequence[Pair], use_rslora: bool) -> dict[str, Any]:
    """What an ``adapter_config.json`` says of the pairs alone."""
    return {
        "peft_type": "LORA",
        "inference_mode": True,
        **_ranks_and_alphas(pairs, use_rslora),
        "use_rslora": use_rslora,
        "use_dora": any(pair.magnitude is not None for pair in pairs),
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
    }


def _of_tokens(tokens: TokenRows | None) -> dict[str, Any]:
    if tokens is None:
        return {}
    return {"trainable_token_indices": {tokens.module.rpartition(".")[2]: list(tokens.ids)}}


def _check_export(
    folder: str | Path,
    modules: Sequence[AdaptedModule],
    rank: int | None,
    saved: Mapping[str, np.ndarray],
    modules_to_save: Sequence[str],
) -> None:
    if not modules:
        raise InputError(f"{folder}: expected adapted layers to export, got none. Train some.")
    check_rank(rank)
    strange = [name for name in saved if not is_saved(name, modules_to_save)]
    if strange:
        raise InputError(
            f"saved: expected tensors of modules_to_save={list(modules_to_save)}, got "
            f"{shortened(strange)}. Name their modules there."
        )


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and nothing that overwriting it would lose."""
    there = entries(folder)
    known = (name in _ADAPTER_FILES or OF_AN_ADAPTER.fullmatch(name) for name in there)
    files = (path.is_file() for path in there.values())
    return ADAPTER_CONFIG in there and all(known) and all(files)


def _save(file: Path, pairs: Sequence[Pair], saved: Mapping[str, np.ndarray]) -> int:
    """Write all tensors, float32; returns how many numbers they hold."""
    tensors = {f"{PREFIX}{name}": np.asarray(value) for name, value in saved.items()}
    for pair in pairs:
        key = f"{PREFIX}{pair.module.name}"
        tensors[f"{key}.lora_A.weight"] = pair.down.T
        tensors[f"{key}.lora_B.weight"] = pair.up.T
        if pair.magnitude is not None:
            tensors[f"{key}.{MAGNITUDE}"] = pair.magnitude
    written = {
        name: np.ascontiguousarray(value.astype(np.float32)) for name, value in tensors.items()
    }
    # Not save_file, whose error of a full disk does not say that it is one.
    file.write_bytes(save(written, metadata={"format": "pt"}))
    return sum(value.size for value in written.values())


def _under_one_scale(pairs: Sequence[Pair]) -> list[Pair]:
    """The same deltas with one factor for all modules, that of most; B takes what is left.

    Servers such as vLLM read one factor, ``lora_alpha / r``, and no patterns.
    """
    scale = Counter(pair.scale for pair in pairs).most_common(1)[0][0]
    return [
        pair
        if pair.scale == scale
        else replace(pair, up=pair.up * np.float32(pair.scale / scale), scale=scale)
        for pair in pairs
    ]


def _ranks_and_alphas(pairs: Sequence[Pair], use_rslora: bool) -> dict[str, Any]:
    """The largest rank and its alpha, and the exact names of the modules with a smaller rank.

    Alpha over rank (or over its root) is one factor everywhere, for PEFT by its patterns, for a
    server that reads none by the two defaults.

    PEFT reads a pattern's key as a regular expression that must match up to the end of a module's
    name and start at a dot or at its beginning; of full names only the one meant does.
    """
    rank = max(pair.rank for pair in pairs)
    smaller = {pair.module.name: pair.rank for pair in pairs if pair.rank != rank}
    largest = next(pair for pair in pairs if pair.rank == rank)
    return {
        "r": rank,
        "lora_alpha": _plain_number(largest.alpha(use_rslora)),
        "rank_pattern": smaller,
        "alpha_pattern": {
            pair.module.name: _plain_number(pair.alpha(use_rslora))
            for pair in pairs
            if pair.rank != rank
        },
    }


def _plain_number(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _target_modules(
    modules: Sequence[AdaptedModule], heights: Mapping[str, int], base_modules: Sequence[str]
) -> list[str]:
    """Last parts of the names if they select exactly ``modules``, else the full names."""
    names = {module.name for module in modules}
    leaves = {name.rpartition(".")[2] for name in names}
    if base_modules:
        exact = {n for n in base_modules if n.rpartition(".")[2] in leaves} <= names
    else:
        exact = all(
            {m.layer for m in modules if m.path == path} == set(range(height))
            for path, height in heights.items()
        )
    return sorted(leaves) if exact else [module.name for module in modules]
