"""Reading of PEFT adapters."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from balora_jax.errors import InputError
from balora_jax.io.hf_files import FLOAT_DTYPES, open_safetensors, shortened
from balora_jax.models.methods.dora import DORA
from balora_jax.models.methods.lora import LORA
from balora_jax.models.methods.method import Method
from balora_jax.models.whole import TOKEN_ROWS, belongs_to
from balora_jax.parallel import hosts
from balora_jax.untyped.fields import Fields
from balora_jax.untyped.json_text import read_object
from balora_jax.untyped.patterns import end_match
from balora_jax.untyped.shown import shown

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
LARGEST = 2**31
MAGNITUDE = "lora_magnitude_vector"

_TENSOR = re.compile(
    rf"{re.escape(PREFIX)}(?P<module>.+)\.(lora_(?P<side>[AB])\.weight|{MAGNITUDE})"
)
ROWS = "token_adapter.trainable_tokens_delta"
UNDER_ROWS = "token_adapter.base_layer.weight"
"""Of the module of a table: its rows that train alone, and the whole table below them."""

_HEAD_ROWS = f"lm_head.{ROWS}"
_ROWS = re.compile(rf"(.+\.)?(embed_tokens|wte)\.{re.escape(ROWS)}")
_WRAPPED = re.compile(r"\.(modules_to_save(\.default)?|original_module)(?=\.)")
_TABLE = re.compile(r"(^|\.)(embed_tokens|wte|lm_head|(word|tok)_embeddings)\.weight$")
_OFF = (None, False, "none", [], {})
# Settings of PEFT that change what the adapter computes, or on what.
_UNSUPPORTED = (
    "bias",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "megatron_config",
)
# The others, which say where an adapter came from, how it was begun or how it trains.
_UNDERSTOOD = {
    *_UNSUPPORTED,
    *("peft_type", "task_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("use_dora", "fan_in_fan_out", "target_modules", "exclude_modules", "modules_to_save"),
    *("trainable_token_indices", "layers_to_transform", "layers_pattern", "init_lora_weights"),
    *("base_model_name_or_path", "revision", "peft_version", "auto_mapping", "inference_mode"),
    *("lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("runtime_config", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
    *("velora_config", "bias"),
}
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
        saved: other tensors that were trained whole (``modules_to_save``, or the tables of a
            resized vocabulary), by checkpoint name, float32, in PEFT's orientation; rows of single
            tokens under ``TOKEN_ROWS``.
        tokens: ids of these rows.
    """

    config: dict[str, Any]
    tensors: dict[str, tuple[np.ndarray, np.ndarray]]
    ranks: dict[str, int]
    alphas: dict[str, float]
    scales: dict[str, float]
    magnitudes: dict[str, np.ndarray] = field(default_factory=dict)
    method: Method = LORA
    saved: dict[str, np.ndarray] = field(default_factory=dict)
    tokens: tuple[int, ...] = ()

    @property
    def modules_to_save(self) -> tuple[str, ...]:
        """Names of the modules that trained whole."""
        return tuple(self.config.get("modules_to_save") or ())


def read_peft(folder: str | Path) -> PeftAdapter:
    """Read a LoRA adapter that PEFT (or :func:`export_peft`) saved.

    Raises:
        InputError: not an adapter folder, pickled weights, another method than LoRA, a setting
            that changes what the adapter computes, a start that needs another base, or tensors
            that do not fit together or to the config.
    """
    folder = Path(folder)
    _check_adapter_folder(folder)
    config = Fields(
        read_object(folder / ADAPTER_CONFIG), str(folder / ADAPTER_CONFIG), "Correct the file."
    )
    _check_settings(config)
    ranks_of = _Settings(config, "r", "rank_pattern", whole=True)
    alphas_of = _Settings(config, "lora_alpha", "alpha_pattern", whole=False)
    use_dora, use_rslora = (config.flag(key, default=False) for key in ("use_dora", "use_rslora"))
    found = _read_tensors(folder / ADAPTER_WEIGHTS, config.texts("modules_to_save"))
    tokens = _token_ids(config, found)
    pairs, magnitudes = _pairs(folder / ADAPTER_WEIGHTS, found.parts, use_dora)
    ranks = {name: down.shape[1] for name, (down, _) in pairs.items()}
    for name, rank in ranks.items():
        if ranks_of.of(name) != rank:
            raise InputError(
                f"{folder}: expected rank {ranks_of.of(name):g} for {name} as {ADAPTER_CONFIG} "
                f"says, got {rank} in {ADAPTER_WEIGHTS}. Use the two files that were saved "
                "together."
            )
    alphas = {name: float(alphas_of.of(name)) for name in ranks}
    scales = {
        name: a / (math.sqrt(ranks[name]) if use_rslora else ranks[name])
        for name, a in alphas.items()
    }
    method = DORA if magnitudes else LORA
    return PeftAdapter(
        dict(config.values), pairs, ranks, alphas, scales, magnitudes, method, found.saved, tokens
    )


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


def _check_settings(config: Fields) -> None:
    kind = config.values.get("peft_type")
    if kind != "LORA":
        raise InputError(
            f"{config.where}: expected peft_type LORA, got {shown(kind)}. Start from a LoRA "
            "adapter."
        )
    for key in _UNSUPPORTED:
        if config.values.get(key) not in _OFF:
            raise InputError(
                f"{config.where}: expected plain LoRA, got {key}={shown(config.values[key])}, "
                "which changes what the adapter computes and is not supported. Start from an "
                "adapter without it."
            )
    unknown = [key for key, value in config.values.items() if key not in _UNDERSTOOD]
    unknown = [key for key in unknown if config.values[key] not in _OFF]
    if unknown:
        hosts.warn(
            f"note: {config.where}: keys that this version does not know are not read: "
            f"{', '.join(map(shown, unknown[:20]))}."
        )
    start = config.values.get("init_lora_weights", True)
    if str(start).lower().startswith(_RESIDUAL_STARTS):
        raise InputError(
            f"{config.where}: expected an adapter of the original base, got init_lora_weights="
            f"{shown(start)}, which belongs to a modified base. Convert it in PEFT: "
            "model.save_pretrained(folder, "
            "path_initial_model_for_weight_conversion=initial_adapter)."
        )


@dataclass
class _Found:
    """Tensors of a file: by module and part, and those of ``modules_to_save`` by name.

    ``rows_of`` is the module whose rows train alone.
    """

    parts: dict[str, dict[str, np.ndarray]]
    saved: dict[str, np.ndarray]
    rows_of: str = ""


def _read_tensors(file: Path, modules_to_save: Sequence[str]) -> _Found:
    found = _Found({}, {})
    strange: list[str] = []
    with open_safetensors(file) as handle:
        names = set(handle.keys())
        for name in sorted(names):
            if (usual := _WRAPPED.sub("", name)) != name and usual in names:
                continue  # PEFT writes some tensors again by the names of its wrappers
            match, plain = _TENSOR.fullmatch(name), name.removeprefix(PREFIX)
            if _ROWS.fullmatch(plain):
                found.rows_of, plain = plain.removesuffix(f".{ROWS}"), TOKEN_ROWS
            plain = plain.replace(UNDER_ROWS, "weight")
            kept = plain in (TOKEN_ROWS, _HEAD_ROWS) or (
                plain != name and is_saved(plain, modules_to_save)
            )
            if not (match or kept) or handle.get_slice(name).get_dtype() not in FLOAT_DTYPES:
                strange.append(name)
                continue
            value = handle.get_tensor(name).astype(np.float32)
            if not np.isfinite(value).all():
                raise InputError(
                    f"{file}: expected finite numbers, got {name} with NaN or infinity. Use an "
                    "adapter whose training did not diverge."
                )
            if match:
                part = match["side"] or MAGNITUDE
                found.parts.setdefault(match["module"], {})[part] = value
            else:
                found.saved[plain] = value
    # A tied head has the rows of the embeddings.
    rows = found.saved.pop(_HEAD_ROWS, None)
    if rows is not None and not np.array_equal(rows, found.saved.get(TOKEN_ROWS, [])):
        strange.append(PREFIX + _HEAD_ROWS)
    if strange or not found.parts:
        raise InputError(
            f"{file}: expected floating-point lora_A and lora_B weights of linear layers only, "
            f"got {shortened(strange) or 'no tensors'}. Start from a plain LoRA adapter."
        )
    return found


def is_saved(tensor: str, modules_to_save: Sequence[str]) -> bool:
    """Whether PEFT saves a tensor whole beside the factors, by its name in the checkpoint.

    The tables of a resized vocabulary are saved without a word of their modules.

    >>> is_saved("model.norm.weight", ["norm"]), is_saved("model.norm.weight", [])
    (True, False)
    >>> is_saved("lm_head.weight", [])
    True
    """
    return belongs_to(tensor, modules_to_save) or _TABLE.search(tensor) is not None


def _token_ids(config: Fields, found: _Found) -> tuple[int, ...]:
    """Ids of the rows of the token embeddings that trained alone."""
    given = config.values.get("trainable_token_indices")
    ids, of_table = given or [], True
    if isinstance(given, dict) and len(given) == 1:
        ((table, ids),) = given.items()
        of_table = f".{found.rows_of}".endswith(f".{table}")
    rows = found.saved.get(TOKEN_ROWS)
    fits = isinstance(ids, list) and all(type(one) is int and 0 <= one < LARGEST for one in ids)
    if not fits or len(set(ids)) < len(ids) or (rows is None) != (not ids) or not of_table:
        fits = False
    if not fits or (rows is not None and (rows.ndim != 2 or len(rows) != len(ids))):
        raise InputError(
            f"{config.where}: expected trainable_token_indices of one table, different ids with a "
            f"row each in {ADAPTER_WEIGHTS}, got {shown(given)} and "
            f"{'no rows' if rows is None else f'rows of {found.rows_of}'}. Use the two files that "
            "were saved together."
        )
    if rows is not None and belongs_to(f"{found.rows_of}.weight", config.texts("modules_to_save")):
        raise InputError(
            f"{config.where}: expected {found.rows_of} to train whole or by rows, got it in "
            "modules_to_save and in trainable_token_indices. Leave one of them out when the "
            "adapter is trained."
        )
    return tuple(ids)


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


class _Settings:
    """Ranks or alphas by module: the first pattern that matches its name wins, as in PEFT."""

    def __init__(self, config: Fields, key: str, pattern: str, *, whole: bool) -> None:
        least = 1 if whole else -LARGEST
        default = config.integer if whole else config.number
        self._default = default(key, least=least, most=LARGEST)
        numbers = config.numbers(pattern, least=least, most=LARGEST, whole=whole)
        where = f"{config.where}: {pattern}"
        self._special = [(end_match(text, where), value) for text, value in numbers.items()]

    def of(self, module: str) -> float:
        """The value of a module by its name."""
        return next((value for matches, value in self._special if matches(module)), self._default)
