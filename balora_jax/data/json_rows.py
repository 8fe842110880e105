"""Rows of a JSON file as they stand: one object a line, or one array of objects.

``NaN``, ``Infinity`` and ``-Infinity``, which are no JSON but which Python writes, are read as
the floats that they mean. No such float is a text or a label.
"""

import codecs
import json
import re
from collections.abc import Iterator
from io import BufferedIOBase
from typing import Any

from balora_jax.data.text_rows import BYTE_ORDER_MARK, MOST_OF_A_ROW, Found
from balora_jax.errors import InputError
from balora_jax.untyped.json_text import without_twins

_HEAD = 2**12
_PIECE = 2**20
_NOT_BLANK = re.compile(r"[^ \t\r\n]")
_CHECKED = json.JSONDecoder(object_pairs_hook=without_twins)

Row = dict[str, Any]


def json_rows(file: str, stream: BufferedIOBase) -> Found:
    r"""The places of the rows; blank lines are left out.

    Args:
        file: its name, for messages.
        stream: its bytes, unpacked.

    Raises:
        InputError: from the places: a line, or an element of the array, that is no JSON object or
            that has a key twice with two values.

    >>> import io
    >>> list(json_rows("a.jsonl", io.BytesIO(b'{"a": "007"}\n\n{"a": 7}\n')).places)
    [(0, 13), (14, 9)]
    """
    is_array = _first_byte(stream) == b"["
    stream.seek(0)
    return Found(_elements(file, stream) if is_array else _lines(file, stream), _row)


def _first_byte(stream: BufferedIOBase) -> bytes:
    """The first that is not blank; nothing where there is none."""
    piece = stream.read(_HEAD).removeprefix(BYTE_ORDER_MARK)
    while piece:
        if text := piece.lstrip(b" \t\r\n"):
            return text[:1]
        piece = stream.read(_HEAD)
    return b""


def _row(data: bytes) -> Row:
    return parsed(data.decode("utf-8"))


def _lines(file: str, stream: BufferedIOBase) -> Iterator[tuple[int, int]]:
    start = number = 0
    while line := stream.readline(MOST_OF_A_ROW + 1):
        number += 1
        if len(line) > MOST_OF_A_ROW:
            raise _no_line(file, number, f"more than {MOST_OF_A_ROW >> 20} MiB")
        skipped = len(BYTE_ORDER_MARK) if start == 0 and line.startswith(BYTE_ORDER_MARK) else 0
        text = line[skipped:] if skipped else line
        if text and not text.isspace():
            _check_line(file, number, text)
            yield start + skipped, len(text)
        start += len(line)


def _check_line(file: str, number: int, line: bytes) -> None:
    try:
        found = parsed(line.decode("utf-8"), _CHECKED)
    except UnicodeDecodeError as error:
        raise _no_line(file, number, f"what is not UTF-8 ({error.reason})") from error
    except ValueError as error:
        raise _no_line(file, number, f"broken JSON ({error})") from error
    if not isinstance(found, dict):
        raise _no_line(file, number, "something else")


def _no_line(file: str, number: int, got: str) -> InputError:
    return InputError(
        f"{file}: expected one JSON object a line, got {got} in line {number}. Fix that line."
    )


def parsed(text: str, decoder: json.JSONDecoder | None = None) -> Any:
    """The value of a JSON text that can be written again.

    Raises:
        ValueError: broken, nested too deep, or half of a surrogate pair in a string.
    """
    try:
        found = json.loads(text) if decoder is None else decoder.decode(text)
        _check_pairs(text, found)
    except RecursionError:
        raise ValueError("nested too deep") from None
    return found


def _check_pairs(text: str, found: Any) -> None:
    if "\\ud" in text or "\\uD" in text:
        json.dumps(found, ensure_ascii=False).encode()


class _NoObjectError(ValueError):
    """What stands in an array where an object belongs."""


def _elements(file: str, stream: BufferedIOBase) -> Iterator[tuple[int, int]]:
    """The objects of an array, of which a piece at a time is in memory."""
    number = 1
    try:
        for place in _objects(_Window(stream)):
            yield place
            number += 1
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{file}: expected an array of JSON objects, got {_fault(error)} at its place "
            f"{number}. Fix that row."
        ) from error


def _fault(error: ValueError | RecursionError) -> str:
    if isinstance(error, _NoObjectError):
        return str(error)
    if isinstance(error, UnicodeDecodeError):
        return f"what is not UTF-8 ({error.reason})"
    if isinstance(error, RecursionError):
        return "broken JSON (nested too deep)"
    # Line and column would be those of the window.
    said = error.msg if isinstance(error, json.JSONDecodeError) else error
    return f"broken JSON ({said})"


def _objects(window: "_Window") -> Iterator[tuple[int, int]]:
    window.take()  # the bracket
    mark = window.mark()
    if mark != "]":
        yield from _object(window)
        while (mark := window.mark()) == ",":
            window.take()
            yield from _object(window)
    if mark != "]":
        raise ValueError("no comma after the object before it")
    window.take()
    if window.mark():
        raise ValueError("more text after the end of the array")


def _object(window: "_Window") -> Iterator[tuple[int, int]]:
    mark = window.mark()
    if mark != "{":
        raise _NoObjectError("something else" if mark else "the end of the file")
    yield window.value()


class _Window:
    """A piece of a text that moves on over the bytes of a stream."""

    def __init__(self, stream: BufferedIOBase):
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at = "", 0  # `_at`: the character where reading goes on
        self._byte = 0  # the same place in the stream
        self._read_on(_PIECE)
        if self._text.startswith("\ufeff"):
            self._advance(1)
        self.mark()

    def mark(self) -> str:
        """The next character that is not blank, which is not taken; nothing at the end."""
        while True:
            found = _NOT_BLANK.search(self._text, self._at)
            self._advance(found.start() if found else len(self._text))
            if found:
                return found[0]
            if not self._read_on(_PIECE):
                return ""

    def take(self) -> None:
        """Go past that character."""
        self._advance(self._at + 1)

    def value(self) -> tuple[int, int]:
        """Check the value that begins here and go past it: its first byte, its number of bytes."""
        size = _PIECE
        while True:
            try:
                found, end = _CHECKED.raw_decode(self._text, self._at)
                break
            except json.JSONDecodeError as error:
                # Broken, or not all of it is here yet.
                if len(self._text) - self._at > MOST_OF_A_ROW:
                    most = f"or an object of more than {MOST_OF_A_ROW >> 20} MiB"
                    raise ValueError(f"{error.msg}, {most}") from error
                if not self._read_on(size):
                    raise
                size *= 2
        _check_pairs(self._text[self._at : end], found)
        start = self._byte
        self._advance(end)
        return start, self._byte - start

    def _advance(self, to: int) -> None:
        self._byte += len(self._text[self._at : to].encode())
        self._at = to

    def _read_on(self, size: int) -> bool:
        """Put more text behind what is not taken yet; False at the end of the stream."""
        data = self._stream.read(size)
        self._text = self._text[self._at :] + self._decoder.decode(data, final=not data)
        self._at = 0
        return bool(data)
