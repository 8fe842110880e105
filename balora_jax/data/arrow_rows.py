"""Rows of parquet and Arrow files and of saved data sets, by the files' own types.

A cell is what `pyarrow` makes of it, with two exceptions: an id of a `ClassLabel` becomes its
name, and a number of 16 or 32 bits becomes the shortest decimal that means it (0.1, and not
0.10000000149011612).
"""

import bisect
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from io import BufferedIOBase
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from balora_jax.data.rows import Row, changed, class_name, state_of, unreadable
from balora_jax.errors import InputError
from balora_jax.untyped.json_text import read_object
from balora_jax.untyped.shown import shown

_CHUNK = 1000
_BUFFER = 2**20
_MAGIC = b"ARROW1"
_FAULTS = (OSError, ValueError, OverflowError, pa.ArrowException)


@runtime_checkable
class _Units(Protocol):
    """A file as pieces that can each be read alone.

    Attributes:
        schema: types of the columns.
        sizes: rows of each piece.
    """

    schema: pa.Schema
    sizes: list[int]

    def batches(self, unit: int) -> Iterator[pa.RecordBatch]:
        """The rows of one piece, in order."""
        ...


class _Parquet:
    """The row groups of a parquet file."""

    def __init__(self, handle: BufferedIOBase):
        self._file = pq.ParquetFile(handle, buffer_size=_BUFFER, pre_buffer=False)
        self.schema: pa.Schema = self._file.schema_arrow
        metadata = self._file.metadata
        self.sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]

    def batches(self, unit: int) -> Iterator[pa.RecordBatch]:
        return self._file.iter_batches(batch_size=_CHUNK, row_groups=[unit])


class _ArrowFile:
    """The batches of an Arrow file that has a table of them (also called feather)."""

    def __init__(self, handle: BufferedIOBase):
        self._file = pa.ipc.open_file(handle)
        self.schema: pa.Schema = self._file.schema
        count = self._file.num_record_batches
        self.sizes = [self._file.get_batch(i).num_rows for i in range(count)]

    def batches(self, unit: int) -> Iterator[pa.RecordBatch]:
        yield self._file.get_batch(unit)


class _ArrowStream:
    """An Arrow stream, as `datasets` saves: one piece, read from its beginning."""

    def __init__(self, handle: BufferedIOBase):
        self._handle = handle
        self.schema: pa.Schema = pa.ipc.open_stream(handle).schema
        self.sizes = [sum(batch.num_rows for batch in self.batches(0))]

    def batches(self, unit: int) -> Iterator[pa.RecordBatch]:
        del unit  # there is one
        self._handle.seek(0)
        return iter(pa.ipc.open_stream(self._handle))


class ArrowRows:
    """Rows of one parquet or Arrow file, of which a thousand at a time are in memory.

    They are to be asked for in order: a step back reads its row group or stream again.
    """

    columns: tuple[str, ...] = ()

    def __init__(self, file: str, limit: int | None = None):
        """Read the types, and how many rows there are.

        Raises:
            InputError: no such file, a column that stands twice, or broken names of classes.
        """
        self._file = file
        self._handle: BufferedIOBase | None = None
        self._units: _Units | None = None
        self._state: tuple[int, ...] | None = None
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._first, self._rows = 0, []
        try:
            units = self._opened()
            self._ends = list(itertools.accumulate(units.sizes))
            schema = units.schema
        except _FAULTS as error:
            raise unreadable(file, error) from error
        finally:
            self.close()
        if len(set(schema.names)) < len(schema.names):
            listed = ", ".join(schema.names)
            raise InputError(f"{file}: expected each column once, got {listed}. Rename one.")
        self._classes = class_names(schema, file)
        self._narrow = {
            field.name: np.float16 if pa.types.is_float16(field.type) else np.float32
            for field in schema
            if pa.types.is_float16(field.type) or pa.types.is_float32(field.type)
        }
        whole = self._ends[-1] if self._ends else 0
        self._count = whole if limit is None else min(limit, whole)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Row:
        index = range(self._count)[index]
        if not self._first <= index < self._first + len(self._rows):
            try:
                self._move(index)
            except _FAULTS as error:
                self.close()
                raise unreadable(self._file, error) from error
        return self._rows[index - self._first]

    def __iter__(self) -> Iterator[Row]:
        for index in range(self._count):
            yield self[index]
        self.close()

    def close(self) -> None:
        """Close the file; the next row opens it again."""
        if self._handle is not None:
            self._handle.close()
        self._handle = self._units = None
        self._batches, self._rows = iter(()), []

    def _opened(self) -> _Units:
        if self._units is None:
            handle = self._handle = Path(self._file).open("rb")  # noqa: SIM115
            state = state_of(handle.fileno())
            if self._state not in (None, state):
                raise changed(self._file)
            self._state = state
            if self._file.lower().endswith(".parquet"):
                self._units = _Parquet(handle)
            else:
                magic = handle.read(len(_MAGIC))
                handle.seek(0)
                self._units = (_ArrowFile if magic == _MAGIC else _ArrowStream)(handle)
        return self._units

    def _move(self, index: int) -> None:
        """Make the rows around one those that are in memory."""
        was_open = self._units is not None
        units = self._opened()
        unit = bisect.bisect_right(self._ends, index)
        begin = self._ends[unit] - units.sizes[unit]
        start = self._first + len(self._rows)
        if not was_open or not begin <= start <= index:
            start, self._batches = begin, _slices(units, unit)
        self._rows = []
        while True:
            batch = next(self._batches, None)
            if batch is None:
                raise InputError(
                    f"{self._file}: expected {self._ends[-1]} rows, as the file says, got "
                    f"{start}. Copy the file again."
                )
            if index < start + batch.num_rows:
                break
            start += batch.num_rows
        if self._handle and state_of(self._handle.fileno()) != self._state:
            raise changed(self._file)
        self._first, self._rows = start, self._cells(batch, start)

    def _cells(self, batch: pa.RecordBatch, first: int) -> list[dict[str, Any]]:
        rows = batch.to_pylist()
        for name, kind in self._narrow.items():
            for row in rows:
                if row[name] is not None:
                    row[name] = float(str(kind(row[name])))
        for name, names in self._classes.items():
            for number, row in enumerate(rows, start=first + 1):
                where = f"{self._file}: row {number}: column {name!r}"
                row[name] = class_name(names, row[name], where)
        return rows


def _slices(units: _Units, first: int) -> Iterator[pa.RecordBatch]:
    """All rows from a piece on, a thousand at most in each."""
    for unit in range(first, len(units.sizes)):
        for batch in units.batches(unit):
            for start in range(0, batch.num_rows, _CHUNK):
                yield batch.slice(start, _CHUNK)


def class_names(schema: pa.Schema, file: str) -> Mapping[str, Sequence[str]]:
    """Names of each column of `ClassLabel`, in the order of their ids, as `datasets` writes them.

    Raises:
        InputError: names that cannot be read.
    """
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return {}
    try:
        features = json.loads(text)["info"]["features"]
        kinds = {name: kind for name, kind in features.items() if isinstance(kind, dict)}
        found = {
            name: [str(one) for one in kind["names"]]
            for name, kind in kinds.items()
            if kind.get("_type") == "ClassLabel" and pa.types.is_integer(schema.field(name).type)
        }
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{file}: expected the features of `datasets` in its schema, got what cannot be read "
            f"({type(error).__name__}). Write the file again."
        ) from error
    return found


def files_of_folder(folder: str, split: str) -> list[str] | None:
    """The Arrow files of a folder that `save_to_disk` wrote; None for another folder.

    Args:
        folder: one data set, or several by the names of their splits.
        split: the one of several.

    Raises:
        InputError: no such split, or a folder that lacks a file.
    """
    path = Path(folder)
    if (path / "dataset_dict.json").is_file():
        names = list(map(str, _listed(path / "dataset_dict.json", "splits")))
        if split not in names or not (path / split / "state.json").is_file():
            raise InputError(
                f"{folder}: expected a saved data set with the split {split!r}, got the splits "
                f"{', '.join(names)}. Name one of these."
            )
        path /= split
    if not (path / "state.json").is_file():
        return None
    files = []
    for one in _listed(path / "state.json", "_data_files"):
        name = one.get("filename") if isinstance(one, Mapping) else one
        if not isinstance(name, str) or Path(name).name != name or not (path / name).is_file():
            raise InputError(
                f"{path}: expected the files that its state.json names, got none called "
                f"{shown(name)}. Copy the folder again."
            )
        files.append(str(path / name))
    return files


def _listed(file: Path, key: str) -> list[Any]:
    found = read_object(file).get(key)
    return found if isinstance(found, list) else [found]
