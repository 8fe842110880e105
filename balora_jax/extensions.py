"""A user's own Python files, which add terms, starts, families, benchmarks and trackers.

A config names them under ``extensions``; they are imported before the rest of the config is
checked, so that what they register can be named there. They are code that the user wrote: only
files on this machine are taken, never anything that a checkpoint brings along.
"""

import importlib.util
import sys
import traceback
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from balora_jax.errors import InputError
from balora_jax.paths import check_local
from balora_jax.torch_import import let_in
from balora_jax.untyped.native import any_error_refused, words_of

_LOADED: set[Path] = set()


def load_extensions(files: Iterable[str], folder: Path) -> None:
    """Import files once each; names are relative to ``folder``, or to the working directory.

    Raises:
        InputError: A file that is missing, is no Python file, or cannot be imported.
    """
    for name in files:
        check_local(name, f"extensions: {name}")
        file = next((f for f in (folder / name, Path(name)) if f.is_file()), None)
        if file is None or file.suffix != ".py":
            got = "no file" if file is None else f"a {file.suffix or 'nameless'} file"
            raise InputError(
                f"extensions: expected a Python file on this machine, got {got} at {name!r}. Name "
                "it relative to the config."
            )
        file = file.resolve()
        if file not in _LOADED:
            let_in()
            _import(file)
            _LOADED.add(file)


def _import(file: Path) -> None:
    name = f"balora_jax_extension_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None  # every .py file has one
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    expected = f"extensions: expected {file} to import"
    try:
        with any_error_refused(expected, "Fix the file.", words=partial(_words, file)):
            try:
                spec.loader.exec_module(module)
            except SystemExit as error:  # it is a file of definitions, and ends no program
                raise RuntimeError(f"SystemExit {error}") from error
    except BaseException:
        del sys.modules[name]
        raise


def _words(file: Path, error: BaseException) -> str:
    """Type and message of an error, and the line of the file that it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(file)]
    where = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {words_of(error)}{where}"
