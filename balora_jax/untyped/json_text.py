"""JSON of others as values: every fault of a text or a file is refused in one sentence."""

import json
from pathlib import Path
from typing import Any

from balora_jax.errors import InputError
from balora_jax.untyped.shown import one_line, shown

MOST_BYTES = 64 * 2**20
DEEPEST = 100


def read_object(file: Path) -> dict[str, Any]:
    """A JSON file that holds one object.

    A key that stands twice in an object, with two values, is refused, as no reader can know which
    is meant. ``NaN`` and ``Infinity`` become floats, as Python writes them; whoever reads a number
    refuses what is not finite.

    Raises:
        InputError: the file cannot be read, is no regular file or too large; no JSON, JSON nested
            more than 100 levels deep or with a number of thousands of digits; not an object.
    """
    try:
        # A pipe or a device would never end.
        if file.exists() and not file.is_file():
            raise InputError(f"{file}: expected a file, got something else. Check the folder.")
        with file.open("rb") as stream:
            data = stream.read(MOST_BYTES + 1)
    except OSError as error:
        raise InputError(
            f"{file}: expected a readable file, got {error.strerror}. Check the folder."
        ) from error
    if len(data) > MOST_BYTES:
        raise InputError(
            f"{file}: expected at most {MOST_BYTES >> 20} MiB of JSON, got more. Check that it is "
            "the right file."
        )
    content = _parsed(data, file)
    if not isinstance(content, dict):
        raise InputError(
            f"{file}: expected a JSON object, got {type(content).__name__}. Repair the file."
        )
    return content


def _parsed(data: bytes, file: Path) -> Any:
    try:
        content = json.loads(data.decode("utf-8"), object_pairs_hook=without_twins)
    except RecursionError as error:
        raise _too_deep(file) from error
    except ValueError as error:  # no JSON, no UTF-8, a key twice, or thousands of digits
        reason = one_line(str(error), most=200)
        raise InputError(
            f"{file}: expected JSON, got {reason}. Repair the file or download it again."
        ) from error
    level = [content]
    for _ in range(DEEPEST):
        level = [value for inner in level for value in _values(inner)]
        if not level:
            return content
    raise _too_deep(file)


def _values(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _too_deep(file: Path) -> InputError:
    return InputError(
        f"{file}: expected JSON nested at most {DEEPEST} levels deep, got more. Repair the file "
        "or download it again."
    )


def without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of its keys and values, as the parser of JSON takes it for a hook.

    Raises:
        ValueError: a key twice, with two values.

    >>> without_twins([("a", 1), ("a", 1)])
    {'a': 1}
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if seen.setdefault(key, value) != value:
                raise ValueError(f"the key {shown(key)} twice, with two values")
    return found
