"""Rows of a text file, which stay in the file: one pass checks each and keeps its place."""

import gzip
from array import array
from collections.abc import Callable, Iterator
from io import BufferedIOBase
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from balora_jax.data.rows import FAULTS, Row, changed, state_of, unreadable
from balora_jax.progress import progress_bar

MOST_OF_A_ROW = 2**26
"""Bytes of a line: a packed file may hold one that fills the memory."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_SHOW_PROGRESS_ABOVE = 2**27
_CHUNK = 1000


class Found(NamedTuple):
    """What a format finds in a file.

    Attributes:
        places: first byte and number of bytes of each row, which was checked when it comes.
        read: the row of such bytes.
        columns: names that every row has; none where each row says its own.
    """

    places: Iterator[tuple[int, int]]
    read: Callable[[bytes], Row]
    columns: tuple[str, ...] = ()


Format = Callable[[str, BufferedIOBase], Found]
"""From a file's name, for messages, and its bytes, unpacked, from the first one on."""


class TextRows:
    """Rows of one file of text, packed or not: 16 bytes of memory for each.

    A row is parsed again each time that it is asked for. In a packed file a step back begins from
    its first byte again, so rows are to be asked for in order.
    """

    def __init__(self, file: str, text_format: Format, limit: int | None = None):
        """Check the rows.

        Args:
            file: its path; a name that ends with ``.gz`` is unpacked.
            text_format: what its text is.
            limit: how many rows; all of them where it is not given.

        Raises:
            InputError: a row that is broken, or a file that cannot be read.
        """
        self._file, self._limit = file, limit
        self._starts, self._lengths = array("q"), array("q")
        self._raw: BufferedIOBase | None = None
        self._stream: Any = None
        self._state: tuple[int, ...] | None = None
        try:
            found = self._checked(text_format)
        except FAULTS as error:
            raise unreadable(file, error) from error
        finally:
            self.close()
        self._read, self.columns = found.read, found.columns

    def _checked(self, text_format: Format) -> Found:
        """What the format finds, its places taken."""
        raw = self._opened()
        found = text_format(self._file, self._stream)
        size = Path(self._file).stat().st_size
        with progress_bar(
            total=size,
            desc=f"reading {Path(self._file).name}",
            unit="B",
            unit_scale=True,
            disable=size < _SHOW_PROGRESS_ABOVE,
        ) as bar:
            for number, (start, length) in enumerate(islice(found.places, self._limit)):
                self._starts.append(start)
                self._lengths.append(length)
                if number % _CHUNK == 0:
                    bar.update(raw.tell() - bar.n)
        if state_of(raw.fileno()) != self._state:
            raise changed(self._file)
        return found

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Row:
        start, length = self._starts[index], self._lengths[index]
        try:
            raw = self._opened()
            self._stream.seek(start)
            data = self._stream.read(length)
            if state_of(raw.fileno()) != self._state:
                raise changed(self._file)
            return self._read(data)
        except FAULTS as error:
            raise unreadable(self._file, error) from error

    def __iter__(self) -> Iterator[Row]:
        for index in range(len(self)):
            yield self[index]
        self.close()

    def _opened(self) -> BufferedIOBase:
        """The file itself, open; `_stream` are its bytes unpacked."""
        if self._raw is None:
            raw = self._raw = Path(self._file).open("rb")  # noqa: SIM115
            packed = self._file.lower().endswith(".gz")
            self._stream = gzip.GzipFile(fileobj=raw) if packed else raw
            state = state_of(raw.fileno())
            if self._state not in (None, state):
                raise changed(self._file)
            self._state = state
        return self._raw

    def close(self) -> None:
        """Close the file; the next row opens it again."""
        if self._raw is not None:
            self._stream.close()
            self._raw.close()
        self._raw = self._stream = None
