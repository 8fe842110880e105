"""Checkpoints: what a run needs to go on exactly where it was, and when it must refuse to."""

import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from balora_jax.errors import InputError, RunStoppedError
from balora_jax.io import seals
from balora_jax.io.checkpoint_figures import is_held_out, is_score
from balora_jax.io.checkpoint_folder import REMOVED, WRITING, sealed_steps
from balora_jax.io.folders import write_atomically
from balora_jax.io.keeper import Keeper
from balora_jax.io.same_run import Identity
from balora_jax.parallel import hosts
from balora_jax.untyped.json_text import read_object

# What fails in a thread of orbax, or in a task of its event loop, is raised again where it was
# asked for.
absl_logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())

FORMAT = 3
"""Of what lies in a checkpoint; another version's is refused by number."""

_DESCRIPTIONS = ("_CHECKPOINT_METADATA", "state/_METADATA")
"""Files of a checkpoint in which orbax takes a JSON object for granted."""


class Restored(NamedTuple):
    """A checkpoint read back.

    Attributes:
        step: optimizer steps done.
        state: the tree that was saved, on the shardings of the request.
        data: position of the data iterator.
    """

    step: int
    state: Any
    data: dict[str, Any]


class Checkpoints:
    """The newest few checkpoints of a run, written in the background, each whole or not there.

    One checkpoint holds the adapters, their origin, the optimizer's state and the step; the
    position in the data; the resolved config; and the fingerprint of the base. It is sealed by a
    digest of every file once it is on disk. An older one is removed only when the next is about to
    be written: until then the newest is not known to be good.

    Every method is to be called by all processes of a run, at the same steps. Where hosts have
    folders apart, the first one writes the whole, which the others send it; each reads its own.

    Args:
        folder: gets one for each step.
        keep: how many to keep.
        keeper: keeps the folder: it is checked before anything is written, and pushed after.
    """

    def __init__(self, folder: Path, *, keep: int, keeper: Keeper | None = None):
        keeper = keeper or Keeper()
        self._apart = keeper.apart and jax.process_count() > 1
        if self._apart:
            folder.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None,
            create=not self._apart,
            enable_async_checkpointing=True,
            multiprocessing_options=_processes(alone=self._apart),
        )
        self.folder, self.keep = folder.absolute(), keep
        self._check, self._push = keeper.check, keeper.push
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        self._unsealed: int | None = None

    def latest_step(self, before: int | None = None) -> int | None:
        """The step of the newest sealed checkpoint (of those before a step), or None."""
        steps = sealed_steps(self.folder)
        return max((s for s in steps if before is None or s < before), default=None)

    def look_again(self) -> None:
        """Forget what lay in the folder before it was tidied."""
        self._manager.reload()

    def path_of(self, step: int) -> Path:
        """Folder of a step's checkpoint."""
        return self.folder / str(step)

    def save(self, step: int, state: Any, data: Mapping[str, Any], identity: Identity) -> None:
        """Start writing; returns once the arrays are copied off the devices.

        Raises:
            RunStoppedError: this or the checkpoint before cannot be written.
        """
        self.wait()
        self._check()
        with self._writing():
            self._prune()
            if hosts.is_first():
                write_atomically(self.folder / WRITING, f"{step}\n")
            hosts.barrier("checkpoint begun")
            if self._apart:
                state = jax.tree.map(hosts.gathered, state)
            if hosts.is_first() or not self._apart:
                self._start(step, state, data, identity)
        self._unsealed = step
        if self._apart:
            self.wait()  # the others cannot see when it is on the first one's disk

    def _start(self, step: int, state: Any, data: Mapping[str, Any], identity: Identity) -> None:
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=ocp.args.JsonSave(dict(data)),
                run=ocp.args.JsonSave({"format": FORMAT, **identity._asdict()}),
            ),
            force=True,  # a step that orbax passes over would be missed only by the next run
        )

    def poll(self) -> None:
        """Seal what was started, if it is on disk by now; to be called between steps."""
        if self._unsealed is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Until what was started is on disk and sealed.

        Raises:
            RunStoppedError: it cannot be written.
        """
        if self._unsealed is None:
            return
        with self._writing():
            self._manager.wait_until_finished()
            self._check()
            if hosts.is_first():
                self._push()
                seals.seal(self.path_of(self._unsealed), self._unsealed)
                (self.folder / WRITING).unlink()
                self._push()
        self._unsealed = None

    def abandon(self) -> None:
        """Let what is being written come to its end, sealed if it can be: the run ends early."""
        with suppress(RunStoppedError, ValueError):
            self.wait()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn the system's refusal to write into the end of the run."""
        try:
            yield
        except (OSError, ValueError) as error:
            if jax.process_count() == 1:  # all processes would have to ask
                self._unsealed = None
                self._check()  # the folder may have gone under the writer
            # The writer of arrays reports what the system said as a ValueError.
            found = re.search(r"os_error_code='(\d+)'|OS error (\d+)", str(error))
            number = error.errno if isinstance(error, OSError) else None
            if found is not None:
                number = int(found[1] or found[2])
            if number is None:
                raise
            self._unsealed = None
            _silence_late_answers()
            good = self.latest_step()
            kept = "there is no earlier one" if good is None else f"{self.path_of(good)} is whole"
            raise RunStoppedError(
                f"{self.folder}: expected room for a checkpoint, got: {os.strerror(number)}; "
                f"{kept}. Make room there and go on with --resume."
            ) from error

    def _prune(self) -> None:
        """Remove the oldest sealed checkpoints; their folders vanish at once, whatever happens."""
        for old in sealed_steps(self.folder)[: -self.keep] if hosts.is_first() else ():
            doomed = self.folder / f"{REMOVED}{old}"
            os.rename(self.path_of(old), doomed)
            shutil.rmtree(doomed)

    def restore(self, step: int, like: Any) -> Restored:
        """Read a checkpoint onto the shapes and shardings of ``like``, whatever wrote it."""
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like
        )
        path = self.path_of(step)
        try:
            found = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            )
        except (KeyError, ValueError, TypeError, AttributeError, OSError) as error:
            # Whatever orbax says of arrays that are not those of this run.
            _silence_late_answers()
            raise InputError(
                f"{path}: expected the arrays of this run, got others: "
                f"{' '.join(str(error).split())[:200]} Go on from another checkpoint, or use a new "
                "--workdir."
            ) from error
        return Restored(step, found["state"], read_data(path))

    def close(self) -> None:
        """Finish writing, remove what is not to be kept, and let go."""
        self.wait()
        self._check()
        hosts.barrier("checkpoints closed")
        with self._writing():
            self._prune()
        self._manager.close()


def _processes(*, alone: bool) -> ocp.options.MultiprocessingOptions:
    """Who writes a checkpoint: all together, or this one into a folder that no other one sees."""
    if not alone:
        return ocp.options.MultiprocessingOptions()
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"host{me}"
    )


def _silence_late_answers() -> None:
    """Other reads and writes of a failed one end later, in an event loop that is closed by then."""
    before = sys.unraisablehook

    def hook(found: Any) -> None:
        if "Event loop is closed" not in str(found.exc_value):
            before(found)

    sys.unraisablehook = hook


def read_identity(path: Path) -> Identity:
    """The config and base that a checkpoint was made with.

    Raises:
        InputError: another version wrote it, or a file in which orbax describes it is none.
    """
    for name in _DESCRIPTIONS:
        if (path / name).is_file():
            _read(path, name)
    run = _read(path, "run/metadata")
    if run.get("format") != FORMAT:
        raise InputError(
            f"{path}: expected a checkpoint of format {FORMAT}, got format {run.get('format')!r}. "
            "Go on with the version that wrote it, or use a new --workdir."
        )
    if run.keys() != {"format", *Identity._fields} or not (
        isinstance(run["config"], dict)
        and isinstance(run["base"], str)
        and isinstance(run["start"], str)
    ):
        raise InputError(
            f"{path}: expected the config and the base of a run, got something else. Go on from "
            "another checkpoint, or use a new --workdir."
        )
    return Identity(run["config"], run["base"], run["start"])


def read_data(path: Path) -> dict[str, Any]:
    """The position in the data (``batches``) and the first score (``before``) of a checkpoint.

    And ``held_out``, what was measured of the held-out rows, where something was.

    Raises:
        InputError: another program wrote it.
    """
    data = _read(path, "data/metadata")
    if (
        data.keys() - {"held_out"} != {"batches", "before"}
        or not all(isinstance(v, dict) for v in data.values())
        or not all(map(is_score, data["before"].values()))
        or ("held_out" in data and not is_held_out(data["held_out"]))
    ):
        raise InputError(
            f"{path}: expected a position in the data and a score, got something else. Go on from "
            "another checkpoint, or use a new --workdir."
        )
    return data


def _read(path: Path, name: str) -> dict[str, Any]:
    """A file that orbax wrote as JSON."""
    return read_object(path / name)
