"""``balora completion``: a script that completes commands, options and settings in a shell."""

import argparse
from collections.abc import Iterator
from typing import Any

from balora_jax.errors import InputError

_FOLDERS = ("workdir", "adapter", "out", "tokenizer")
_FILES = ("config", "json", "picture")
_KEYS = "_balora_settings"


def add_to(commands: Any, root: argparse.ArgumentParser) -> None:
    """Add the command; its script is of all that ``root`` parses."""
    parser = commands.add_parser("completion", help="a script for the Tab key in bash or zsh")
    parser.add_argument("shell", choices=("bash", "zsh"))
    parser.set_defaults(config=None, run=lambda _, options: _write(root, options.shell))


def _write(root: argparse.ArgumentParser, shell: str) -> None:
    """Print the script of a shell.

    Raises:
        InputError: shtab, which writes it, is not installed.
    """
    try:
        import shtab  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            "completion: expected the package shtab, which is not installed. Run pip install "
            "'balora-jax[completion]'."
        ) from error
    for parser in (root, *_commands(root)):
        for action in parser._actions:
            if action.dest in _FOLDERS:
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
            elif action.dest in _FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            elif action.dest == "set":
                action.complete = _settings()  # type: ignore[attr-defined]
    print(shtab.complete(root, shell=shell))


def _commands(root: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    for action in root._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


def _settings() -> dict[str, Any]:
    """The keys of a config, which follow ``--set``, as shtab takes a list of its own."""
    from balora_jax.config_schema import run_schema

    sections = run_schema().model_fields
    keys = [
        f"{section}.{key}="
        for section, field in sections.items()
        for key in getattr(field.annotation, "model_fields", ())
    ]
    words = " ".join(["extensions=", "task=", *keys])
    return {
        "bash": _KEYS,
        "zsh": _KEYS,
        "preamble": {
            "bash": f"{_KEYS}() {{ compgen -W '{words}' -- \"$1\"; }}",
            "zsh": f"{_KEYS}() {{ compadd -S '' -- {words}; }}",
        },
    }
