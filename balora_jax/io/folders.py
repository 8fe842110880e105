"""Files and folders that a reader never sees half written."""

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from balora_jax.errors import InputError


def write_atomically(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    temporary = _partial(path)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def check_file(path: str | Path, where: str) -> None:
    """See that :func:`write_atomically` could write a file: before the work, not after it.

    Args:
        path: of the file.
        where: opens the message.

    Raises:
        InputError: a folder, or no folder to write to, or a name that the system refuses.
    """
    try:
        if not str(path).strip() or Path(path).name != os.path.basename(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        for name in (Path(path), _partial(Path(path))):
            with suppress(FileNotFoundError):
                if stat.S_ISDIR(os.stat(name).st_mode):
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=Path(path).parent):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{where}: expected a file that can be written, got {reason}. Choose another."
        ) from error


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


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
        InputError: ``target`` is a file, is a folder with other content, or cannot be written.
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
    prefix = f".{target.name}.{kind}"
    return Path(tempfile.mkdtemp(prefix=prefix, suffix=".partial", dir=target.parent))


def _check_free(target: Path, may_replace: Callable[[Path], bool]) -> None:
    if not target.exists():
        if target.is_symlink():
            raise InputError(
                f"{target}: expected a folder to write to, got a link to nothing. Choose another."
            )
        return
    if not target.is_dir():
        raise InputError(f"{target}: expected a folder to write to, got a file. Choose another.")
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
