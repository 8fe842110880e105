"""Commands without torch, which ``transformers`` imports with a tokenizer where it is installed.

Nothing of a command needs it, and its import takes 3 CPU seconds. A program that calls this package
may want the torch models of ``transformers`` later on, and so may a user's own files: only the
program ``balora`` leaves it out, and only where no ``extensions`` were read.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_unwanted = False


def leave_out() -> None:
    """Say that this process is a command alone."""
    global _unwanted
    _unwanted = True


def let_in() -> None:
    """Say that files of a user are read, whatever they import."""
    global _unwanted
    _unwanted = False


@contextmanager
def torch_left_out() -> Iterator[None]:
    """For the first import of ``transformers``: it then takes torch not to be there, for good."""
    if not _unwanted or sys.modules.keys() & {"torch", "transformers"}:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # an import of it fails
    try:
        yield
    finally:
        del sys.modules["torch"]
