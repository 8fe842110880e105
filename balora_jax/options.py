"""The options of every command and program that reads a config."""

import argparse
from typing import NoReturn

from balora_jax.errors import InputError


class Parser(argparse.ArgumentParser):
    """Parser that says what is wrong in one sentence, as every other check does."""

    def error(self, message: str) -> NoReturn:
        """Raises InputError with what ``argparse`` found."""
        raise InputError(f"{message}. See {self.prog} --help.")


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the config's file and ``--set``, for :func:`balora_jax.config_file.load_config`."""
    parser.add_argument("config", help="YAML file, such as configs/quickstart.yaml")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY.PATH=VALUE",
        help="override settings of the config; may be repeated",
    )
