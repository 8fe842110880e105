"""Torch's weight files read as safetensors files are: by name, and only the numbers asked for.

Nothing of a file is run (:mod:`balora_jax.untyped.tensor_pickle`). Both of torch's formats hold
their numbers as they are: the zip archive of torch 1.6 and later, whose records are stored and not
compressed, and the older row of pickles. Every tensor's place is known when the file is opened; its
numbers are read when they are asked for, from the mapped file.
"""

import mmap
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from balora_jax.errors import InputError
from balora_jax.untyped.shown import one_line
from balora_jax.untyped.tensor_pickle import (
    MOST_BYTES,
    Storage,
    TensorView,
    UnfitError,
    read_tensors,
    read_value,
)

_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16, "I64": "<i8",
    "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?",
}  # fmt: skip
_ZIP, _LOCAL_HEADER = b"PK\x03\x04", 30
_MAGIC = 0x1950A86A20F9469CFC6C  # of the older format
_PROTOCOL = 1001
_COUNT = 8  # bytes of the number before each storage


@dataclass(frozen=True)
class _Span:
    """Bytes of a file."""

    start: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size


class TorchFile:
    """An opened file, with the methods of safetensors' handles that are used here."""

    def __init__(self, file: Path, tensors: dict[str, TensorView], spans: dict[str, _Span]):
        self._file = file
        self._tensors = tensors
        self._spans = spans
        self._size = file.stat().st_size

    @property
    def description(self) -> bytes:
        """Names, dtypes, shapes and places of all tensors: what a header says elsewhere."""
        return "\n".join(
            f"{name!r} {view} {self._spans[view.storage.key]}"
            for name, view in self._tensors.items()
        ).encode()

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return list(self._tensors)

    def get_slice(self, name: str) -> "TorchSlice":
        """What reads parts of a tensor."""
        return TorchSlice(self, self._tensors[name])

    def get_tensor(self, name: str) -> np.ndarray:
        """A whole tensor."""
        return self.get_slice(name)[...]

    @contextmanager
    def numbers(self, view: TensorView) -> Iterator[np.ndarray]:
        """A tensor in the mapped file, which is unmapped at the end.

        Raises:
            InputError: a file that has another size than when it was opened.
        """
        with (
            self._file.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        ):
            if len(mapped) != self._size:
                raise InputError(
                    f"{self._file}: expected {self._size} bytes, as before, got {len(mapped)}. "
                    "Let nothing write to it."
                )
            dtype = np.dtype(_DTYPES[view.storage.dtype])
            start = self._spans[view.storage.key].start + view.offset * dtype.itemsize
            strides = [step * dtype.itemsize for step in view.strides]
            yield np.ndarray(
                view.shape, dtype, mapped, start if 0 not in view.shape else 0, strides
            )


@dataclass(frozen=True)
class TorchSlice:
    """A tensor of which any rows and columns can be read."""

    file: TorchFile
    view: TensorView

    def get_shape(self) -> list[int]:
        """Its shape."""
        return list(self.view.shape)

    def get_dtype(self) -> str:
        """Its dtype, as safetensors writes it."""
        return self.view.storage.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        with self.file.numbers(self.view) as numbers:
            try:
                return np.array(numbers[index], order="C")
            finally:
                del numbers  # a view of the file keeps it from being unmapped


@contextmanager
def open_torch(file: Path) -> Iterator[TorchFile]:
    """A file of tensors by name that torch wrote.

    Raises:
        InputError: a file that is truncated or no such file, that is compressed, that wants
            anything run, or whose tensors lie outside of their storages.
    """
    try:
        with file.open("rb") as stream:
            packed = stream.read(len(_ZIP)) == _ZIP
            stream.seek(0)
            tensors, spans = _read_zip(stream) if packed else _read_row(stream)
    except (OSError, UnfitError, zipfile.BadZipFile) as error:
        reason = one_line(str(error) or type(error).__name__, most=200)
        raise InputError(
            f"{file}: expected a complete file of tensors by name, as torch saves them, got "
            f"{reason}. Download it again, or use safetensors weights of somebody you trust."
        ) from error
    yield TorchFile(file, tensors, spans)


def _read_zip(stream: BinaryIO) -> tuple[dict[str, TensorView], dict[str, _Span]]:
    """The format since torch 1.6: a record of the pickle, and one of each storage."""
    records = _records(stream)
    roots = [name.partition("/")[0] for name in records if name.partition("/")[2] == "data.pkl"]
    if len(roots) != 1:
        raise UnfitError("a zip archive without a data.pkl")
    order = records.get(f"{roots[0]}/byteorder")
    if order is not None and _content(stream, order) != b"little":
        raise UnfitError("numbers whose bytes are not in little-endian order")
    tensors = read_tensors(BytesIO(_content(stream, records[f"{roots[0]}/data.pkl"])))
    spans = {}
    for storage in _storages(tensors):
        record = records.get(f"{roots[0]}/data/{storage.key}")
        if record is None:
            raise UnfitError(f"no record of the storage {storage.key[:100]}")
        spans[storage.key] = span = _span(stream, record)
        if span.size < storage.count * np.dtype(_DTYPES[storage.dtype]).itemsize:
            raise UnfitError(
                f"{span.size} bytes of the storage {storage.key[:100]} for {storage.count} "
                f"numbers of {storage.dtype}"
            )
    _check_apart(spans.values())
    return tensors, spans


def _records(stream: BinaryIO) -> dict[str, zipfile.ZipInfo]:
    """The records by name, as the directory at the end describes them."""
    try:
        with zipfile.ZipFile(stream) as archive:
            found = archive.infolist()
    except (ValueError, RuntimeError) as error:  # what zipfile meets in a directory of noise
        raise UnfitError("a zip archive that is broken") from error
    records = {info.filename: info for info in found}
    if len(records) < len(found):
        raise UnfitError("two records of one name")
    return records


def _storages(tensors: dict[str, TensorView]) -> list[Storage]:
    """The storages, each once."""
    found: dict[str, Storage] = {}
    for view in tensors.values():
        if found.setdefault(view.storage.key, view.storage) != view.storage:
            raise UnfitError(f"two descriptions of the storage {view.storage.key[:100]}")
    return list(found.values())


def _content(stream: BinaryIO, record: zipfile.ZipInfo) -> bytes:
    span = _span(stream, record)
    if span.size > MOST_BYTES:
        raise UnfitError(f"{record.filename[:100]} of more than {MOST_BYTES} bytes")
    stream.seek(span.start)
    return stream.read(span.size)


def _span(stream: BinaryIO, record: zipfile.ZipInfo) -> _Span:
    """Where the bytes of a record lie; its own header says how long that header is."""
    name = record.filename[:100]
    plain = record.compress_type == zipfile.ZIP_STORED and record.compress_size == record.file_size
    if not plain or record.flag_bits & 1:
        raise UnfitError(f"the record {name}, compressed or encrypted")
    end = stream.seek(0, 2)
    inside = 0 <= record.header_offset < end
    stream.seek(record.header_offset if inside else end)
    header = stream.read(_LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER or header[:4] != _ZIP:
        raise UnfitError(f"no record {name} where it should be")
    more = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    span = _Span(record.header_offset + _LOCAL_HEADER + more, record.file_size)
    if span.end > end:
        raise UnfitError(f"the record {name}, which reaches beyond the file")
    return span


def _check_apart(spans: Iterable[_Span]) -> None:
    end = 0
    for span in sorted(spans, key=lambda span: span.start):
        if span.size and span.start < end:
            raise UnfitError("two storages that overlap")
        end = max(end, span.end)


def _read_row(stream: BinaryIO) -> tuple[dict[str, TensorView], dict[str, _Span]]:
    """The format before torch 1.6: five pickles, then each storage with its count before it."""
    head = BytesIO(stream.read(MOST_BYTES))
    size = stream.seek(0, 2)
    if read_value(head) != _MAGIC or read_value(head) != _PROTOCOL:
        raise UnfitError("something else")
    machine = read_value(head)
    if type(machine) is not dict or machine.get("little_endian") is not True:
        raise UnfitError("numbers whose bytes are not in little-endian order")
    tensors, keys = read_tensors(head), read_value(head)
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise UnfitError("a list of storages that is broken")
    storages = {storage.key: storage for storage in _storages(tensors)}
    spans: dict[str, _Span] = {}
    place = head.tell()
    for key in keys:
        storage = storages.get(key)
        stream.seek(place)
        if storage is None or stream.read(_COUNT) != storage.count.to_bytes(_COUNT, "little"):
            raise UnfitError(f"no storage {key[:100]} where it should be")
        width = np.dtype(_DTYPES[storage.dtype]).itemsize
        spans[key] = _Span(place + _COUNT, storage.count * width)
        place = spans[key].end
    if place > size or set(storages) - set(spans):
        raise UnfitError(f"{size} bytes in place of at least {place}")
    return tensors, spans
