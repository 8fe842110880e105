"""A bucket that is a folder: what ``gs://`` means in tests, to every process that installs it.

Objects lie beside each other, whatever their names; each is there as a whole or not at all. There is
no rename, no append and no lock.
"""

import os
import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, unquote

import fsspec
from fsspec.spec import AbstractFileSystem


class Bucket(AbstractFileSystem):
    """Enough of a file system for what is asked of one."""

    protocol = "gs"
    cachable = False
    root = Path()

    def _file(self, path):
        return self.root / quote(self._strip_protocol(path), safe="")

    def find(self, path, maxdepth=None, withdirs=False, detail=False, **_):
        prefix = self._strip_protocol(path).rstrip("/") + "/"
        names = sorted(unquote(file.name) for file in self.root.iterdir())
        found = {name: self.info(name) for name in names if name.startswith(prefix)}
        return found if detail else list(found)

    def info(self, path, **_):
        size = self._file(path).stat().st_size
        return {"name": self._strip_protocol(path), "size": size, "type": "file"}

    def cat_file(self, path, start=None, end=None, **_):
        return self._file(path).read_bytes()[start:end]

    def pipe_file(self, path, value, mode="overwrite", **_):
        self._place(path, lambda draft: draft.write_bytes(value), mode)

    def put_file(self, lpath, rpath, mode="overwrite", **_):
        self._place(rpath, lambda draft: shutil.copyfile(lpath, draft), mode)

    def get_file(self, rpath, lpath, **_):
        shutil.copyfile(self._file(rpath), lpath)

    def rm_file(self, path):
        os.remove(self._file(path))

    def _place(self, path, fill, mode):
        handle, name = tempfile.mkstemp(dir=f"{self.root}.drafts")
        os.close(handle)
        draft = Path(name)
        fill(draft)
        if mode == "create":
            try:
                os.link(draft, self._file(path))  # fails where something is
            finally:
                draft.unlink()
        else:
            os.rename(draft, self._file(path))


def install(root):
    """Let ``gs://`` lead to a folder, in this process."""
    Path(f"{root}.drafts").mkdir(parents=True, exist_ok=True)
    Path(root).mkdir(parents=True, exist_ok=True)
    Bucket.root = Path(root)
    fsspec.register_implementation("gs", Bucket, clobber=True)


@contextmanager
def installed(root):
    """The same for as long as a block runs."""
    known = sys.modules["fsspec.registry"]._registry
    before = known.get("gs")
    install(root)
    try:
        yield root
    finally:
        del known["gs"]
        if before is not None:
            known["gs"] = before


def unpacked(root, address, folder):
    """The objects below an address as files in a folder, which is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    Path(folder).mkdir(parents=True)
    prefix = address.removeprefix("gs://") + "/"
    for file in Path(root).iterdir():
        name = unquote(file.name)
        if name.startswith(prefix):
            target = Path(folder) / name.removeprefix(prefix)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    return Path(folder)
