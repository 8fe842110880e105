"""Paths in a configuration, and the files that they mean.

A plain path is taken as it is. ``balora_jax:quickstart/train.jsonl`` means a file that is shipped
inside the installed package, so that a configuration works from any folder.
"""

import os
import re
import stat
from pathlib import Path, PurePosixPath
from typing import Literal

from balora_jax.errors import InputError
from balora_jax.untyped.shown import one_line

PACKAGE_PREFIX = "balora_jax:"
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # a Path makes one slash of two
_STORE = re.compile(r"gs://[^/\s]+(/\S*)?")
_ADVICE = {"gs": "Copy it here (gcloud storage cp --recursive) or mount the bucket (gcsfuse)"}
_NO_TEXT = "a character that no path can have"  # Python's own words differ by version
_PACKAGE_ROOT = Path(__file__).resolve().parent


def resolve_path(text: str) -> str:
    """Turn the text of a path (or of a hub name) into what may be opened.

    Args:
        text: A path, a hub name, or ``balora_jax:`` followed by a path inside the package.

    Returns:
        The absolute path for a package path; otherwise `text` with a leading ``~`` expanded.
        Whether anything is there is left to the reader, who knows what it expects.

    Raises:
        InputError: The text is empty or no path of this system's, or a package path is absolute or
            leads outside the package.

    >>> resolve_path("org/model")
    'org/model'
    >>> resolve_path("balora_jax:quickstart/a.jsonl").endswith("balora_jax/quickstart/a.jsonl")
    True
    """
    if not text.strip():
        raise InputError("path: expected a path or a hub name, got empty text. Give one.")
    check_local(text, text)
    if not text.startswith(PACKAGE_PREFIX):
        return _expanded(text)
    inside = PurePosixPath(text.removeprefix(PACKAGE_PREFIX))
    if inside.is_absolute() or ".." in inside.parts or not inside.parts:
        raise InputError(
            f"{text}: expected a relative path inside the package after {PACKAGE_PREFIX!r}, "
            f"got {str(inside)!r}. Leave the prefix out for a file elsewhere."
        )
    return str(_PACKAGE_ROOT.joinpath(*inside.parts))


def kind_of(path: str | Path) -> Literal["file", "folder", "other"] | None:
    """What lies at a path of a user's, links followed; None for nothing.

    Raises:
        InputError: the system cannot look there: a name too long, links in a circle, a folder
            above it that may not be read, a NUL in the text.

    >>> kind_of("/"), kind_of("/no/such/folder")
    ('folder', None)
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # ValueError: a NUL, or half a character
        reason = error.strerror if isinstance(error, OSError) else _NO_TEXT
        raise InputError(
            f"{one_line(str(path), most=200)}: expected a path that can be looked up, got: "
            f"{reason}. Check the path."
        ) from error
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"


def _expanded(text: str) -> str:
    """A path that the system can look for, its ``~`` expanded; whether it finds one is not said."""
    try:
        path = str(Path(text).expanduser()) if text.startswith("~") else text
    except RuntimeError as error:  # the home of nobody
        raise InputError(
            f"{text[:200]}: expected a path or a hub name, got: {error}. Correct it."
        ) from error
    if fault := path_fault(path):
        raise InputError(f"{text[:200]}: expected a path or a hub name, got: {fault}. Correct it.")
    return path


def path_fault(path: str | Path) -> str | None:
    """Reason of the system for which nothing can lie at a path; None where something could."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except (OSError, ValueError) as error:  # too long, a loop of links, a zero byte
        return error.strerror if isinstance(error, OSError) else _NO_TEXT
    return None


def named_folder(name: str | Path, option: str) -> Path:
    """The folder that an option names, whether it is there or not.

    Raises:
        InputError: The text is empty, an address, or no path of this system's.
    """
    check_local(name, f"{option} {name}")
    fault = path_fault(name) if str(name).strip() else "empty text"
    if fault:
        raise InputError(f"{option} {name}: expected a folder, got {fault}. Name another.")
    return Path(name)


def is_store(name: object) -> bool:
    """Whether a text is the address of a folder in an object store.

    >>> is_store("gs://bucket/runs/a"), is_store("runs/a"), is_store("s3://bucket/a")
    (True, False, False)
    """
    return isinstance(name, str) and _STORE.fullmatch(name) is not None


def check_local(path: str | Path, where: str) -> None:
    """Raises InputError for an address such as ``gs://…``: no file of one is read or written.

    >>> check_local("gs://b/run", "--workdir gs://b/run")
    Traceback (most recent call last):
    balora_jax.errors.InputError: --workdir gs://b/run: expected a path on this machine, got ...
    >>> check_local("runs/a:b", "--workdir runs/a:b")
    """
    found = _ADDRESS.match(str(path))
    if found is not None:
        advice = _ADVICE.get(found[1], "Mount it or copy it here")
        raise InputError(
            f"{where}: expected a path on this machine, got an address with the scheme "
            f"{found[1]}://. {advice}, and give that path."
        )
