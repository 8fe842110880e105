"""Calls into parsers of others whose errors have no common type, made to end in one sentence."""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from balora_jax.errors import InputError
from balora_jax.untyped.shown import one_line


def words_of(error: BaseException) -> str:
    """The message of an error, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def any_error_refused(
    expected: str, remedy: str, *, words: Callable[[BaseException], str] = words_of
) -> Iterator[None]:
    """Whatever is raised in the block becomes an ``InputError``.

    Only for the parsers of ``transformers``, ``tokenizers`` and ``jinja2``, which raise what their
    own code happens to meet: TypeError, AttributeError, RecursionError, plain ``Exception``, and,
    of Rust, a panic that is no ``Exception`` at all; and for a user's own Python. What ends a
    program is let through.

    Args:
        expected: opens the message: where, and what belongs there.
        remedy: ends it.
        words: what an error says.
    """
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        said = words(error)
        reason = one_line(said, most=200).rstrip(".")
        raise InputError(f"{expected}, got: {reason}. {remedy}") from error


@contextmanager
def held_stderr() -> Iterator[None]:
    """What libraries write to standard error in the block is shown after it, if it succeeds.

    A panic of Rust is written by native code, beside the error that is raised. What Python prints
    to ``sys.stderr`` is not held.
    """
    try:
        sys.stderr.flush()
        kept = os.dup(2)
    except (OSError, ValueError, AttributeError):  # there is none
        yield
        return
    mine = sys.stderr
    with tempfile.TemporaryFile() as held, os.fdopen(kept, "w", buffering=1) as true:
        os.dup2(held.fileno(), 2)
        if is_stderr(mine):
            sys.stderr = true
        try:
            yield
        finally:
            sys.stderr = mine
            os.dup2(kept, 2)
        held.seek(0)
        os.write(2, held.read())


def silenced_stderr() -> int:
    """A number for the file of standard error, to which nothing else is written from here on."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    return kept


def silence_stdout() -> None:
    """Let what standard output could not write go nowhere: Python would try again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())


def is_stderr(stream: object) -> bool:
    """Whether a stream writes to the file of standard error."""
    try:
        return stream.fileno() == 2  # type: ignore[attr-defined]
    except (OSError, ValueError, AttributeError):
        return False
