"""Lock of a folder: one process at a time owns what lies in it, wherever the others run."""

import errno
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from balora_jax.errors import InputError

NAME, HOLDER = "run.lock", "run.lock.json"
"""The file that is locked, and the one that says by whom; both go when the lock is released."""

_WHO = {"host", "process", "start"}
_LONGEST = 4096  # bytes of a file that says so
_TRIES = 20
_WAIT = 2.0  # seconds: another process may only look, or has not yet written who it is


@contextmanager
def locked(folder: Path) -> Iterator[Callable[[], bool]]:
    """Hold the lock of a folder, which is made if it is not there.

    The system holds the lock (``flock``, on NFS by the server), so a crash releases it on every
    host. On leaving, its two files go, and folders that were made for it and are still empty.

    Yields what says whether the folder is still the one that was locked: somebody may have moved
    or removed it, and another may hold what has its name now.

    Raises:
        InputError: another process holds it; the sentence names it.
        OSError: the folder cannot be written.
    """
    lock, made = _taken(folder)
    who = _who()

    def is_held() -> bool:
        try:
            return (folder / HOLDER).read_bytes() == who
        except OSError:
            return False

    try:
        (folder / HOLDER).write_bytes(who)
        yield is_held
    finally:
        doomed = (HOLDER, NAME) if is_held() else ()
        for name in doomed:  # while it is held: who waits for it looks again
            with suppress(OSError):
                (folder / name).unlink()
        lock.release()
        for parent in made if doomed else ():
            with suppress(OSError):  # not empty: the run wrote into it
                parent.rmdir()


@contextmanager
def turn(file: Path, wait: Callable[[], None]) -> Iterator[None]:
    """Hold the right to write a file in a folder that runs share, once nobody else has it.

    ``wait`` is called where somebody does. A crash releases it.

    Raises:
        OSError: the folder cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    name = file.with_name(f".{file.name}.lock")
    lock = FileLock(name, thread_local=False)
    try:
        lock.acquire(timeout=_WAIT)
    except Timeout:
        wait()
        lock.acquire()
    try:
        yield
    finally:
        with suppress(OSError):  # while it is held; the next one makes it anew
            name.unlink()
        lock.release()


def check_not_held(folder: Path) -> None:
    """Raises InputError where another process holds the lock; writes nothing that was not there."""
    _check_ours(folder)
    if (folder / NAME).is_file():
        lock = _acquired(folder)
        if not (folder / HOLDER).exists():  # released in between: this has made the file anew
            with suppress(OSError):
                (folder / NAME).unlink()
        lock.release()


def _check_ours(folder: Path) -> None:
    """Raises InputError where a user's file has the name of one of the two: they would go."""
    for name, is_ours in ((NAME, lambda path: path.stat().st_size == 0), (HOLDER, _names_holder)):
        path = folder / name
        try:
            ours = path.is_file() and not path.is_symlink() and is_ours(path)
        except FileNotFoundError:  # released in between
            continue
        if os.path.lexists(path) and not ours:
            raise InputError(
                f"{path}: expected the file by which a run locks its folder, got another one of "
                "that name. Move it elsewhere."
            )


def _names_holder(file: Path) -> bool:
    """Whether a file says who holds the lock, or is about to."""
    with file.open("rb") as stream:
        content = stream.read(_LONGEST)
    with suppress(ValueError, TypeError, RecursionError):
        return not content or set(json.loads(content)) == _WHO
    return False


def _taken(folder: Path) -> tuple[FileLock, list[Path]]:
    """The lock, held, and the folders that were made for it."""
    _check_ours(folder)
    for _ in range(_TRIES):
        made = _make(folder)
        with suppress(FileNotFoundError):  # another process has removed the folder again
            return _acquired(folder), made
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))


def _acquired(folder: Path) -> FileLock:
    lock = FileLock(folder / NAME, timeout=_WAIT, thread_local=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"--workdir {folder}: expected a folder that no other run is using, got one in use by "
            f"{_holder(folder)}. Wait for its end, or choose another folder."
        ) from error
    return lock


def _make(folder: Path) -> list[Path]:
    """Make a folder; returns those that were not there, the deepest first."""
    made = []
    for parent in (folder, *folder.parents):
        if parent.exists():
            break
        made.append(parent)
    folder.mkdir(parents=True, exist_ok=True)
    return made


def _who() -> bytes:
    """This process, as no other is called."""
    who = {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "start": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
    return (json.dumps(who) + "\n").encode()


def _holder(folder: Path) -> str:
    """Who holds the lock, in words; a holder that has just begun may not have written it yet."""
    try:
        who: dict[str, Any] = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        return f"process {who['process']} on {who['host']} since {who['start']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
