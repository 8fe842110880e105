"""Compiled programs that are kept for the next process, in a folder of the user's.

JAX asks :class:`Programs` for the program of a key, which it makes of the program's text, the
devices, its own version and the compiler's flags. An entry is a digest and what JAX gave: what is
damaged is as if it were not there. Nothing that goes wrong here ends a run.

A program for a CPU may use what another processor lacks, and is split for the cores it may use, so
that each kind of machine has a folder of its own in the one that is named.
"""

import hashlib
import os
import platform
import re
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import jax
import numpy as np
from jax._src import compilation_cache  # what opens a cache has no public name
from jax.experimental import multihost_utils

from balora_jax.parallel import hosts
from balora_jax.paths import named_folder

VARIABLE = "BALORA_COMPILATION_CACHE"
"""Environment variable that says what ``training.compilation_cache: auto`` means here."""

LIMIT = 2 * 2**30
"""Bytes of a kind of machine's programs where ``JAX_COMPILATION_CACHE_MAX_SIZE`` gives no limit."""

_SETTING = "training.compilation_cache"
_REMEDY = (
    f"Programs are compiled anew in every process; name another with {_SETTING} or {VARIABLE}, or "
    "none."
)
_DIGEST = 16
_DRAFT = ".draft-"
_CPU_LINES = re.compile(r"(vendor_id|cpu family|model|stepping|flags|Features|CPU \w+)\s*:")


class Programs:
    """Compiled programs by key, in files that are whole or not there; what JAX calls a cache.

    Args:
        folder: made when something is written; other processes may write in it at the same time.
        limit: bytes in it, beyond which what was longest unused is removed.
    """

    def __init__(self, folder: Path, limit: int):
        self._path, self._limit = folder, limit
        self._room: int | None = None  # unknown until something is written
        self._said = False

    def get(self, key: str) -> bytes | None:
        """What was put under a key; None where there is nothing, or something damaged."""
        file = self._path / key
        try:
            content = file.read_bytes()
            if _sealed(content[_DIGEST:]) != content:
                file.unlink()
                return None
            os.utime(file)
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                self._say(error)
            return None
        return content[_DIGEST:]

    def put(self, key: str, value: bytes) -> None:
        """Keep a value; nothing is kept where the folder or the disk cannot."""
        content = _sealed(value)
        if self._said or len(content) > self._limit:
            return
        try:
            _make(self._path)
            self._make_room(len(content))
            _write(self._path / key, content)
        except OSError as error:
            self._say(error)

    def _make_room(self, size: int) -> None:
        """Remove what was longest unused, until so many bytes are left."""
        if self._room is None or self._room < size:
            files = sorted(_files(self._path))
            self._room = self._limit - sum(held for _, held, _ in files)
            for _, held, file in files:
                if self._room >= size:
                    break
                file.unlink(missing_ok=True)
                self._room += held
        self._room -= size

    def _say(self, error: OSError) -> None:
        if not self._said:
            self._said = True
            _warn(self._path, error)


@contextmanager
def kept(setting: str) -> Iterator[None]:
    """Keep the programs that are compiled inside; JAX's settings are afterwards what they were.

    Nothing is changed where JAX keeps programs already, as ``JAX_COMPILATION_CACHE_DIR`` tells it
    to. All processes of a run must call it, once they have joined.

    Args:
        setting: ``auto``, ``none`` or a folder.

    Raises:
        InputError: a text that names no folder of this system's.
    """
    named = _named(setting)  # refused even where JAX has a folder already
    folder = None if jax.config.values.get("jax_compilation_cache_dir") else _opened(named)
    if folder is None:
        yield
        return
    limit = jax.config.values["jax_compilation_cache_max_size"]
    cache = Programs(folder, LIMIT if limit < 0 else limit)
    before = compilation_cache.get_file_cache
    changes: dict[str, object] = {"jax_compilation_cache_dir": str(folder)}
    changes["jax_persistent_cache_enable_xla_caches"] = "none"  # files of XLA's own, without limit
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        changes["jax_persistent_cache_min_compile_time_secs"] = 0.0  # a start has many small ones
    with _settings(changes):
        compilation_cache.reset_cache()
        compilation_cache.get_file_cache = lambda path: (cache, path)  # type: ignore[assignment]
        try:
            yield
        finally:
            compilation_cache.get_file_cache = before
            compilation_cache.reset_cache()


@contextmanager
def _settings(changes: dict[str, object]) -> Iterator[None]:
    before = {name: jax.config.values[name] for name in changes}
    try:
        for name, value in changes.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def _opened(named: Path | None) -> Path | None:
    """The folder of this kind of machine; None for no cache."""
    folder = None if named is None else named / machine()
    if folder is None or jax.process_count() == 1:
        return folder
    return folder if _shared(folder) else None


def _named(setting: str) -> Path | None:
    """The folder that a setting means.

    Raises:
        InputError: it names none.
    """
    where = _SETTING
    if setting == "auto":
        where, setting = VARIABLE, os.environ.get(VARIABLE) or "auto"
    if setting == "none":
        return None
    if setting != "auto":
        return named_folder(os.path.expanduser(setting), where)
    home = os.environ.get("XDG_CACHE_HOME", "")
    home = home if os.path.isabs(home) else os.path.expanduser("~/.cache")
    return Path(home) / "balora_jax" / "compiled"


def _shared(folder: Path) -> bool:
    """Whether all processes see this folder; all must ask.

    Only the first process writes, and processes of which only some find a program might wait for
    each other in the compiler.
    """
    token, failure = folder / f"{_DRAFT}{hosts.from_first(uuid.uuid4().hex)}", None
    if hosts.is_first():
        try:
            _make(folder)
            token.touch()
        except OSError as error:
            failure = error
            _warn(folder, error)
    hosts.barrier("compilation cache")
    shared = bool(np.all(multihost_utils.process_allgather(np.asarray(os.path.exists(token)))))
    if hosts.is_first():
        with suppress(OSError):
            token.unlink()
    if not shared and failure is None:
        hosts.warn(
            f"compilation cache {folder}: expected a folder that all hosts share, got one that "
            f"some do not see. {_REMEDY}"
        )
    return shared


def machine() -> str:
    """A name for the kind of machine whose compiled programs this one can run."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = [platform.system(), platform.machine(), str(cores)]
    facts += [os.environ.get(name, "") for name in ("NPROC", "PJRT_NPROC")]
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        facts += sorted({line for line in lines if _CPU_LINES.match(line)})
    except OSError:  # nothing else tells the features of a processor everywhere: this machine alone
        facts += [platform.processor(), platform.node()]
    return hashlib.blake2b("\n".join(facts).encode(), digest_size=8).hexdigest()


def _make(folder: Path) -> None:
    """Make a folder that only its user may read: who writes here has programs run."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def _sealed(value: bytes) -> bytes:
    return hashlib.blake2b(value, digest_size=_DIGEST).digest() + value


def _write(file: Path, content: bytes) -> None:
    """Write a whole file or nothing."""
    handle, draft = tempfile.mkstemp(prefix=_DRAFT, dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.replace(draft, file)
    except OSError:
        with suppress(OSError):
            os.unlink(draft)
        raise


def _files(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """Last use, bytes and path of everything in a folder; a new draft is its writer's alone."""
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                found = entry.stat(follow_symlinks=False)
                new = entry.name.startswith(_DRAFT) and time.time() - found.st_mtime < 3600
                if entry.is_file(follow_symlinks=False) and not new:
                    yield found.st_mtime, found.st_size, Path(entry.path)


def _warn(folder: Path, error: OSError) -> None:
    hosts.warn(
        f"compilation cache {folder}: expected a folder to read and write in, got: "
        f"{error.strerror or error}. {_REMEDY}"
    )
