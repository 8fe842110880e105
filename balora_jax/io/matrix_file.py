"""A large matrix in one file: written a block of rows at a time, whole or not at all, then mapped.

The file is safetensors with one tensor, ``rows``. Its metadata hold a key, which says what the
numbers are, and the SHA-256 of the numbers, so that damage and another's file are found.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from balora_jax.io.folders import replaced_file

_NAMES = {"float32": "F32", "bfloat16": "BF16"}
_NO_DIGEST = "0" * 64
_BLOCK = 2**24  # bytes read at a time


@dataclass(frozen=True)
class Matrix:
    """What a file is to hold.

    Attributes:
        key: what the numbers are, in 64 hexadecimal digits.
        rows, width: its shape.
        dtype: ``float32`` or ``bfloat16``.
    """

    key: str
    rows: int
    width: int
    dtype: str

    @property
    def item(self) -> np.dtype:
        """The dtype of the numbers."""
        return np.dtype(getattr(ml_dtypes, self.dtype, self.dtype))

    @property
    def data_bytes(self) -> int:
        """Bytes of the numbers."""
        return self.rows * self.width * self.item.itemsize

    @property
    def file_bytes(self) -> int:
        """Bytes of the file."""
        return len(self._header(_NO_DIGEST)) + self.data_bytes

    def write(self, file: Path, blocks: Iterable[np.ndarray]) -> None:
        """Write blocks [n, width] one after another.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
            ValueError: the blocks are not of this shape and dtype.
        """
        digest, written = hashlib.sha256(), 0
        with replaced_file(file) as draft, draft.open("r+b") as stream:
            stream.write(self._header(_NO_DIGEST))
            for block in blocks:
                if block.shape[1:] != (self.width,) or block.dtype != self.item:
                    raise ValueError(f"expected rows [n, {self.width}] of {self.dtype}")
                content = np.ascontiguousarray(block).view(np.uint8).reshape(-1).data
                stream.write(content)
                digest.update(content)
                written += len(block)
            if written != self.rows:
                raise ValueError(f"expected {self.rows} rows, got {written}")
            stream.seek(0)
            stream.write(self._header(digest.hexdigest()))
            stream.flush()
            os.fsync(stream.fileno())

    def fault(self, file: Path) -> str | None:
        """What is wrong with a file, in words; None where it holds this matrix, as it was written.

        All of it is read.
        """
        with file.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size != self.file_bytes:
                return "it is cut short, or is not of this model and data"
            first = stream.read(self.file_bytes - self.data_bytes)
            digest = hashlib.sha256()
            while block := stream.read(_BLOCK):
                digest.update(block)
        if first != self._header(digest.hexdigest()):
            is_mine = self.key.encode() in first
            return "it is damaged" if is_mine else "it is of another teacher or other data"
        return None

    def mapped(self, file: Path) -> np.ndarray:
        """The rows [rows, width] of a file without a fault, read where they are asked for."""
        offset = self.file_bytes - self.data_bytes
        shape = (self.rows, self.width)
        if not self.rows:  # there is nothing to map
            return np.empty(shape, self.item)
        return np.memmap(file, dtype=self.item, mode="r", offset=offset, shape=shape)

    def _header(self, digest: str) -> bytes:
        """The beginning of the file, whose length does not depend on the digest."""
        tensor = {
            "dtype": _NAMES[self.dtype],
            "shape": [self.rows, self.width],
            "data_offsets": [0, self.data_bytes],
        }
        about = {"__metadata__": {"key": self.key, "sha256": digest}, "rows": tensor}
        text = json.dumps(about, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text
