"""A parsed ``config.json``, whose values are checked one by one as a family reads them."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from balora_jax.errors import InputError

# Largest sizes that are no mistake.
WIDTH, HEADS, LAYERS, VOCABULARY, POSITIONS = 2**20, 2**14, 2**13, 2**24, 2**31

_MISSING: Any = object()


@dataclass(frozen=True)
class RawConfig:
    """Values by key, as JSON had them, behind readers that refuse what a key cannot be.

    Every reader takes a default for a config that does not have the key; without one the key must
    be there. Each raises ``InputError`` for a value of another type, or out of bounds.

    Attributes:
        values: the parsed object.
        where: the file, for messages.

    Example:
        >>> raw = RawConfig({"num_hidden_layers": "12"}, "config.json")
        >>> raw.integer("vocab_size", 99), raw.integer("num_hidden_layers", most=LAYERS)
        Traceback (most recent call last):
        balora_jax.errors.InputError: config.json: expected num_hidden_layers to be a whole number \
from 1 to 8192, got '12'. Use the config.json that was saved with the weights.
    """

    values: Mapping[str, Any]
    where: str

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
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        # JSON of Python has NaN and Infinity.
        if not (fits and math.isfinite(value) and least <= value <= most):
            most_of = "" if most == math.inf else f" and at most {most:g}"
            self._refuse(key, f"a number of at least {least:g}{most_of}")
        return float(value)

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
                f"{self.where}: expected {key} to be one of {', '.join(known)}, got {value!r}. "
                "This checkpoint cannot be run exactly."
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
                f"{self.where}: expected {key} to be {expected!r}, got {got!r}. "
                "This checkpoint cannot be run exactly."
            )

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key, default)
        if value is None or value is _MISSING:
            raise InputError(
                f"{self.where}: expected the key {key!r}, got none. Use the config.json that was "
                "saved with the weights."
            )
        return value

    def _refuse(self, key: str, expected: str) -> NoReturn:
        raise InputError(
            f"{self.where}: expected {key} to be {expected}, got {self.values.get(key)!r}. Use the "
            "config.json that was saved with the weights."
        )
