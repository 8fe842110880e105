"""A finished run to files that other tools read: an adapter for PEFT or llama.cpp, a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from balora_jax.array_types import Array
from balora_jax.config import ModelConfig, RunConfig
from balora_jax.errors import InputError
from balora_jax.io.beside import CARD, OF_A_TOKENIZER, OF_AN_ADAPTER, OURS, Beside, found_beside
from balora_jax.io.gguf_writer import ADAPTER_FILE, MERGE_INSTEAD, Served, export_gguf
from balora_jax.io.hf_export import MergeReport, export_merged, module_deltas
from balora_jax.io.hf_files import CONFIG_FILE, shortened
from balora_jax.io.lora_pairs import ExportReport
from balora_jax.io.peft_reader import ADAPTER_CONFIG, PeftAdapter, read_peft
from balora_jax.io.peft_writer import TokenRows, export_peft
from balora_jax.models.adapters import AdaptedModule
from balora_jax.models.decoder_config import EMBEDDING, DecoderConfig
from balora_jax.models.encoder_config import EncoderConfig
from balora_jax.models.families.base import FAMILIES
from balora_jax.models.starts.stacks import given_factors
from balora_jax.models.structure import structure
from balora_jax.models.weight_names import HEAD_NAME, WeightRule
from balora_jax.models.whole import HEAD_RULE, NOTHING, TOKEN_ROWS, Whole, stored
from balora_jax.parallel import hosts
from balora_jax.pretrained.base_name import BaseName, base_name
from balora_jax.pretrained.card import Subject, card_anew
from balora_jax.pretrained.card_kinds import GGUF, MERGED, Kind
from balora_jax.pretrained.checkpoint import (
    Base,
    EncoderBase,
    head_parts,
    is_encoder,
    open_base,
    open_encoder,
)
from balora_jax.pretrained.load import host_copy
from balora_jax.pretrained.peft_start import peft_modules
from balora_jax.pretrained.peft_whole import saved_whole

ADAPTER, MODEL, BEST = "adapter", "model", "best"
"""Folders of a run: its PEFT adapter, or the checkpoint of a full fine-tuning; either at the step
whose figures were best."""

MARKERS = {"peft": ADAPTER_CONFIG, "merged": CONFIG_FILE, "gguf": ADAPTER_FILE}
"""From the formats of an export to the file by which each is known."""


def write_adapter(
    folder: Path,
    base: Base | EncoderBase,
    name_or_path: str,
    modules: tuple[AdaptedModule, ...],
    trainable: Mapping[str, Array | np.ndarray],
    origin: Mapping[str, Array | np.ndarray],
    *,
    use_rslora: bool,
    revision: str | None = None,
    whole: Whole = NOTHING,
    beside: Beside = MappingProxyType({}),
    overwrite: bool = False,
) -> ExportReport:
    """Write adapters as a PEFT folder on the original base, with all that trained whole."""
    own = host_copy({path: trainable[path] for path in whole.shapes(_frozen(base))})
    apart = {path for path in trainable if path.startswith("head.")} | own.keys()
    rows = own.pop(TOKEN_ROWS, None)
    named = base_name(base.folder, name_or_path, revision)
    return export_peft(
        folder,
        modules=modules,
        adapters=host_copy({p: v for p, v in trainable.items() if p not in apart}),
        origin=host_copy(origin),
        base_name=named.name,
        revision=named.revision,
        task_type=base.family.task_type,
        use_rslora=use_rslora,
        base_modules=[
            *(name for shape in base.linears(_frozen(base)) for name in shape.names),
            *base.family.other_linears,
        ],
        fan_in_fan_out=base.stores_transposed,
        saved=saved_head(base, trainable) | stored(whole, own),
        modules_to_save=(*base.family.head_modules(), *whole.names),
        tokens=_token_rows(base, whole.tokens, rows),
        beside=beside,
        overwrite=overwrite,
    )


def _token_rows(
    base: Base | EncoderBase, ids: tuple[int, ...], rows: np.ndarray | None
) -> TokenRows | None:
    if rows is None:
        return None
    tied = isinstance(base.config, DecoderConfig) and base.config.tie_word_embeddings
    return TokenRows(_table(base), ids, rows, tied)


def _table(base: Base | EncoderBase) -> str:
    """The checkpoint's name of the module of the token embeddings."""
    name = next(rule.name for rule in base.rules if rule.path == EMBEDDING)
    return name.removesuffix(".weight")


def _frozen(base: Base | EncoderBase) -> dict[str, Any]:
    """Shapes of the frozen weights; not to be changed."""
    return _shapes(base.config)


@lru_cache(maxsize=1)
def _shapes(config: DecoderConfig | EncoderConfig) -> dict[str, Any]:
    return structure(config).frozen


def saved_head(
    base: Base | EncoderBase, trainable: Mapping[str, Array | np.ndarray]
) -> dict[str, np.ndarray]:
    """The trained head by checkpoint name, as stored there; empty where there is none."""
    return {rule.name: _stored(rule, trainable[rule.path]) for rule in base.head_rules}


def _settings(base: Base | EncoderBase) -> dict[str, Any]:
    """What a merged ``config.json`` says otherwise than that of the base."""
    untied = {"tie_word_embeddings": False} if base.untied else {}
    return base.family.head_settings(base.config) | untied


def _stored(rule: WeightRule, value: Array | np.ndarray) -> np.ndarray:
    """An array that is not stacked, in the checkpoint's orientation."""
    host = np.asarray(value)
    return np.ascontiguousarray(host.T if rule.transpose else host)


def write_model(
    folder: Path,
    base: Base | EncoderBase,
    trainable: Mapping[str, Array | np.ndarray],
    dtype: str,
    *,
    beside: Beside = MappingProxyType({}),
    overwrite: bool = False,
) -> MergeReport:
    """Write the weights of a full fine-tuning as a checkpoint of the base's layout."""
    changed: dict[str, np.ndarray] = {}
    for rule in base.rules:
        if rule.path not in trainable:
            continue
        value = np.asarray(trainable[rule.path], np.float32)
        layers = value if rule.stacked else [value]
        for name, layer in zip(rule.names(len(value)), layers, strict=True):
            changed[name] = layer.T if rule.transpose else layer
    if isinstance(base.config, DecoderConfig) and base.config.tie_word_embeddings:
        # Some checkpoints store the tied head as well; transformers would not tie what differs.
        changed[HEAD_NAME] = np.asarray(trainable[EMBEDDING], np.float32)
    return export_merged(
        folder,
        source=base.folder,
        deltas=lambda name, _: changed.get(name),
        dtype=dtype,
        rules=base.rules,
        added=saved_head(base, trainable),
        settings=_settings(base),
        beside=beside,
        overwrite=overwrite,
    )


def subject_of(config: RunConfig, base: Base | EncoderBase) -> Subject:
    """What the card of a run is about."""
    model = config.model
    return Subject(
        base_name(base.folder, model.name_or_path, model.revision),
        base.family.task_type,
        getattr(base.config, "num_labels", None),
        {name: getattr(config, name) for name in ("adapter", "regularizers", "training")},
        config.data,
    )


@dataclass(frozen=True)
class _Finished:
    """The adapter of a finished run on its base, with the config that names the base."""

    source: Path
    config: RunConfig
    base: Base | EncoderBase
    peft: PeftAdapter
    modules: tuple[AdaptedModule, ...]
    adapters: dict[str, np.ndarray]

    @property
    def named(self) -> BaseName:
        model = self.config.model
        return base_name(self.base.folder, model.name_or_path, model.revision)


def export_run(
    config: RunConfig,
    workdir: Path,
    out: Path,
    *,
    format: str,
    rank: int | None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Export the adapter of a finished run; returns figures for the report.

    Args:
        config: of the run; names the base.
        workdir: its folder.
        out: new folder.
        format: ``peft``, ``merged`` or ``gguf``.
        rank: recompress every adapter to this rank by SVD (not ``merged``).
        dtype: of the tensors (not ``peft``, which is float32): by default that of the base for
            ``merged``, and float32 for ``gguf``.

    Raises:
        InputError: no finished adapter there, one that the format cannot hold, or an output folder
            that cannot be written.
    """
    source = workdir / ADAPTER
    if not source.is_dir():
        raise InputError(
            f"{workdir}: expected the folder of a finished run with adapter/ in it, got none. "
            "Finish the run (balora train … --resume), or name its --workdir."
        )
    if rank is not None and format == "merged":
        raise InputError(
            "--rank: expected --format peft or gguf, got merged. Leave one of them out."
        )
    if dtype is not None and format == "peft":
        raise InputError(
            "--dtype: expected --format merged or gguf, got peft. Leave one of them out."
        )
    peft = read_peft(source)
    base = _base_of(config.model, peft)
    modules = peft_modules(peft, base.linears(_frozen(base)), str(source))
    adapters = host_copy(given_factors(modules, _frozen(base), peft.tensors, peft.magnitudes))
    finished = _Finished(source, config, base, peft, modules, adapters)
    if format == "merged":
        return _merge(out, finished, dtype)
    write = _to_gguf if format == "gguf" else _to_peft
    report = write(out, finished, rank, dtype or "float32")
    return {
        "folder": str(out),
        "format": format,
        "rank": report.rank,
        "parameters": report.parameters,
        "relative_error": report.error,
    }


def _to_peft(out: Path, run: _Finished, rank: int | None, dtype: str) -> ExportReport:
    """Write a PEFT folder, whose tensors are float32 whatever the dtype."""
    del dtype
    base, peft = run.base, run.peft
    return export_peft(
        out,
        modules=run.modules,
        adapters=run.adapters,
        origin={},
        base_name=run.named.name,
        revision=run.named.revision,
        rank=rank,
        task_type=str(peft.config.get("task_type") or "CAUSAL_LM"),
        use_rslora=bool(peft.config.get("use_rslora")),
        base_modules=[
            *(name for shape in base.linears(_frozen(base)) for name in shape.names),
            *base.family.other_linears,
        ],
        fan_in_fan_out=base.stores_transposed,
        saved={name: value for name, value in peft.saved.items() if name != TOKEN_ROWS},
        modules_to_save=peft.modules_to_save,
        tokens=_token_rows(base, peft.tokens, peft.saved.get(TOKEN_ROWS)),
        beside=_beside(run, rank),
    )


def _to_gguf(out: Path, run: _Finished, rank: int | None, dtype: str) -> ExportReport:
    """Write a folder with a GGUF file.

    Raises:
        InputError: a family that llama.cpp is not known to serve, or anything that trained whole.
    """
    config, layout = run.base.config, run.base.family.gguf
    if layout is None or not isinstance(config, DecoderConfig):
        known = [family.name for family in FAMILIES.values() if family.gguf is not None]
        raise InputError(
            f"{run.base.folder}: expected a family that llama.cpp is known to serve "
            f"({', '.join(known)}), got {config.model_type}. Use the PEFT adapter."
        )
    if run.peft.saved:
        raise InputError(
            f"{run.source}: expected an adapter of linear layers alone, got "
            f"{shortened(sorted(run.peft.saved))}, which trained whole. {MERGE_INSTEAD}"
        )
    url = f"https://huggingface.co/{run.named.name}" if run.named.on_hub else None
    return export_gguf(
        out,
        modules=run.modules,
        adapters=run.adapters,
        base=Served(config, layout, run.named.short, url),
        dtype=dtype,
        rank=rank,
        beside=_ours(run, GGUF, rank),
    )


def _beside(run: _Finished, rank: int | None) -> dict[str, Path | bytes]:
    """What lies beside the adapter of a run, whose card then says that its rank is another."""
    found = found_beside(run.base.folder, OF_A_TOKENIZER) | found_beside(run.source, OF_AN_ADAPTER)
    if rank is not None and CARD in found:
        found[CARD] = (run.source / CARD).read_bytes() + _of_rank(rank)
    return found


def _ours(run: _Finished, kind: Kind, rank: int | None = None) -> dict[str, Path | bytes]:
    """Card and settings of a folder of another kind, as far as the adapter has them.

    A card that somebody else wrote stays there, and that is said.
    """
    found = found_beside(run.source, OURS)
    if CARD not in found:
        return found
    card = (run.source / CARD).read_text(encoding="utf-8", errors="replace")
    text = card_anew(card, subject_of(run.config, run.base), kind)
    if text is None:
        hosts.warn(f"note: {run.source / CARD}: not as it was written by the run; no card of it.")
        del found[CARD]
        return found
    found[CARD] = text.encode() + (b"" if rank is None else _of_rank(rank))
    return found


def _of_rank(rank: int) -> bytes:
    return (
        f"\n## Rank\n\nThis copy was recompressed by SVD: its rank is at most {rank}. Scores "
        "above are those of the whole adapter.\n"
    ).encode()


def _merge(out: Path, run: _Finished, dtype: str | None) -> dict[str, Any]:
    """Write the merged checkpoint; returns figures for the report."""
    base = run.base
    transposed = {module.name for module in run.modules} if base.stores_transposed else ()
    added, settings = _own_tensors(base, run.peft, str(out))
    merged = export_merged(
        out,
        source=base.folder,
        deltas=module_deltas(run.modules, run.adapters, {}, transposed=transposed),
        dtype=dtype,
        rules=base.rules,
        added=added,
        settings=_settings(base) | settings,
        beside=found_beside(run.source, OF_A_TOKENIZER) | _ours(run, MERGED),
    )
    return {
        "folder": str(out),
        "format": "merged",
        "dtype": merged.dtype,
        "files": merged.files,
        "merged_weights": merged.merged,
    }


def _own_tensors(
    base: Base | EncoderBase, peft: PeftAdapter, where: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Whole tensors of a merged checkpoint by name, and what its ``config.json`` says of them."""
    config, whole = saved_whole(peft, base.config, _frozen(base), where)
    added = {name: value for name, value in peft.saved.items() if name != TOKEN_ROWS}
    settings: dict[str, Any] = {}
    if config.vocab_size != base.config.vocab_size:
        settings["vocab_size"] = config.vocab_size
    if not isinstance(base.config, DecoderConfig):
        return added, settings
    if whole.unties or whole.tokens:
        shape = {EMBEDDING: jax.ShapeDtypeStruct(_frozen(base)[EMBEDDING].shape, np.float32)}
        table = np.asarray(base.load(shape)[EMBEDDING])
    if whole.unties:
        settings["tie_word_embeddings"] = False
        added.setdefault(HEAD_RULE.name, table)
    elif base.config.tie_word_embeddings:
        added.pop(HEAD_RULE.name, None)
    if whole.tokens:
        name = f"{_table(base)}.weight"
        added[name] = np.array(added.get(name, table))
        added[name][list(whole.tokens)] = peft.saved[TOKEN_ROWS]
    return added, settings


def _base_of(config: ModelConfig, peft: PeftAdapter) -> Base | EncoderBase:
    name, revision = config.name_or_path, config.revision
    if not is_encoder(name, revision):
        return open_base(name, revision)
    base = open_encoder(name, revision)
    head = head_parts(peft.saved, base.head_rules)
    if "head.out.bias" not in head:
        return base
    return open_encoder(name, revision, num_labels=len(head["head.out.bias"]))
