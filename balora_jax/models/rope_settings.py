"""Rotary settings of a checkpoint's ``config.json``, in the older and the newer style."""

import math
from collections.abc import Mapping
from typing import cast, get_args

from balora_jax.errors import InputError
from balora_jax.models.rotary import RopeConfig, RopeKind
from balora_jax.models.sizes import HEADS, WIDTH
from balora_jax.untyped.fields import Fields

LARGEST_THETA = 1e15
ORIGINAL = "original_max_position_embeddings"
KINDS_OF_LAYERS = ("full_attention", "sliding_attention")
RENAMED: Mapping[str, str] = {"su": "longrope"}
"""As first checkpoints call a type."""


def rope_config(
    raw: Fields,
    *,
    default_theta: float = 10000.0,
    partial: bool = False,
    renamed: Mapping[str, str] = RENAMED,
) -> RopeConfig:
    """Rotary settings: of ``rope_scaling``, or where it is empty of ``rope_parameters``.

    Of the two ``transformers`` takes one whole, so the base beside a scaling that was added to a
    config with ``rope_parameters`` is that of the top level, or the family's.

    Args:
        raw: the parsed ``config.json``.
        default_theta: the family's base.
        partial: whether the family can turn a part of each head. Others ignore the share, and
            ``transformers`` fails at it with any scaling.
        renamed: names of types that the family reads as others.

    Raises:
        InputError: a kind of scaling that this code lacks, or one without what it needs.
    """
    said = raw.section("rope_scaling") or raw.section("rope_parameters")
    scaling = Fields(said, f"{raw.where}, rope")
    kind = _kind(raw, scaling, renamed)
    theta = _first("rope_theta", scaling, raw, default=default_theta, most=LARGEST_THETA)
    rotary_dim = _rotary_dim(raw, scaling, kind, partial=partial)
    return _scaled(raw, scaling, kind, theta, rotary_dim)


def rope_by_layer(
    raw: Fields,
    *,
    theta_keys: tuple[str, str],
    thetas: tuple[float, float],
    scales_both: bool = False,
) -> tuple[RopeConfig, RopeConfig]:
    """Rotary settings of the layers that see everything and of those with a window (Gemma 3).

    ``rope_parameters`` has a set for either; ``rope_scaling`` changes the former, or both.

    Args:
        raw: the parsed ``config.json``.
        theta_keys: where the older style keeps the two bases.
        thetas: the family's bases.
        scales_both: whether ``rope_scaling`` changes both (ModernBERT).

    Raises:
        InputError: one set for all layers, or as ``rope_config``.
    """
    tables = Fields(raw.section("rope_parameters"), f"{raw.where}, rope_parameters")
    if tables.values and not set(tables.values) & set(KINDS_OF_LAYERS):
        raise InputError(
            f"{raw.where}: expected rope_parameters to name {' and '.join(KINDS_OF_LAYERS)}, got "
            f"{', '.join(map(str, tables.values))}. This checkpoint cannot be run exactly."
        )
    found = []
    for kind, key, theta in zip(KINDS_OF_LAYERS, theta_keys, thetas, strict=True):
        said = dict(tables.section(kind) or {"rope_type": "default"})
        if scales_both or kind == KINDS_OF_LAYERS[0]:
            said |= raw.section("rope_scaling")
        # As transformers has it, the length of pretraining is that of the set and not of the top
        # level, and YaRN's band is rounded whatever the set says.
        said.pop("truncate", None)
        rest = {k: v for k, v in raw.values.items() if k != ORIGINAL and not k.startswith("rope_")}
        rest |= {"rope_theta": raw.values.get(key), "rope_parameters": said}
        found.append(rope_config(Fields(rest, raw.where), default_theta=theta))
    return found[0], found[1]


def _scaled(
    raw: Fields, scaling: Fields, kind: RopeKind, theta: float, rotary_dim: int | None
) -> RopeConfig:
    """The settings of one kind."""
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


def _rotary_dim(raw: Fields, scaling: Fields, kind: RopeKind, *, partial: bool) -> int | None:
    """Dimensions of a head that turn; None for all."""
    share = _first("partial_rotary_factor", scaling, raw, default=1.0, most=1.0)
    if share == 1.0 or (kind == "default" and not partial):
        return None
    if not partial:
        raise InputError(
            f"{raw.where}: expected partial_rotary_factor to be 1 beside a rope type of {kind!r}, "
            f"got {share:g}: this family turns whole heads. This checkpoint cannot be run exactly."
        )
    return int(_head_dim(raw) * share)


def _kind(raw: Fields, scaling: Fields, renamed: Mapping[str, str]) -> RopeKind:
    """Refuse what would be silently misread: another type, or tables for each kind of layer."""
    if any(isinstance(value, Mapping) for value in scaling.values.values()):
        raise InputError(
            f"{raw.where}: expected one set of rope parameters, got one for each kind of layer "
            f"({', '.join(scaling.values)}). This checkpoint cannot be run exactly."
        )
    kind = scaling.values.get("rope_type") or scaling.values.get("type") or "default"
    kind = renamed.get(kind, kind) if isinstance(kind, str) else kind
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
    if scaling.has("factor"):
        factor = scaling.number("factor")
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
    for found in () if kind == "dynamic" else (raw, scaling):
        if found.has(ORIGINAL):
            return found.integer(ORIGINAL, least=least)
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
