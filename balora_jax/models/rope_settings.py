"""Rotary settings of a checkpoint's ``config.json``, in the older and the newer style."""

import math
from collections.abc import Mapping
from typing import Any, get_args

from balora_jax.errors import InputError
from balora_jax.models.rotary import RopeConfig, RopeKind


def rope_config(
    raw: Mapping[str, Any], where: str, *, default_theta: float = 10000.0
) -> RopeConfig:
    """Rotary settings from ``rope_parameters`` (new) or ``rope_theta`` and ``rope_scaling``.

    Raises:
        InputError: a kind of scaling that this code lacks, or one without what it needs.
    """
    scaling = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    # Phi-3's first checkpoints say "su".
    kind = "longrope" if kind == "su" else kind
    _check_rope(scaling, kind, where)
    theta = float(scaling.get("rope_theta") or raw.get("rope_theta") or default_theta)
    partial = scaling.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
    rotary_dim = None if partial == 1.0 else int(_head_dim(raw) * partial)
    if kind == "default":
        return RopeConfig(theta=theta, rotary_dim=rotary_dim)
    if kind == "longrope":
        return _longrope(raw, scaling, theta, rotary_dim, where)
    original = _original_length(raw, scaling, kind)
    factor = scaling.get("factor")
    if factor is None and kind == "yarn":
        factor = raw.get("max_position_embeddings", 2048) / original
    if factor is None:
        raise InputError(
            f"{where}: expected a 'factor' in the rope scaling of type {kind!r}, got none. "
            "Correct the config."
        )
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=float(factor),
        original_length=int(original),
        low_freq_factor=float(scaling.get("low_freq_factor", 1.0)),
        high_freq_factor=float(scaling.get("high_freq_factor", 4.0)),
        beta_fast=float(scaling.get("beta_fast") or 32.0),
        beta_slow=float(scaling.get("beta_slow") or 1.0),
        attention_factor=_attention_factor(scaling, kind, float(factor)),
        truncate=bool(scaling.get("truncate", True)),
        rotary_dim=rotary_dim,
    )


def rope_by_layer(
    raw: Mapping[str, Any], where: str, *, default_theta: float, default_local_theta: float
) -> tuple[RopeConfig, RopeConfig]:
    """Rotary settings of the layers that see everything and of those with a window (Gemma 3).

    The older style scales the former only and gives the latter ``rope_local_base_freq``.
    """
    tables = raw.get("rope_parameters") or {}
    if not any(isinstance(value, Mapping) for value in tables.values()):
        local = {"rope_theta": raw.get("rope_local_base_freq")}
        return (
            rope_config(raw, where, default_theta=default_theta),
            rope_config(local, where, default_theta=default_local_theta),
        )
    rest = {key: value for key, value in raw.items() if not key.startswith("rope_")}
    full = rest | {"rope_parameters": tables.get("full_attention")}
    local = rest | {"rope_parameters": tables.get("sliding_attention")}
    return (
        rope_config(full, where, default_theta=default_theta),
        rope_config(local, where, default_theta=default_local_theta),
    )


def _longrope(
    raw: Mapping[str, Any],
    scaling: Mapping[str, Any],
    theta: float,
    rotary_dim: int | None,
    where: str,
) -> RopeConfig:
    """LongRoPE's two sets of divisors. Source: arXiv 2402.13753, as ``transformers`` reads it."""
    pairs = (rotary_dim or _head_dim(raw)) // 2
    for key in ("short_factor", "long_factor"):
        if len(scaling.get(key) or ()) != pairs:
            raise InputError(
                f"{where}: expected {pairs} numbers in {key!r} of the rope scaling, got "
                f"{len(scaling.get(key) or ())}. Correct the config."
            )
    original = _original_length(raw, scaling, "longrope")
    factor = raw["max_position_embeddings"] / original
    attention = scaling.get("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1.0 else math.sqrt(1.0 + math.log(factor) / math.log(original))
    return RopeConfig(
        theta=theta,
        kind="longrope",
        factor=factor,
        original_length=original,
        attention_factor=float(attention),
        short_factor=tuple(float(x) for x in scaling["short_factor"]),
        long_factor=tuple(float(x) for x in scaling["long_factor"]),
        rotary_dim=rotary_dim,
    )


def _head_dim(raw: Mapping[str, Any]) -> int:
    return raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]


def _check_rope(scaling: Mapping[str, Any], kind: str, where: str) -> None:
    """Refuse what would be silently misread: another type, or tables for each kind of layer."""
    if any(isinstance(value, Mapping) for value in scaling.values()):
        raise InputError(
            f"{where}: expected one set of rope parameters, got one for each kind of layer "
            f"({', '.join(scaling)}). This checkpoint cannot be run exactly."
        )
    known = get_args(RopeKind)
    if kind not in known:
        raise InputError(
            f"{where}: expected the rope type to be one of {', '.join(known)}, got {kind!r}. "
            "This checkpoint cannot be run exactly."
        )


def _original_length(raw: Mapping[str, Any], scaling: Mapping[str, Any], kind: str) -> int:
    """Context of pretraining; as in transformers, ``dynamic`` measures from the configured one."""
    context = raw.get("max_position_embeddings", 2048)
    if kind == "dynamic":
        return context
    key = "original_max_position_embeddings"
    return raw.get(key) or scaling.get(key) or context


def _attention_factor(scaling: Mapping[str, Any], kind: str, factor: float) -> float:
    """YaRN's temperature on cos and sin. Source: the YaRN paper; DeepSeek's two mscales."""
    if kind != "yarn":
        return 1.0
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return mscale(float(scaling["mscale"])) / mscale(float(scaling["mscale_all_dim"]))
    return mscale(1.0)
