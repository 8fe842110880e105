"""The options of every command and program that reads a config."""

import argparse
import re
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from balora_jax.errors import InputError

_SETTING = re.compile(r"\w[\w.-]*=")


class Parser(argparse.ArgumentParser):
    """Parser that says what is wrong in one sentence, as every other check does."""

    def error(self, message: str) -> NoReturn:
        """Raises InputError with what ``argparse`` found."""
        raise InputError(f"{message}. See {self.prog} --help.")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse, with what follows ``--set`` told from the config."""
        return super().parse_known_args(None if args is None else [*one_by_one(args)], namespace)


def one_by_one(arguments: Sequence[str]) -> Iterator[str]:
    """Arguments with ``--set`` before each of its settings: what else follows is no setting.

    >>> list(one_by_one(["--set", "a.b=1", "c=2", "run.yaml", "--json", "x"]))
    ['--set', 'a.b=1', '--set', 'c=2', 'run.yaml', '--json', 'x']
    """
    inside = first = False
    for argument in arguments:
        if first:  # a setting, whatever it looks like
            first = False
        elif argument == "--set" or argument.startswith("--set="):
            inside, first = True, argument == "--set"
        elif inside and _SETTING.match(argument):
            yield "--set"
        else:
            inside = False
        yield argument


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the config's file and ``--set``, for :func:`balora_jax.config_file.load_config`."""
    parser.add_argument("config", help="YAML file, such as configs/quickstart.yaml")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY.PATH=VALUE",
        help="override settings of the config: as many as there are, in any place",
    )
