"""Files and folders that a reader never sees half written."""

import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from balora_jax.errors import InputError
from balora_jax.io import seals

_PARTIAL = ".partial"


def write_atomically(path: Path, text: str, *, drafts: Path | None = None) -> None:
    """Write a whole file or nothing; its draft lies beside it, or in another folder."""
    with replaced_file(path, drafts=drafts) as draft:
        draft.write_text(text, encoding="utf-8")


@contextmanager
def replaced_file(path: Path, *, drafts: Path | None = None) -> Iterator[Path]:
    """Yield an empty sibling file that takes the place of ``path`` when the block succeeds.

    Its name is new, so that nothing that lies there is written to; a link in the place of ``path``
    is replaced, not followed. On any error the sibling is removed. It lies in ``drafts`` where that
    is given: a folder on the same disk.
    """
    place = drafts or path.parent
    handle, name = tempfile.mkstemp(prefix=_prefix(path), suffix=_PARTIAL, dir=place)
    os.close(handle)
    draft = Path(name)
    try:
        draft.chmod(0o644)  # mkstemp makes it private; the result is an ordinary file
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def drafts_of(folder: Path, names: Iterable[str]) -> list[Path]:
    """What writers of these files and folders left beside them when they were killed."""
    any_name = "|".join(map(re.escape, names))
    draft = re.compile(rf"\.({any_name})\.(old\.)?[a-z0-9_]{{8}}{re.escape(_PARTIAL)}")
    return [child for child in folder.iterdir() if draft.fullmatch(child.name)]


def check_file(path: str | Path, where: str, *, begins: tuple[bytes, ...]) -> None:
    """See that :func:`replaced_file` may write a file: before the work, not after it.

    Args:
        path: of the file.
        where: opens the message.
        begins: how a file begins that may be replaced: nobody's but one of the same kind.

    Raises:
        InputError: something else is there, or no folder to write to, or a name that the system
            refuses.
    """
    path = Path(path)
    try:
        if not str(path).strip() or path.name in ("", ".."):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        seals.check_outside(path, where)
        got = _in_the_way(path, begins)
        with tempfile.NamedTemporaryFile(prefix=_prefix(path), dir=path.parent):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{where}: expected a file that can be written, got {reason}. Choose another."
        ) from error
    if got is not None:
        raise InputError(
            f"{where}: expected a new file, or one that the same command wrote before, got {got}, "
            "which would be lost. Choose another."
        )


def _in_the_way(path: Path, begins: tuple[bytes, ...]) -> str | None:
    """What is in a file's place and must stay; None where nothing is."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        return "a link, a pipe or a device"
    with path.open("rb") as stream:
        found = stream.read(max(map(len, begins)))
    return None if found.startswith(begins) else "another file"


def _prefix(path: Path) -> str:
    """The beginning of the name of a draft: hidden, and never too long for the system."""
    return f".{path.name[:100]}."


def begins_with(file: Path, text: str) -> bool:
    """Whether a file is there and begins with a text."""
    if not file.is_file():
        return False
    wanted = text.encode()
    with file.open("rb") as content:
        return content.read(len(wanted)) == wanted


@contextmanager
def replaced_folder(
    target: str | Path, *, may_replace: Callable[[Path], bool] = lambda _: False
) -> Iterator[Path]:
    """Yield an empty sibling folder that takes the place of ``target`` when the block succeeds.

    On any error the sibling is removed and ``target`` is as it was before.

    Args:
        target: the folder to be written; missing parents are made.
        may_replace: says whether an existing folder that is not empty may be replaced.

    Raises:
        InputError: ``target`` is a file, is a folder with other content or one that cannot be
            renamed, or cannot be written.
    """
    target = Path(target)
    _check_free(target, may_replace)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = _sibling(target, "")
    except OSError as error:
        raise InputError(
            f"{target}: expected a folder that can be written, got {error.strerror or error}. "
            "Choose another output folder or change its permissions."
        ) from error
    try:
        draft.chmod(0o755)  # mkdtemp makes it private; the result is an ordinary folder
        yield draft
        _swap(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _sibling(target: Path, kind: str) -> Path:
    """An empty folder beside the target, with a name that only this module makes."""
    prefix = _prefix(target) + kind
    return Path(tempfile.mkdtemp(prefix=prefix, suffix=_PARTIAL, dir=target.parent))


def _check_free(target: Path, may_replace: Callable[[Path], bool]) -> None:
    seals.check_outside(target, str(target))
    if not target.exists():
        if target.is_symlink():
            raise InputError(
                f"{target}: expected a folder to write to, got a link to nothing. Choose another."
            )
        return
    if not target.is_dir():
        raise InputError(f"{target}: expected a folder to write to, got a file. Choose another.")
    if target.is_symlink() or target.is_mount() or target.samefile(os.curdir):
        raise InputError(
            f"{target}: expected a folder that another can take the place of, got a link, a mount "
            "or the folder you are in. Name a new folder inside of it."
        )
    if any(target.iterdir()) and not may_replace(target):
        raise InputError(
            f"{target}: expected a new or empty folder, got one with other files in it. "
            "Choose another output folder or empty this one."
        )


def _swap(draft: Path, target: Path) -> None:
    """Rename ``draft`` to ``target``; what was there before is put back if that fails."""
    if not target.exists():
        os.rename(draft, target)
        return
    old = _sibling(target, "old.")
    os.replace(target, old)
    try:
        os.rename(draft, target)
    except OSError:
        os.replace(old, target)
        raise
    shutil.rmtree(old)
