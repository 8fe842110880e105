"""Lease of a folder in a store: one run at a time writes there, as long as it says that it lives.

A store keeps no lock that a crash releases. So the holder writes its name, with a number that
grows, every few seconds; whoever finds a name waits until the number has grown, which refuses, or
has not for too long, which makes the folder free. Nobody's clock is compared with another's.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from balora_jax.errors import InputError
from balora_jax.io.lock import HOLDER
from balora_jax.io.store import Store

BEAT, DEAD = 10.0, 45.0
"""Seconds between two signs of life, and after which a silent holder counts as dead."""

_LOOK = 2.0
_WHO = {"host", "process", "start"}


class Lease:
    """The right to write below an address, renewed by a thread until it is given up.

    Attributes:
        lost: set where another holder has taken it, as this one was silent for too long.
    """

    def __init__(self, store: Store, also: Callable[[], None]):
        self.lost = False
        self._store, self._also = store, also
        self._who: dict[str, Any] = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "start": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "run": uuid.uuid4().hex,
            "beat": 0,
        }
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def take(self, say: Callable[[str], None]) -> None:
        """Wait until nobody living holds it, and take it.

        Raises:
            InputError: somebody does, in words.
            OSError: the store cannot be read and written.
        """
        while not self._store.create(HOLDER, self._content()):
            before = self._store.read(HOLDER)
            if before is None:
                continue
            if not _read(before).keys() >= _WHO:
                raise InputError(
                    f"{self._store.address}/{HOLDER}: expected the object by which a run holds its "
                    "folder, got another one of that name. Move it elsewhere."
                )
            say(
                f"{self._store.address}: {_named(before)} has not given it up; waiting "
                f"{DEAD:.0f} s for a sign of life"
            )
            if self._changes(before):
                raise InputError(
                    f"--workdir {self._store.address}: expected a folder that no other run is "
                    f"using, got one in use by {_named(before)}. Wait for its end, or choose "
                    "another folder."
                )
            if self._store.read(HOLDER) == before:
                self._store.remove([HOLDER])
        self._thread.start()

    def _changes(self, before: bytes) -> bool:
        """Whether the holder says something else within the time in which a living one does."""
        end = time.monotonic() + DEAD
        while time.monotonic() < end:
            time.sleep(min(_LOOK, DEAD / 5))
            now = self._store.read(HOLDER)
            if now is None:
                return False
            if now != before:
                return True
        return False

    def _beat(self) -> None:
        while not self._end.wait(BEAT):
            with suppress(OSError):  # the store may answer again; if not, the run will hear of it
                if not self.is_own():
                    self.lost = True
                    return
                self._who["beat"] += 1
                self._store.write(HOLDER, self._content())
                self._also()

    def is_own(self) -> bool:
        """Whether the store still names this holder."""
        found = self._store.read(HOLDER)
        return found is not None and _read(found).get("run") == self._who["run"]

    def give_up(self) -> None:
        """Stop renewing, and remove the name if it is still this one's."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
        with suppress(OSError):  # who comes next then waits for a sign of life
            if self.is_own():
                self._store.remove([HOLDER])

    def _content(self) -> bytes:
        return (json.dumps(self._who) + "\n").encode()


@contextmanager
def leased(store: Store, also: Callable[[], None], say: Callable[[str], None]) -> Iterator[Lease]:
    """Hold the lease of an address; ``also`` is called at every sign of life, in a thread.

    Raises:
        InputError: a living holder has it, or the store cannot be read and written.
    """
    lease = Lease(store, also)
    try:
        lease.take(say)
    except OSError as error:
        raise InputError(
            f"--workdir {store.address}: expected a folder of a bucket that can be read and "
            f"written, got: {error.strerror or error}. Check the name and the permissions, and log "
            "in (gcloud auth application-default login)."
        ) from error
    try:
        yield lease
    finally:
        lease.give_up()


def _read(content: bytes) -> dict[str, Any]:
    """What a holder wrote of itself; nothing where another program wrote it."""
    with suppress(ValueError, RecursionError):
        found = json.loads(content)
        if isinstance(found, dict):
            return found
    return {}


def _named(content: bytes) -> str:
    """A holder in words."""
    found = _read(content)
    return f"process {found.get('process')} on {found.get('host')} since {found.get('start')}"
