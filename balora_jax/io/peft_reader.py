"""Reading of PEFT adapters."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from balora_jax.errors import InputError
from balora_jax.io.hf_files import FLOAT_DTYPES, open_safetensors, read_json, shortened
from balora_jax.models.methods.dora import DORA
from balora_jax.models.methods.lora import LORA
from balora_jax.models.methods.method import Method

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"

_TENSOR = re.compile(
    rf"{re.escape(PREFIX)}(?P<module>.+)\.(lora_(?P<side>[AB])\.weight|{MAGNITUDE})"
)
_OFF = (None, False, "none", [], {})
# Settings of PEFT that change what the adapter computes, or on what.
_UNSUPPORTED = (
    "bias",
    "lora_bias",
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
class PeftAdapter:
    """A LoRA adapter as PEFT saved it, in this project's orientation.

    Attributes:
        config: its ``adapter_config.json``.
        tensors: module name in the checkpoint → (A [in, R], B [R, out]), float32.
        ranks: module name → R.
        alphas: module name → alpha.
        scales: module name → the factor on ``A B``.
        magnitudes: module name → DoRA's length of every output's weights, [out] float32; empty for
            plain LoRA.
        method: what it trained.
        saved: other tensors that were trained whole (``modules_to_save``), by checkpoint name,
            float32, in PEFT's orientation.
    """

    config: dict[str, Any]
    tensors: dict[str, tuple[np.ndarray, np.ndarray]]
    ranks: dict[str, int]
    alphas: dict[str, float]
    scales: dict[str, float]
    magnitudes: dict[str, np.ndarray] = field(default_factory=dict)
    method: Method = LORA
    saved: dict[str, np.ndarray] = field(default_factory=dict)


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
    found = _read_tensors(folder / ADAPTER_WEIGHTS, config.get("modules_to_save") or ())
    pairs, magnitudes = _pairs(folder / ADAPTER_WEIGHTS, found.parts, bool(config.get("use_dora")))
    ranks = {name: down.shape[1] for name, (down, _) in pairs.items()}
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
    method = DORA if magnitudes else LORA
    return PeftAdapter(config, pairs, ranks, alphas, scales, magnitudes, method, found.saved)


def belongs_to(tensor: str, modules_to_save: Sequence[str]) -> bool:
    """Whether a tensor lies in one of the modules, named as PEFT names them: by their ends.

    >>> belongs_to("bert.pooler.dense.bias", ["pooler"]), belongs_to("bert.dense.bias", ["pooler"])
    (True, False)
    """
    parts = tensor.split(".")
    parents = [".".join(parts[:i]) for i in range(1, len(parts))]
    return any(parent.endswith(name) for parent in parents for name in modules_to_save)


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


@dataclass(frozen=True)
class _Found:
    """Tensors of a file: by module and part, and those of ``modules_to_save`` by name."""

    parts: dict[str, dict[str, np.ndarray]]
    saved: dict[str, np.ndarray]


def _read_tensors(file: Path, modules_to_save: Sequence[str]) -> _Found:
    found = _Found({}, {})
    strange: list[str] = []
    with open_safetensors(file) as handle:
        for name in sorted(handle.keys()):
            match, plain = _TENSOR.fullmatch(name), name.removeprefix(PREFIX)
            kept = plain != name and belongs_to(plain, modules_to_save)
            if not (match or kept) or handle.get_slice(name).get_dtype() not in FLOAT_DTYPES:
                strange.append(name)
                continue
            value = handle.get_tensor(name).astype(np.float32)
            if match:
                part = match["side"] or MAGNITUDE
                found.parts.setdefault(match["module"], {})[part] = value
            else:
                found.saved[plain] = value
    if strange or not found.parts:
        raise InputError(
            f"{file}: expected floating-point lora_A and lora_B weights of linear layers only, "
            f"got {shortened(strange) or 'no tensors'}. Start from a plain LoRA adapter."
        )
    return found


def _pairs(
    file: Path, parts: Mapping[str, Mapping[str, np.ndarray]], use_dora: bool
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], dict[str, np.ndarray]]:
    """Factors and magnitudes in our orientation, after checking that they fit together."""
    expected = {"A", "B", MAGNITUDE} if use_dora else {"A", "B"}
    for module, named in parts.items():
        fits = named.keys() == expected and named["A"].ndim == named["B"].ndim == 2
        fits = fits and named["A"].shape[0] == named["B"].shape[1]
        if not fits or (use_dora and named[MAGNITUDE].shape != named["B"].shape[:1]):
            shapes = {part: list(value.shape) for part, value in named.items()}
            raise InputError(
                f"{file}: expected lora_A [r, in] and lora_B [out, r]"
                f"{f' and {MAGNITUDE} [out]' if use_dora else ''} for {module}, got {shapes}. "
                "Save the adapter again."
            )
    factors = {
        module: (np.ascontiguousarray(p["A"].T), np.ascontiguousarray(p["B"].T))
        for module, p in parts.items()
    }
    return factors, {module: p[MAGNITUDE] for module, p in parts.items() if use_dora}


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
