"""Figures of held-out rows as a checkpoint holds them, and whether a value is such."""

import math
from typing import Any


def is_score(value: Any) -> bool:
    """Whether a value can stand in a score: a finite number, or the name of a grader."""
    return isinstance(value, str) or (
        type(value) in (int, float) and abs(value) < 2**1023 and math.isfinite(value)
    )


def is_held_out(found: dict[str, Any]) -> bool:
    """Whether values are what :class:`training.held_out.HeldOut` gives."""
    if found.keys() != {"before", "best", "without_gain"}:
        return False
    best = found["best"]
    whole = best is None or (
        isinstance(best, dict)
        and best.keys() == {"step", "value", "skipped", "figures"}
        and all(type(best[name]) is int for name in ("step", "skipped"))
        and is_score(best["value"])
        and not isinstance(best["value"], str)
        and _are_figures(best["figures"])
    )
    return whole and type(found["without_gain"]) is int and _are_figures(found["before"])


def _are_figures(found: Any) -> bool:
    """Whether a value has finite numbers by name, or None for those that are not finite."""
    return isinstance(found, dict) and all(
        value is None or (is_score(value) and not isinstance(value, str))
        for value in found.values()
    )
