"""Bad values by kind."""

import datetime
import math
from typing import Any

KINDS: dict[str, Any] = {
    "null": None,
    "bool": True,
    "zero": 0,
    "neg": -1,
    "int": 7,
    "1e9": 10**9,
    "1e18": 10**18,
    "1e30": 10**30,
    "float": 16.5,
    "negfloat": -0.5,
    "tiny": 1e-320,
    "nan": math.nan,
    "inf": math.inf,
    "str": "x",
    "empty": "",
    "number-as-text": "12",
    "long": "x" * 5000,
    "nul": "a\0b",
    "lines": "a\nb\r\nc",
    "escape": "\x1b[2Jgone\x9b",
    "list": [16],
    "deep-list": [[[[16]]]],
    "dict": {"a": 1},
}
"""Kind → a value of it; JSON and YAML have all of them."""

OF_YAML: dict[str, Any] = {
    "date": datetime.date(2020, 1, 31),
    "bytes": b"\xff\xfe",
    "set": {"a", "b"},
}
"""Kinds that YAML has besides."""


def deep(opening: str, closing: str, depth: int, inner: str = "") -> str:
    """Brackets in brackets."""
    return opening * depth + inner + closing * depth
