"""How do adapters leave for PEFT, and how does a PEFT adapter come in?"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from balora_jax.errors import InputError
from balora_jax.io.folders import replaced_folder
from balora_jax.io.hf_files import FLOAT_DTYPES, open_safetensors, read_json, shortened
from balora_jax.models.adapters import AdaptedModule

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_ADAPTER_FILES = {ADAPTER_CONFIG, ADAPTER_WEIGHTS, "README.md"}
_PREFIX = "base_model.model."
_TENSOR = re.compile(rf"{re.escape(_PREFIX)}(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_DTYPES = ("float32", "bfloat16", "float16")
_OFF = (None, False, "none", [], {})
# Settings of PEFT that change what the adapter computes, or on what.
_UNSUPPORTED = (
    "use_dora",
    "bias",
    "lora_bias",
    "modules_to_save",
    "fan_in_fan_out",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "megatron_config",
)
# Starts of PEFT that take the adapter out of the base weights, so that the base is another one.
_RESIDUAL_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        folder: the adapter folder.
        modules: adapted linear layers in it.
        parameters: numbers in its tensors.
        rank: largest rank in it (twice the trained rank where the start is not zero).
        errors: relative Frobenius error of each recompressed module's delta, by checkpoint name;
            empty where nothing was recompressed.
        error: the same over all modules together.
    """

    folder: Path
    modules: int
    parameters: int
    rank: int
    errors: dict[str, float] = field(default_factory=dict)
    error: float = 0.0


@dataclass(frozen=True)
class PeftAdapter:
    """A LoRA adapter as PEFT saved it, in this project's orientation.

    Attributes:
        config: its ``adapter_config.json``.
        tensors: module name in the checkpoint → (A [in, R], B [R, out]), float32.
        ranks: module name → R.
        alphas: module name → alpha.
        scales: module name → the factor on ``A B``.
    """

    config: dict[str, Any]
    tensors: dict[str, tuple[np.ndarray, np.ndarray]]
    ranks: dict[str, int]
    alphas: dict[str, float]
    scales: dict[str, float]


@dataclass(frozen=True)
class _Pair:
    """One module ready to be written: delta = scale · down @ up."""

    module: AdaptedModule
    down: np.ndarray
    up: np.ndarray
    lost: float = 0.0
    whole: float = 0.0

    @property
    def rank(self) -> int:
        return self.down.shape[1]

    def alpha(self, use_rslora: bool) -> float:
        """Numerator from which PEFT computes this module's scale."""
        divisor = math.sqrt(self.rank) if use_rslora else self.rank
        exact = self.module.alpha / divisor  # keep the user's alpha where it is already right
        same = math.isclose(exact, self.module.scale, rel_tol=1e-9)
        return float(self.module.alpha if same else self.module.scale * divisor)


def delta_pair(
    module: AdaptedModule, adapters: Mapping[str, Any], origin: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Low-rank factors (down [in, r], up [r, out]) with ``delta = scale · down @ up``, float32.

    Without an origin these are A and B cut to the module's true rank. With an origin the rank
    doubles: ``A B − A₀ B₀ = [A − A₀, A₀] [B; B − B₀]``.

    Source: PiSSA (arXiv 2404.02948) converts with ``[A, A₀] [B; −B₀]``; the same sum, but there two
    large products cancel, here every product is as small as the update.
    """

    def factor(arrays: Mapping[str, Any], key: str) -> np.ndarray:
        return np.asarray(arrays[f"{module.path}.{key}"][module.layer], np.float32)

    down = factor(adapters, "lora_a")[:, : module.rank]
    up = factor(adapters, "lora_b")[: module.rank]
    if f"{module.path}.origin_a" not in origin:
        return down, up
    down0 = factor(origin, "origin_a")[:, : module.rank]
    up0 = factor(origin, "origin_b")[: module.rank]
    return np.concatenate([down - down0, down0], 1), np.concatenate([up, up - up0], 0)


def recompress(
    down: np.ndarray, up: np.ndarray, rank: int
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Best factors of a smaller rank for ``down @ up``, without forming that product.

    Args:
        down: [in, r].
        up: [r, out].
        rank: rank wanted, at most r.

    Returns:
        down [in, rank] and up [rank, out] in float32, and the Frobenius norms of what is lost and
        of the whole. Source: Eckart-Young, through the QR factors of both sides in float64.

    >>> down, up, lost, whole = recompress(np.eye(3, 2), np.array([[4.0, 0], [0, 3]]), 1)
    >>> np.abs(down @ up).round(6).tolist(), round(lost, 6), round(whole, 6)
    ([[4.0, 0.0], [0.0, 0.0], [0.0, 0.0]], 3.0, 5.0)
    """
    q_down, r_down = np.linalg.qr(down.astype(np.float64))
    q_up, r_up = np.linalg.qr(up.astype(np.float64).T)
    u, sigma, vt = np.linalg.svd(r_down @ r_up.T, full_matrices=False)
    root = np.sqrt(sigma[:rank])
    small_down = (q_down @ (u[:, :rank] * root)).astype(np.float32)
    small_up = ((root[:, None] * vt[:rank]) @ q_up.T).astype(np.float32)
    return small_down, small_up, _norm(sigma[rank:]), _norm(sigma)


def _norm(values: np.ndarray) -> float:
    return float(np.sqrt(np.sum(np.square(values))))


def export_peft(
    folder: str | Path,
    *,
    modules: Sequence[AdaptedModule],
    adapters: Mapping[str, Any],
    origin: Mapping[str, Any],
    base_name: str,
    rank: int | None = None,
    task_type: str = "CAUSAL_LM",
    use_rslora: bool = False,
    base_modules: Sequence[str] = (),
    dtype: str = "float32",
    overwrite: bool = False,
) -> ExportReport:
    """Write a folder that ``peft`` loads onto the untouched base model.

    Starts without origin keep rank, alpha and ``use_rslora``. Starts with origin, and recompressed
    modules, become plain LoRA with alpha = scale · (rank written): the same factor, exactly.

    Args:
        folder: new or empty folder; it appears complete or not at all.
        modules: the adapted layers.
        adapters: ``path.lora_a`` [L, in, R] and ``path.lora_b`` [L, R, out] (host or local device).
        origin: ``path.origin_a`` and ``path.origin_b`` likewise; empty for starts at zero.
        base_name: Hub name or folder of the base model, written for ``AutoPeftModel``.
        rank: recompress every larger module to this rank.
        task_type: PEFT's task type.
        use_rslora: the modules' scale is alpha / sqrt(rank).
        base_modules: names of all linear layers of the base; with them, ``target_modules`` becomes
            a short suffix list wherever that names exactly ``modules``. Without them suffixes are
            used when every layer of each stack is adapted.
        dtype: of the tensors, ``float32``, ``bfloat16`` or ``float16``.
        overwrite: replace an adapter folder that is already there.

    Raises:
        InputError: nothing to export, a rank below 1, an unknown dtype, or a folder that may not
            be written.
    """
    if not modules:
        raise InputError(f"{folder}: expected adapted layers to export, got none. Train some.")
    if rank is not None and rank < 1:
        raise InputError(f"rank: expected at least 1, got {rank}. Choose a rank to recompress to.")
    if dtype not in _DTYPES:
        raise InputError(
            f"dtype: expected one of {', '.join(_DTYPES)}, got {dtype!r}. Choose one of them."
        )
    target = Path(folder)
    use_rslora = use_rslora and rank is None and not origin
    with replaced_folder(target, may_replace=lambda old: overwrite and _is_adapter(old)) as draft:
        pairs = [_pair(module, adapters, origin, rank) for module in modules]
        heights = {m.path: len(adapters[f"{m.path}.lora_a"]) for m in modules}
        config = {
            "peft_type": "LORA",
            "task_type": task_type,
            "base_model_name_or_path": base_name,
            "inference_mode": True,
            "target_modules": _target_modules(modules, heights, base_modules),
            **_ranks_and_alphas(pairs, use_rslora),
            "use_rslora": use_rslora,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
        }
        (draft / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _save(draft / ADAPTER_WEIGHTS, pairs, np.dtype(dtype))
    return _report(target, pairs, recompressed=rank is not None)


def _is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and nothing that overwriting it would lose."""
    names = {path.name for path in folder.iterdir()}
    return ADAPTER_CONFIG in names and names <= _ADAPTER_FILES


def _pair(
    module: AdaptedModule,
    adapters: Mapping[str, Any],
    origin: Mapping[str, Any],
    rank: int | None,
) -> _Pair:
    down, up = delta_pair(module, adapters, origin)
    if rank is None:
        return _Pair(module, down, up)
    small_down, small_up, lost, whole = recompress(down, up, rank)
    lost, whole = lost * module.scale, whole * module.scale
    if down.shape[1] <= rank:
        return _Pair(module, down, up, 0.0, whole)
    return _Pair(module, small_down, small_up, lost, whole)


def _report(folder: Path, pairs: Sequence[_Pair], recompressed: bool) -> ExportReport:
    whole = _norm(np.array([pair.whole for pair in pairs]))
    lost = _norm(np.array([pair.lost for pair in pairs]))
    errors = {p.module.name: p.lost / p.whole if p.whole else 0.0 for p in pairs}
    return ExportReport(
        folder=folder,
        modules=len(pairs),
        parameters=sum(pair.down.size + pair.up.size for pair in pairs),
        rank=max(pair.rank for pair in pairs),
        errors=errors if recompressed else {},
        error=lost / whole if whole else 0.0,
    )


def _save(file: Path, pairs: Sequence[_Pair], dtype: np.dtype) -> None:
    tensors: dict[str, np.ndarray] = {}
    for pair in pairs:
        key = f"{_PREFIX}{pair.module.name}"
        tensors[f"{key}.lora_A.weight"] = np.ascontiguousarray(pair.down.T.astype(dtype))
        tensors[f"{key}.lora_B.weight"] = np.ascontiguousarray(pair.up.T.astype(dtype))
    save_file(tensors, file, metadata={"format": "pt"})


def _ranks_and_alphas(pairs: Sequence[_Pair], use_rslora: bool) -> dict[str, Any]:
    """The commonest rank and alpha as defaults, and the exact names of the modules that differ.

    PEFT reads a pattern's key as a regular expression that must match up to the end of a module's
    name and start at a dot or at its beginning; of full names only the one meant does.
    """
    ranks = {pair.module.name: pair.rank for pair in pairs}
    alphas = {pair.module.name: _plain_number(pair.alpha(use_rslora)) for pair in pairs}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
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


def read_peft(folder: str | Path) -> PeftAdapter:
    """Read a LoRA adapter that PEFT (or :func:`export_peft`) saved.

    Raises:
        InputError: not an adapter folder, pickled weights, another method than LoRA, a setting
            that changes what the adapter computes, a start that needs another base, or tensors
            that do not fit together or to the config.
    """
    folder = Path(folder)
    _check_adapter_folder(folder)
    config = read_json(folder / ADAPTER_CONFIG)
    _check_settings(folder / ADAPTER_CONFIG, config)
    tensors = _read_pairs(folder / ADAPTER_WEIGHTS)
    ranks = {name: down.shape[1] for name, (down, _) in tensors.items()}
    alphas: dict[str, float] = {}
    scales: dict[str, float] = {}
    for name, rank in ranks.items():
        declared = _setting(folder, config, "r", "rank_pattern", name)
        if declared != rank:
            raise InputError(
                f"{folder}: expected rank {declared:g} for {name} as {ADAPTER_CONFIG} says, got "
                f"{rank} in {ADAPTER_WEIGHTS}. Use the two files that were saved together."
            )
        alphas[name] = _setting(folder, config, "lora_alpha", "alpha_pattern", name)
        scales[name] = alphas[name] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return PeftAdapter(config, tensors, ranks, alphas, scales)


def _check_adapter_folder(folder: Path) -> None:
    if not (folder / ADAPTER_CONFIG).is_file():
        raise InputError(
            f"{folder}: expected a PEFT adapter folder with {ADAPTER_CONFIG}, got none. "
            "Check the path."
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise InputError(
            f"{folder}: expected {ADAPTER_WEIGHTS}, got "
            f"{'only adapter_model.bin' if pickled else 'no weights'}. Load it in PEFT and save it "
            "again with model.save_pretrained(folder, safe_serialization=True)."
        )


def _check_settings(file: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise InputError(
            f"{file}: expected peft_type LORA, got {config.get('peft_type')!r}. "
            "Start from a LoRA adapter."
        )
    for key in _UNSUPPORTED:
        if config.get(key) not in _OFF:
            raise InputError(
                f"{file}: expected plain LoRA, got {key}={config[key]!r}, which changes what the "
                "adapter computes and is not supported. Start from an adapter without it."
            )
    start = config.get("init_lora_weights", True)
    if str(start).lower().startswith(_RESIDUAL_STARTS):
        raise InputError(
            f"{file}: expected an adapter of the original base, got init_lora_weights={start!r}, "
            "which belongs to a modified base. Convert it in PEFT: model.save_pretrained(folder, "
            "path_initial_model_for_weight_conversion=initial_adapter)."
        )


def _read_pairs(file: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    found: dict[str, dict[str, np.ndarray]] = {}
    with open_safetensors(file) as handle:
        names = sorted(handle.keys())
        strange = [name for name in names if not _TENSOR.fullmatch(name)]
        strange += [n for n in names if handle.get_slice(n).get_dtype() not in FLOAT_DTYPES]
        if strange or not names:
            raise InputError(
                f"{file}: expected floating-point lora_A and lora_B weights of linear layers only, "
                f"got {shortened(strange) or 'no tensors'}. Start from a plain LoRA adapter."
            )
        for name in names:
            match = _TENSOR.fullmatch(name)
            assert match is not None
            value = handle.get_tensor(name).astype(np.float32)
            found.setdefault(match["module"], {})[match["side"]] = value
    for module, sides in found.items():
        shapes = {side: list(value.shape) for side, value in sides.items()}
        whole = sides.keys() == {"A", "B"} and all(v.ndim == 2 for v in sides.values())
        if not whole or sides["A"].shape[0] != sides["B"].shape[1]:
            raise InputError(
                f"{file}: expected lora_A [r, in] and lora_B [out, r] for {module}, got {shapes}. "
                "Save the adapter again."
            )
    return {
        module: (np.ascontiguousarray(sides["A"].T), np.ascontiguousarray(sides["B"].T))
        for module, sides in found.items()
    }


def _setting(folder: Path, config: Mapping[str, Any], key: str, pattern: str, name: str) -> float:
    """A module's rank or alpha; the first pattern that matches its name wins, as in PEFT."""
    value = config.get(key)
    for expression, special in (config.get(pattern) or {}).items():
        try:
            matches = re.match(rf"(.*\.)?({expression})$", name)
        except re.error as error:
            raise InputError(
                f"{folder / ADAPTER_CONFIG}: expected regular expressions in {pattern}, got "
                f"{expression!r} ({error}). Correct it."
            ) from error
        if matches:
            value = special
            break
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(
            f"{folder / ADAPTER_CONFIG}: expected a number for {key}, got {value!r}. Correct it."
        )
    return float(value)
