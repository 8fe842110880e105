"""The folder of a run in a store: worked on in a local folder, which the store is made equal to.

Every host has a local folder of its own; the first one's is kept. It is fetched at the start of a
run that goes on, and brought back at each checkpoint, with the metrics at each sign of life, and at
the end. The order of objects is that in which a run writes its files on a disk, so that a kill
leaves what it leaves on a disk, which :mod:`balora_jax.io.checkpoint_folder` knows:
``checkpoints/writing`` before a checkpoint, its seal last; of one that is removed the seal goes
first.
"""

import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import NoReturn

from balora_jax import signals
from balora_jax.errors import InputError, RunStoppedError
from balora_jax.io import lock, seals
from balora_jax.io.checkpoint_folder import WRITING
from balora_jax.io.hf_files import CONFIG_FILE
from balora_jax.io.keeper import Keeper
from balora_jax.io.lease import Lease, leased
from balora_jax.io.peft_writer import ADAPTER_CONFIG
from balora_jax.io.store import Store
from balora_jax.parallel import hosts
from balora_jax.training.workdir import CHECKPOINTS, CONFIG, FILES, FOLDERS, METRICS, SUMMARY
from balora_jax.untyped.shown import called, in_names

_MARK = f"{CHECKPOINTS}/{WRITING}"
_LAST = (ADAPTER_CONFIG, CONFIG_FILE)
"""Without one of these nobody can use the weights beside it: it comes last and goes first."""

_WEIGHTS = ".safetensors"

_LONGEST_WAIT = 600
"""Seconds in which the first process has the lease, or knows that it does not get it."""

_Stamp = tuple[int, int, int]


class Mirror:
    """A local folder and the objects that are kept equal to it.

    Args:
        store: the objects.
        folder: the local folder; it is made.
    """

    def __init__(self, store: Store, folder: Path):
        self.store, self.folder = store, folder
        self.lease: Lease | None = None
        self._known: dict[str, _Stamp] = {}
        self._busy = threading.Lock()
        folder.mkdir(parents=True)

    def fetch(self, *, resume: bool) -> None:
        """Copy what a run may go on with; of a folder for a new run only what would refuse it.

        Raises:
            OSError: the store or the disk does not answer.
        """
        names = [name for name in self.store.names() if not _is_passing(name)]
        if not resume:
            self._note(names)
            return
        half = _half(names)
        wanted = [name for name in names if name.partition("/")[0] not in half]
        for folder in half:
            hosts.say(
                f"{self.store.address}/{folder}: not brought there to its end; left out, as the "
                "run writes it anew"
            )
        self.store.get(wanted, self.folder)
        self._known = {name: _stamp(self.folder / name) for name in wanted}

    def _note(self, names: Iterable[str]) -> None:
        """Give the local folder what tells of a run or a user's files in the store."""
        for name in {name.partition("/")[0] for name in names} & {*FILES, *FOLDERS, CONFIG_FILE}:
            if name == CONFIG:
                self.store.get([name], self.folder)
            elif name in FOLDERS:
                (self.folder / name).mkdir()
            else:
                (self.folder / name).touch()

    def keeper(self, check: Callable[[], None]) -> Keeper:
        """What keeps both folders; ``check`` is that of the local one."""

        def both() -> None:
            check()
            self.check()

        return Keeper(both, self.push, apart=True)

    def check(self) -> None:
        """Raises RunStoppedError, in every process, where another run has taken the address."""
        if not hosts.by_first(self._is_held):
            self._refuse()

    def _is_held(self) -> bool:
        return self.lease is None or (not self.lease.lost and self.lease.is_own())

    def _refuse(self) -> NoReturn:
        raise RunStoppedError(
            f"--workdir {self.store.address}: expected the lease that this run holds, got another "
            "run's: this one gave no sign of life for too long. Nothing more is written; go on "
            "with --resume once the other has ended."
        )

    def push(self) -> None:
        """Make the objects equal to the local folder; of all processes the first one does.

        Raises:
            RunStoppedError: another run has taken the address.
            OSError: the store does not answer.
        """
        if self.lease is None:
            return
        with self._busy:
            if not self._is_held():
                self._refuse()
            there = {name: _stamp(self.folder / name) for name in _files(self.folder)}
            gone = sorted(name for name in self._known if name not in there)
            changed = {name for name, stamp in there.items() if self._known.get(name) != stamp}
            for last in _lasts({*changed, *gone}):
                self._remove([last])
                changed |= {last} & there.keys()
            for names in _in_order(changed):
                self._put(names)
            if _MARK not in there:
                self._clear([name for name in gone if name in self._known])

    def push_metrics(self) -> None:
        """Bring the rows so far; what else has changed comes with the next checkpoint."""
        with self._busy:
            known = self._known.get(METRICS)  # not before the run itself has brought it
            if known is not None and _stamp(self.folder / METRICS) != known:
                self._put([METRICS])

    def _put(self, names: list[str]) -> None:
        stamps = {name: _stamp(self.folder / name) for name in names}  # before: it may grow
        self.store.put(names, self.folder)
        self._known |= stamps

    def _remove(self, names: list[str]) -> None:
        known = [name for name in names if name in self._known]
        self.store.remove(known)
        for name in known:
            del self._known[name]

    def _clear(self, gone: list[str]) -> None:
        """Remove objects whose files are gone; a checkpoint passes for half-written meanwhile."""
        steps = {name.split("/")[1] for name in _below(CHECKPOINTS, gone) if name.count("/") > 1}
        for step in sorted(steps):
            names = _below(f"{CHECKPOINTS}/{step}", gone)
            self.store.write(_MARK, f"{step}\n".encode())
            self._remove([name for name in names if name.endswith(f"/{seals.NAME}")])
            self._remove([name for name in names if name in self._known])
            self.store.remove([_MARK])
        left = [name for name in gone if name in self._known]
        self._remove(sorted(left, key=lambda name: name.endswith(_WEIGHTS)))


def _half(names: Iterable[str]) -> list[str]:
    """Folders whose weights came, and not what comes after them."""
    split = [name.split("/") for name in names if name.count("/") == 1]
    weights = {top for top, name in split if name.endswith(_WEIGHTS)}
    return sorted(weights - {top for top, name in split if name in _LAST})


def _lasts(names: Iterable[str]) -> list[str]:
    """What comes last in the folders of these names."""
    tops = {name.partition("/")[0] for name in names if "/" in name} - {CHECKPOINTS}
    return [f"{top}/{last}" for top in sorted(tops) for last in _LAST]


def _below(folder: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(f"{folder}/")]


def _in_order(names: Iterable[str]) -> list[list[str]]:
    """Names in groups, each of which may be written in any order once the one before is there."""
    groups: dict[int, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(_rank(name), []).append(name)
    return [groups[rank] for rank in sorted(groups)]


def _rank(name: str) -> int:
    top, _, rest = name.partition("/")
    if name in (CONFIG, _MARK):
        return (CONFIG, _MARK).index(name)
    if top == CHECKPOINTS:
        return 4 if name.endswith(f"/{seals.NAME}") else 3
    if not rest:
        return 8 if name == SUMMARY else 2  # the rows of a step before its checkpoint
    if rest.endswith(_WEIGHTS):
        return 5
    return 7 if rest in _LAST else 6


def _is_passing(name: str) -> bool:
    """Whether a name is of something that only a live process needs."""
    parts = PurePosixPath(name).parts
    looked_at = parts[:2] if parts[0] in FOLDERS else parts[:1]
    passing = any(part.startswith(".") or "orbax-checkpoint-tmp" in part for part in looked_at)
    return passing or parts[-1].endswith(".partial") or parts[0] in (lock.NAME, lock.HOLDER)


def _files(folder: Path) -> list[str]:
    found = []
    for parent, _, names in os.walk(folder):
        found += [Path(parent, name).relative_to(folder).as_posix() for name in names]
    return [name for name in found if not _is_passing(name)]


def _stamp(file: Path) -> _Stamp:
    """What changes with the content of a file."""
    found = file.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


@contextmanager
def mirrored(address: str, *, resume: bool) -> Iterator[Mirror]:
    """Hold an address for a run; yields its mirror, whose local folder goes with the block.

    What the block says of the local folder, it says of the address.

    Raises:
        InputError: a living run holds it, or the store cannot be read and written.
        RunStoppedError: the store does not answer at the end.
    """
    with ExitStack() as stack:
        place = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="balora-", ignore_cleanup_errors=True)
        )
        store = Store(address, f"--workdir {address}")
        mirror = Mirror(store, Path(place) / "run")

        def take() -> None:
            mirror.lease = stack.enter_context(leased(store, mirror.push_metrics, hosts.say))

        hosts.by_first(take, seconds=_LONGEST_WAIT)
        stack.enter_context(called(str(mirror.folder), store.address))
        stack.callback(_keep_outcome)
        try:
            hosts.together(lambda: _opened(mirror, resume=resume))
            yield mirror
        except InputError as error:
            raise InputError(in_names(str(error))) from error
        except RunStoppedError as error:
            _ended(mirror)
            raise RunStoppedError(in_names(str(error))) from error
        _ended(mirror)


def _opened(mirror: Mirror, *, resume: bool) -> None:
    try:
        mirror.fetch(resume=resume)
    except OSError as error:
        raise InputError(
            f"--workdir {mirror.store.address}: expected what can be read and copied here, got: "
            f"{error.strerror or error}. Correct that, or make room (TMPDIR names another disk)."
        ) from error


def _ended(mirror: Mirror) -> None:
    """Bring the last of a run."""
    try:
        mirror.push()
    except OSError as error:
        raise RunStoppedError(
            f"{mirror.store.address}: expected to write there, got: {error.strerror or error}. "
            "What was not brought there is lost; go on with --resume."
        ) from error


def _keep_outcome() -> None:
    """What a signal after the end says is what would be said now, while the folder is there."""
    current = signals.current()
    if current is not None:
        said = in_names(current.outcome())
        current.outcome = lambda: said
