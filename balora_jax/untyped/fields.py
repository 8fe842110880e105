"""A parsed object of JSON, whose values are checked one by one as they are read."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from balora_jax.errors import InputError
from balora_jax.untyped.shown import shown

_MISSING: Any = object()


@dataclass(frozen=True)
class Fields:
    """Values by key, as JSON had them, behind readers that refuse what a key cannot be.

    Every reader takes a default for a config that does not have the key; without one the key must
    be there. Each raises ``InputError`` for a value of another type, or out of bounds.

    Attributes:
        values: the parsed object.
        where: the file, for messages.
        remedy: what to do about a value that is refused, for messages.

    Example:
        >>> raw = Fields({"num_hidden_layers": "12"}, "config.json")
        >>> raw.integer("vocab_size", 99), raw.integer("num_hidden_layers", most=8192)
        Traceback (most recent call last):
        balora_jax.errors.InputError: config.json: expected num_hidden_layers to be a whole number \
from 1 to 8192, got '12'. Use the config.json that was saved with the weights.
    """

    values: Mapping[str, Any]
    where: str
    remedy: str = "Use the config.json that was saved with the weights."

    def integer(
        self, key: str, default: int = _MISSING, *, least: int = 1, most: int = 2**31
    ) -> int:
        """A whole number within bounds."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self._refuse(key, f"a whole number from {least} to {most}")
        return value

    def number(
        self, key: str, default: float = _MISSING, *, least: float = 0.0, most: float = math.inf
    ) -> float:
        """A finite number within bounds."""
        value = self._value(key, default)
        if not _is_number(value, least, most):
            self._refuse(key, _number_within(least, most))
        return float(value)

    def numbers(
        self, key: str, *, least: float = 0.0, most: float = math.inf, whole: bool = False
    ) -> dict[str, float]:
        """An object of finite numbers by name, empty where it is ``null`` or not there."""
        found = self.section(key)
        for name, value in found.items():
            if not _is_number(value, least, most) or (whole and not isinstance(value, int)):
                kind = "a whole number" if whole else "a number"
                self._refuse(
                    key, f"an object of {_number_within(least, most, kind)}", {name: value}
                )
        return dict(found)

    def integers(self, key: str, *, most: int) -> tuple[int, ...]:
        """One whole number or a list of them, within bounds; none where the key is not there."""
        value = self.values.get(key)
        found = value if isinstance(value, list) else [] if value is None else [value]
        for one in found:
            if isinstance(one, bool) or not isinstance(one, int) or not 0 <= one <= most:
                self._refuse(key, f"whole numbers from 0 to {most}")
        return tuple(found)

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts, empty where it is ``null`` or not there."""
        value = self.values.get(key)
        if value is not None and not (
            isinstance(value, list) and all(isinstance(one, str) and one for one in value)
        ):
            self._refuse(key, "a list of names")
        return tuple(value or ())

    def flag(self, key: str, *, default: bool) -> bool:
        """``true`` or ``false``; ``null`` is false."""
        value = self.values.get(key, default)
        if value is not None and not isinstance(value, bool):
            self._refuse(key, "true or false")
        return bool(value)

    def choice(self, key: str, known: Collection[str], default: str = _MISSING) -> str:
        """One of the known words."""
        value = self._value(key, default)
        if not isinstance(value, str) or value not in known:
            raise InputError(
                f"{self.where}: expected {key} to be one of {', '.join(known)}, got "
                f"{shown(value)}. This checkpoint cannot be run exactly."
            )
        return value

    def section(self, key: str) -> Mapping[Any, Any]:
        """An object, empty where it is ``null`` or not there."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, Mapping):
            self._refuse(key, "an object")
        return value or {}

    def has(self, key: str) -> bool:
        """Whether the key is there and not ``null``."""
        return self.values.get(key) is not None

    def says_null(self, key: str) -> bool:
        """Whether the key is there, and ``null``: some keys then switch an option off."""
        return key in self.values and self.values[key] is None

    def must_be(self, key: str, expected: Any, default: Any) -> None:
        """Refuse an option that this code lacks: its value is the expected one, or nothing runs."""
        got = self.values.get(key, default)
        if got != expected:
            raise InputError(
                f"{self.where}: expected {key} to be {expected!r}, got {shown(got)}. "
                "This checkpoint cannot be run exactly."
            )

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key, default)
        if value is None or value is _MISSING:
            raise InputError(f"{self.where}: expected the key {key!r}, got none. {self.remedy}")
        return value

    def _refuse(self, key: str, expected: str, got: Any = _MISSING) -> NoReturn:
        got = self.values.get(key) if got is _MISSING else got
        raise InputError(
            f"{self.where}: expected {key} to be {expected}, got {shown(got)}. {self.remedy}"
        )


def _is_number(value: Any, least: float, most: float) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if isinstance(value, int) and value.bit_length() > 1000:  # of no float
        return False
    # JSON of Python has NaN and Infinity.
    return math.isfinite(value) and least <= value <= most


def _number_within(least: float, most: float, kind: str = "a number") -> str:
    most_of = "" if most == math.inf else f" and at most {most:g}"
    return f"{kind} of at least {least:g}{most_of}"
