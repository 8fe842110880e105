"""A folder in an object store (``gs://bucket/folder``): whole objects by name, by fsspec.

A store has no rename, no append and no lock; what a name holds changes from one whole content to
another. The library of the scheme (gcsfs) comes with the extra ``gcs``.
"""

import errno
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from balora_jax.errors import InputError

_OTHERS = (("gcsfs.retry", "HttpError"), ("google.auth.exceptions", "GoogleAuthError"))
"""Errors of the library that are none of Python's own."""


class Store:
    """The objects below an address.

    Args:
        address: ``gs://BUCKET/FOLDER``.
        where: opens the message where it cannot be opened.

    Raises:
        InputError: the library is not installed, or the address is no folder of a bucket.

    Every method raises OSError, with the address in its sentence, where the store does not answer.
    """

    def __init__(self, address: str, where: str):
        import fsspec

        self.address = address.rstrip("/")
        try:
            # A listing that is kept would not show what other hosts write.
            self._files, root = fsspec.core.url_to_fs(self.address, use_listings_cache=False)
        except ImportError as error:
            raise InputError(
                f"{where}: expected the library for such an address, got none ({error}). Install "
                'it: pip install "balora_jax[gcs]".'
            ) from error
        self._root = root.rstrip("/") + "/"

    def names(self) -> list[str]:
        """Names of all objects, relative to the address, sorted."""
        with self._talking():
            self._files.invalidate_cache()
            try:
                found = self._files.find(self._root, detail=True)
            except FileNotFoundError:
                return []
        paths = (path for path, about in found.items() if about.get("type", "file") == "file")
        names = (path.removeprefix(self._root) for path in paths if path.startswith(self._root))
        return sorted(self._inside(name) for name in names if name and not name.endswith("/"))

    def read(self, name: str) -> bytes | None:
        """The content of an object; None where there is none."""
        with self._talking():
            self._files.invalidate_cache()
            try:
                return self._files.cat_file(self._root + name)
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """Put a whole object in the place of what was there."""
        with self._talking():
            self._files.pipe_file(self._root + name, content)

    def create(self, name: str, content: bytes) -> bool:
        """Put an object where there is none, in one step; whether it was so.

        A library that cannot do both in one step may overwrite one of the same moment.
        """
        if self.read(name) is not None:
            return False
        with self._talking():
            try:
                self._files.pipe_file(self._root + name, content, mode="create")
            except FileExistsError:
                return False
            except OSError as error:  # what some versions say of the store's own refusal
                if "conditionNotMet" not in str(error) and "412" not in str(error):
                    raise
                return False
        return self.read(name) == content

    def get(self, names: Sequence[str], folder: Path) -> None:
        """Copy objects to files of the same names below a folder."""
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if names:
            with self._talking():
                there = [str(folder / name) for name in names]
                self._files.get([self._root + name for name in names], there)

    def put(self, names: Sequence[str], folder: Path) -> None:
        """Copy files below a folder to objects of the same names."""
        if names:
            with self._talking():
                here = [str(folder / name) for name in names]
                self._files.put(here, [self._root + name for name in names])

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects, one after the other; one that is not there is none to remove."""
        for name in names:
            with self._talking():
                try:
                    self._files.rm_file(self._root + name)
                except FileNotFoundError:
                    continue

    def _inside(self, name: str) -> str:
        if ".." in PurePosixPath(name).parts:
            raise OSError(errno.EINVAL, f"{self.address} holds an object with the name {name!r}")
        return name

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """Turn whatever the library raises into an OSError that names the address."""
        try:
            yield
        except FileNotFoundError as error:
            raise OSError(errno.ENOENT, f"{self.address}: {error}") from error
        except (OSError, ValueError, RuntimeError, *_errors_of_libraries()) as error:
            line = " ".join(str(error).split())[:300] or type(error).__name__
            raise OSError(errno.EIO, f"{self.address}: {line}") from error


def _errors_of_libraries() -> list[type[Exception]]:
    """Classes of the libraries that are loaded; they need not be there."""
    found: list[Any] = [getattr(sys.modules.get(name), kind, None) for name, kind in _OTHERS]
    return [kind for kind in found if kind is not None]
