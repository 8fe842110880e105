"""The protocol of a verb, and the figures that most of them can write to a file."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from balora_jax.errors import InputError
from balora_jax.options import add_config
from balora_jax.paths import check_local, is_store
from balora_jax.untyped.shown import shown

if TYPE_CHECKING:
    from balora_jax.config import RunConfig


_BEGINS = (b'{\n  "', b"[\n  {", b"{}\n", b"[]\n")
"""How reports begin: what ``--json`` may replace."""


@dataclass(frozen=True)
class Verb:
    """One command of ``balora``.

    Attributes:
        name: what stands after ``balora``.
        summary: one line of ``balora --help``.
        add_options: adds its own options to those that every verb has (config and ``--set``).
        run: does it with the config; returns an exit code, None for 0. It imports what it needs,
            so that ``balora --help`` need not.
    """

    name: str
    summary: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[["RunConfig", argparse.Namespace], int | None]

    def add_parser(self, commands: Any) -> None:
        """Add the verb to the parsers of all of them."""
        parser = commands.add_parser(self.name, help=self.summary)
        add_config(parser)
        parser.set_defaults(run=self.run)
        self.add_options(parser)


def check_text(arguments: Sequence[str]) -> None:
    """Raises InputError for an argument with bytes that are no UTF-8: no file could hold it."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{shown(argument)}: expected text in UTF-8, got other bytes. Rename or quote it."
            ) from error


def check_paths(options: argparse.Namespace) -> None:
    """Raises InputError for an option whose path is an address such as ``gs://…``."""
    for name in ("config", "workdir", "adapter", "out", "json", "picture"):
        path = getattr(options, name, None)
        to_store = name == "workdir" and getattr(options, "takes_store", False) and is_store(path)
        if path is not None and not to_store:
            check_local(path, path if name == "config" else f"--{name} {path}")


def check_report(file: str | None) -> None:
    """Raises InputError for a ``--json`` that cannot be written: before the work, not after it."""
    if file is not None:
        from balora_jax.io.folders import check_file

        check_file(file, f"--json {file}", begins=_BEGINS)


def report(figures: Any, file: str | None) -> None:
    """Print figures as JSON, or write them to the file of ``--json``."""
    text = json.dumps(figures, indent=2, ensure_ascii=False)
    if file is None:
        print(text)
        return
    from balora_jax.io.folders import write_atomically

    try:
        write_atomically(Path(file), text + "\n")
    except OSError as error:
        raise InputError(
            f"--json {file}: expected a file that can be written, got {error.strerror}. Choose "
            "another."
        ) from error
    print(f"wrote {file}")


def path_or_none(name: str | None) -> Path | None:
    """The path of an option that may be left out."""
    return None if name is None else Path(name)
