"""Templates that lie in files of their own."""

from pathlib import Path

from balora_jax.data.templates import NAMES
from balora_jax.errors import InputError
from balora_jax.paths import kind_of, resolve_path

MOST_BYTES = 2**20


def template_of(named: str) -> str:
    """The template that ``data.template`` names: what has no place is a file, if there is one.

    Raises:
        InputError: the file cannot be read, or is no text.
    """
    if named in NAMES or "{" in named or not named.strip() or "\n" in named:
        return named
    return named if kind_of(resolve_path(named)) is None else read_template(named, "data.template")


def read_template(named: str, key: str) -> str:
    """The text of a template's file, without the line break at its end.

    Raises:
        InputError: no such file, one that cannot be read, or no UTF-8 text of at most 1 MiB.
    """
    path = resolve_path(named)
    if kind_of(path) != "file":
        raise InputError(f"{key}: expected a file, got none at {named!r}. Check the path.")
    with Path(path).open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{named}: expected UTF-8 text, got other bytes. Convert it.") from error
    if len(content) > MOST_BYTES or not text.strip():
        got = "none" if len(content) <= MOST_BYTES else "more"
        raise InputError(f"{named}: expected a template of up to 1 MiB, got {got}. Check the file.")
    return text.removesuffix("\n").removesuffix("\r")
