"""Rotary settings of a checkpoint's ``config.json``, in the older and the newer style."""

import math
from collections.abc import Mapping
from typing import cast, get_args

from balora_jax.errors import InputError
from balora_jax.models.rotary import RopeConfig, RopeKind
from balora_jax.models.sizes import HEADS, WIDTH
from balora_jax.untyped.fields import Fields

LARGEST_THETA = 1e15


def rope_config(raw: Fields, *, default_theta: float = 10000.0) -> RopeConfig:
    """Rotary settings from ``rope_parameters`` (new) or ``rope_theta`` and ``rope_scaling``.

    Raises:
        InputError: a kind of scaling that this code lacks, or one without what it needs.
    """
    scaling = Fields(
        {**raw.section("rope_scaling"), **raw.section("rope_parameters")}, f"{raw.where}, rope"
    )
    kind = _kind(raw, scaling)
    theta = _first("rope_theta", scaling, raw, default=default_theta, most=LARGEST_THETA)
    partial = _first("partial_rotary_factor", scaling, raw, default=1.0, most=1.0)
    rotary_dim = None if partial == 1.0 else int(_head_dim(raw) * partial)
    if kind == "default":
        return RopeConfig(theta=theta, rotary_dim=rotary_dim)
    if kind == "longrope":
        return _longrope(raw, scaling, theta, rotary_dim)
    original, factor = _original_length(raw, scaling, kind), _factor(raw, scaling, kind)
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=factor,
        original_length=original,
        low_freq_factor=scaling.number("low_freq_factor", 1.0),
        high_freq_factor=scaling.number("high_freq_factor", 4.0),
        beta_fast=_first("beta_fast", scaling, default=32.0),
        beta_slow=_first("beta_slow", scaling, default=1.0),
        attention_factor=_attention_factor(scaling, kind, factor),
        truncate=scaling.flag("truncate", default=True),
        rotary_dim=rotary_dim,
    )


def rope_by_layer(
    raw: Fields, *, default_theta: float, default_local_theta: float
) -> tuple[RopeConfig, RopeConfig]:
    """Rotary settings of the layers that see everything and of those with a window (Gemma 3).

    The older style scales the former only and gives the latter ``rope_local_base_freq``.
    """
    tables = raw.section("rope_parameters")
    if not any(isinstance(value, Mapping) for value in tables.values()):
        local = {"rope_theta": raw.values.get("rope_local_base_freq")}
        return (
            rope_config(raw, default_theta=default_theta),
            rope_config(Fields(local, raw.where), default_theta=default_local_theta),
        )
    rest = {key: value for key, value in raw.values.items() if not key.startswith("rope_")}
    full = rest | {"rope_parameters": tables.get("full_attention")}
    local = rest | {"rope_parameters": tables.get("sliding_attention")}
    return (
        rope_config(Fields(full, raw.where), default_theta=default_theta),
        rope_config(Fields(local, raw.where), default_theta=default_local_theta),
    )


def _kind(raw: Fields, scaling: Fields) -> RopeKind:
    """Refuse what would be silently misread: another type, or tables for each kind of layer."""
    if any(isinstance(value, Mapping) for value in scaling.values.values()):
        raise InputError(
            f"{raw.where}: expected one set of rope parameters, got one for each kind of layer "
            f"({', '.join(scaling.values)}). This checkpoint cannot be run exactly."
        )
    kind = scaling.values.get("rope_type") or scaling.values.get("type") or "default"
    kind = "longrope" if kind == "su" else kind  # Phi-3's first checkpoints say "su"
    known = get_args(RopeKind)
    if kind not in known:
        raise InputError(
            f"{raw.where}: expected the rope type to be one of {', '.join(known)}, got {kind!r}. "
            "This checkpoint cannot be run exactly."
        )
    return cast("RopeKind", kind)


def _first(key: str, *raws: Fields, default: float, most: float = math.inf) -> float:
    """A positive number from the first that has the key; a zero counts as none."""
    for raw in raws:
        if raw.has(key) and raw.number(key, most=most) > 0:
            return raw.number(key)
    return default


def _factor(raw: Fields, scaling: Fields, kind: RopeKind) -> float:
    """How many times the context is stretched; YaRN's may follow from the two lengths."""
    if scaling.has("factor"):
        return scaling.number("factor")
    if kind == "yarn":
        return _context(raw) / _original_length(raw, scaling, kind)
    raise InputError(
        f"{raw.where}: expected a 'factor' in the rope scaling of type {kind!r}, got none. "
        "Correct the config."
    )


def _longrope(raw: Fields, scaling: Fields, theta: float, rotary_dim: int | None) -> RopeConfig:
    """LongRoPE's two sets of divisors. Source: arXiv 2402.13753, as ``transformers`` reads it."""
    pairs = (rotary_dim or _head_dim(raw)) // 2
    short, long = (_divisors(raw, scaling, key, pairs) for key in ("short_factor", "long_factor"))
    original = _original_length(raw, scaling, "longrope", least=2)  # its logarithm divides
    factor = raw.integer("max_position_embeddings") / original
    attention = 1.0 if factor <= 1.0 else math.sqrt(1.0 + math.log(factor) / math.log(original))
    if scaling.has("attention_factor"):
        attention = scaling.number("attention_factor")
    return RopeConfig(
        theta=theta,
        kind="longrope",
        factor=factor,
        original_length=original,
        attention_factor=attention,
        short_factor=short,
        long_factor=long,
        rotary_dim=rotary_dim,
    )


def _divisors(raw: Fields, scaling: Fields, key: str, pairs: int) -> tuple[float, ...]:
    listed = scaling.values.get(key)
    listed = listed if isinstance(listed, list | tuple) else ()
    kinds = (x for x in listed if isinstance(x, int | float) and not isinstance(x, bool))
    numbers = [x for x in kinds if 0 < x <= LARGEST_THETA]
    if not len(numbers) == len(listed) == pairs:
        raise InputError(
            f"{raw.where}: expected {pairs} numbers in {key!r} of the rope scaling, got "
            f"{len(numbers)}. Correct the config."
        )
    return tuple(float(x) for x in numbers)


def _head_dim(raw: Fields) -> int:
    if raw.has("head_dim"):
        return raw.integer("head_dim", most=WIDTH)
    heads = raw.integer("num_attention_heads", most=HEADS)
    return raw.integer("hidden_size", most=WIDTH) // heads


def _context(raw: Fields) -> int:
    return raw.integer("max_position_embeddings", 2048)


def _original_length(raw: Fields, scaling: Fields, kind: RopeKind, *, least: int = 1) -> int:
    """Context of pretraining; as in transformers, ``dynamic`` measures from the configured one."""
    key = "original_max_position_embeddings"
    for found in () if kind == "dynamic" else (raw, scaling):
        if found.has(key):
            return found.integer(key, least=least)
    return max(_context(raw), least)


def _attention_factor(scaling: Fields, kind: RopeKind, factor: float) -> float:
    """YaRN's temperature on cos and sin. Source: the YaRN paper; DeepSeek's two mscales."""
    if kind != "yarn":
        return 1.0
    if scaling.has("attention_factor"):
        return scaling.number("attention_factor")

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0

    one, all_dim = (_first(key, scaling, default=0.0) for key in ("mscale", "mscale_all_dim"))
    return mscale(one) / mscale(all_dim) if one and all_dim else mscale(1.0)
