"""Rows of a CSV or TSV file: every cell is the text that stands there, nothing is inferred."""

import csv
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from balora_jax.data.text_rows import BYTE_ORDER_MARK, MOST_OF_A_ROW, Found
from balora_jax.errors import InputError
from balora_jax.untyped.shown import shown


def csv_rows(file: str, stream: BufferedIOBase) -> Found:
    r"""The columns of the header and the places of the rows; blank lines are left out.

    CSV is that of RFC 4180: commas, quotes that are doubled inside of quotes, and cells of
    several lines in quotes. A ``.tsv`` has tabs and knows no quoting, as in GLUE.

    Raises:
        InputError: a column that the header names twice; from the places: a row of another width,
            or with a quote that does not end.

    >>> import io
    >>> found = csv_rows("a.csv", io.BytesIO(b'q,a\n"one\ntwo",007\n'))
    >>> found.columns, list(found.places), found.read(b'"one\ntwo",007\n')
    (('q', 'a'), [(4, 14)], {'q': 'one\ntwo', 'a': '007'})
    """
    lines, dialect = _Lines(file, stream), _dialect(file)
    records = _records(file, lines, dialect)
    columns = next(records, (0, []))[1]
    if len(set(columns)) < len(columns):
        listed = ", ".join(columns)
        raise InputError(f"{file}: expected each column once, got {listed}. Rename one.")

    def places() -> Iterator[tuple[int, int]]:
        for start, cells in records:
            if len(cells) != len(columns):
                raise InputError(
                    f"{file}: expected {len(columns)} cells in a row, as in the header, got "
                    f"{len(cells)} in line {lines.number}. Fix that row, or name every column."
                )
            yield start, lines.end - start

    def read(data: bytes) -> dict[str, str]:
        cells = _next(csv.reader([data.decode("utf-8")], **dialect))
        return dict(zip(columns, cells or (), strict=True))

    return Found(places(), read, tuple(columns))


def _dialect(file: str) -> dict[str, Any]:
    if ".tsv" in [suffix.lower() for suffix in Path(file).suffixes]:
        return {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "strict": True}
    return {"delimiter": ",", "quoting": csv.QUOTE_MINIMAL, "strict": True}


def _records(
    file: str, lines: "_Lines", dialect: dict[str, Any]
) -> Iterator[tuple[int, list[str]]]:
    """First byte and cells of each record."""
    reader = csv.reader(lines, **dialect)
    while True:
        start = lines.end
        try:
            cells = _next(reader)
        except csv.Error as error:
            raise InputError(
                f"{file}: expected rows of {dialect['delimiter']!r} between cells, got one that "
                f"is broken ({error}) and that ends in line {lines.number}. Fix its quotes."
            ) from error
        if cells is None:
            return
        if cells:  # else a blank line
            yield start, cells


def _next(reader: Iterator[list[str]]) -> list[str] | None:
    """The next record; None at the end."""
    before = csv.field_size_limit(MOST_OF_A_ROW)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(before)


class _Lines:
    """The lines of a stream as text, without a byte-order mark.

    Attributes:
        end: bytes that were read; a reader of records reads no line too many.
        number: lines that were read.
    """

    def __init__(self, file: str, stream: BufferedIOBase):
        self._file, self._stream = file, stream
        self.end = self.number = 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._stream.readline(MOST_OF_A_ROW + 1)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) > MOST_OF_A_ROW:
            raise self._refusal(f"more than {MOST_OF_A_ROW >> 20} MiB")
        text = line.removeprefix(BYTE_ORDER_MARK) if self.end == 0 else line
        self.end += len(line)
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._refusal(f"{shown(line)}, which is not UTF-8") from error

    def _refusal(self, got: str) -> InputError:
        return InputError(
            f"{self._file}: expected lines of text, got {got}, in line {self.number}. "
            "Fix that line, or save the file as UTF-8."
        )
