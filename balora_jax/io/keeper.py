"""How a run's folder is kept: on a disk, or also in a store."""

from collections.abc import Callable
from dataclasses import dataclass


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Keeper:
    """What a run does for its folder between its steps.

    Attributes:
        check: raises RunStoppedError where the folder is no longer the run's; all processes ask.
        push: brings what has changed to where the folder is kept.
        apart: every host has a folder of its own, and the first one's is kept.
    """

    check: Callable[[], None] = _nothing
    push: Callable[[], None] = _nothing
    apart: bool = False
