"""A folder sent to the hub as a repository of its own, or refused in one sentence."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)

from balora_jax.errors import InputError
from balora_jax.progress import is_live
from balora_jax.untyped.native import words_of
from balora_jax.untyped.shown import one_line, shown

_OF_ANY_REPOSITORY = {".gitattributes", ".gitignore", "README.md", "LICENSE", "LICENSE.txt"}
_REFUSALS = {
    401: ("a token that the hub takes", "a refusal (401)", "Log in again: hf auth login."),
    403: ("a token that may write there", "a refusal (403)", "Make one with write access."),
    404: ("an owner that is there", "none (404)", "Check the name, and whose token it is."),
}


def check_push(name: str) -> None:
    """See that a push may be tried; asks nobody.

    Raises:
        InputError: no name of a repository, or no token.
    """
    try:
        validate_repo_id(name)
        good = name == name.strip()  # the pattern there lets a line break at the end through
    except ValueError:
        good = False
    if not good:
        raise InputError(
            f"--push-to-hub {shown(name)}: expected OWNER/NAME, got another form. Correct it."
        )
    if name.count("/") != 1:
        raise InputError(f"--push-to-hub {name}: expected OWNER/NAME, got no owner. Add it.")
    if get_token() is None:
        raise InputError(
            f"--push-to-hub {name}: expected a token of the hub, got none. Log in with "
            "`hf auth login`, or set HF_TOKEN."
        )


def push(folder: Path, name: str, *, marker: str, private: bool) -> str:
    """Send the files of a folder, and nothing else, to a repository that is made if need be.

    Args:
        folder: what is sent.
        name: ``OWNER/NAME``.
        marker: file by which a repository of the same kind is known.
        private: whether others may not see it.

    Returns:
        Its address.

    Raises:
        InputError: the hub cannot be reached or refuses, or the repository is there and is public
            though ``private`` is asked for, or holds something of another kind.
    """
    try:
        with _no_bars_in_logs():
            api = HfApi()
            url = api.create_repo(name, private=True if private else None, exist_ok=True)
            _check_repository(api, name, marker, private)
            api.upload_folder(
                repo_id=name, folder_path=folder, commit_message="Exported by balora_jax"
            )
    except InputError as error:
        raise InputError(f"--push-to-hub {name}: {error} {_kept(folder)}") from error
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        # Of a large file the client raises a RuntimeError from what happened.
        reason = error.__cause__ if type(error) is RuntimeError else None
        said = _sentence(reason or error)
        raise InputError(f"--push-to-hub {name}: {said} {_kept(folder)}") from error
    return str(url)


def _check_repository(api: HfApi, name: str, marker: str, private: bool) -> None:
    info = api.model_info(name)
    if private and not info.private:
        raise InputError(
            "expected a private repository, got a public one that is there already. Make it "
            "private on the hub, or choose another name."
        )
    there = {file.rfilename for file in info.siblings or ()}
    others = sorted(there - _OF_ANY_REPOSITORY)
    if others and marker not in there:
        raise InputError(
            f"expected a new repository or one with {marker}, got one with {shown(others[0])}. "
            "Choose another name."
        )


def _sentence(error: BaseException) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in _REFUSALS:
        expected, got, remedy = _REFUSALS[status]
        return f"expected {expected}, got {got}. {remedy}"
    reason = one_line(words_of(error), most=200).rstrip(".")
    if status is None and not isinstance(error, ValueError | RuntimeError):
        return f"expected a hub that can be reached, got: {reason}. Check the network."
    return f"expected the hub to take it, got: {reason}. Correct that."


def _kept(folder: Path) -> str:
    return f"What is exported stays in {folder}."


@contextlib.contextmanager
def _no_bars_in_logs() -> Iterator[None]:
    if is_live(sys.stderr) or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
