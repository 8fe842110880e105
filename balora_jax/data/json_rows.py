"""Rows of a JSON file as they stand: one object a line, or one array of objects."""

import json
from collections.abc import Iterator
from io import BufferedIOBase
from itertools import islice
from typing import Any

from balora_jax.errors import InputError

MOST_OF_A_ROW = 2**26
"""Bytes of a line: a packed file may hold one that fills the memory."""
MOST_OF_AN_ARRAY = 2**30

Row = dict[str, Any]


def json_rows(file: str, content: BufferedIOBase, limit: int | None = None) -> list[Row]:
    r"""The first rows of an open file; blank lines are left out.

    Args:
        file: its name, for messages.
        content: its bytes, unpacked.
        limit: how many rows; all of them where it is not given.

    Raises:
        InputError: a line that is no JSON object, with its number.
        ValueError: an array that is broken, or text that is not UTF-8.

    >>> import io
    >>> json_rows("a.jsonl", io.BytesIO(b'{"a": "007"}\n\n{"a": 7}\n'))
    [{'a': '007'}, {'a': 7}]
    """
    lines = _lines(file, content)
    first = next(lines, None)
    if first is None:
        return []
    if first[1].startswith("["):
        return _array(file, first[1], content)[:limit]
    rows = (_row(file, number, text) for number, text in _chained(first, lines))
    return list(islice(rows, limit))


def _chained(first: tuple[int, str], rest: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    yield first
    yield from rest


def _lines(file: str, content: BufferedIOBase) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not blank."""
    number = 0
    while line := content.readline(MOST_OF_A_ROW + 1):
        number += 1
        if len(line) > MOST_OF_A_ROW and not (number == 1 and line.lstrip().startswith(b"[")):
            raise _refusal(file, number, f"more than {MOST_OF_A_ROW >> 20} MiB")
        text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        if text:
            yield number, text


def _row(file: str, number: int, text: str) -> Row:
    try:
        found = parsed(text)
    except ValueError as error:
        raise _refusal(file, number, f"broken JSON ({error})") from error
    if not isinstance(found, dict):
        raise _refusal(file, number, "something else")
    return found


def _refusal(file: str, number: int, got: str) -> InputError:
    return InputError(
        f"{file}: expected one JSON object a line, got {got} in line {number}. Fix that line."
    )


def _array(file: str, first: str, content: BufferedIOBase) -> list[Row]:
    rest = content.read(MOST_OF_AN_ARRAY + 1)
    if len(rest) > MOST_OF_AN_ARRAY:
        raise InputError(
            f"{file}: expected an array of at most {MOST_OF_AN_ARRAY >> 20} MiB, got a larger one. "
            "Write one object a line."
        )
    rows = parsed(first + "\n" + rest.decode("utf-8"))
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise InputError(
                f"{file}: expected an array of JSON objects, got something else at its place "
                f"{number}. Fix that row."
            )
    return rows


def parsed(text: str) -> Any:
    """The value of a JSON text that can be written again.

    Raises:
        ValueError: broken, nested too deep, or half of a surrogate pair in a string.
    """
    try:
        found = json.loads(text)
        if "\\u" in text:
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deep") from None
    return found
