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
from balora_jax.io.folders import write_atomically
from balora_jax.numerics.objective import depends_on_length
from balora_jax.parallel import hosts
from balora_jax.untyped.json_text import read_object

# What fails in a thread of orbax, or in a task of its event loop, is raised again where it was
# asked for.
absl_logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())

# Keys that may differ when a run goes on: they change where or how often, not what is computed.
FREE_KEYS = (
    "model.name_or_path",  # the base is identified by its fingerprint instead
    "model.revision",
    "model.remat",
    "model.attention",
    "data.validation",
    "data.validation_limit",
    "data.validation_split",
    "regularizers.teacher_cache",
    "training.stop_at",
    "training.head",
    "training.head_chunk",
    "training.head_memory_mib",
    "training.max_skipped",
    "training.profile_steps",
    "training.trackers",
    "training.log_every",
    "training.log_gradient_share_every",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "mesh",
    "eval",
    "study",
)


FORMAT = 2
"""Of what lies in a checkpoint; another version's is refused by number."""

WRITING = "writing"
"""File beside the checkpoints that says which step's is being written."""

_REMOVED = ".removed-"
_ORBAX_MARK = "_CHECKPOINT_METADATA"


_DESCRIPTIONS = ("_CHECKPOINT_METADATA", "state/_METADATA")
"""Files of a checkpoint in which orbax takes a JSON object for granted."""


class Identity(NamedTuple):
    """Identity of a run: equal for two that are the same.

    Attributes:
        config: the resolved config as nested dicts.
        base: fingerprint of the pretrained checkpoint.
    """

    config: dict[str, Any]
    base: str


class Found(NamedTuple):
    """What lies in the folder of a run's checkpoints.

    Attributes:
        step: of the newest whole checkpoint; None where there is none.
        said: a line about each that is not whole.
        damaged: those to be put aside, each with its new name.
        cut_short: what a kill left of those that were being written or removed.
    """

    step: int | None
    said: list[str]
    damaged: list[tuple[Path, str]]
    cut_short: list[Path]


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

    Every method is to be called by all processes of a run, at the same steps.
    """

    def __init__(self, folder: Path, *, keep: int):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None, create=True, enable_async_checkpointing=True
        )
        self.folder, self.keep = folder.absolute(), keep
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
        with self._writing():
            self._prune()
            if hosts.is_first():
                write_atomically(self.folder / WRITING, f"{step}\n")
            hosts.barrier("checkpoint begun")
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=ocp.args.JsonSave(dict(data)),
                    run=ocp.args.JsonSave({"format": FORMAT, **identity._asdict()}),
                ),
                force=True,  # a step that orbax passes over would be missed only by the next run
            )
        self._unsealed = step

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
            if hosts.is_first():
                seals.seal(self.path_of(self._unsealed), self._unsealed)
                (self.folder / WRITING).unlink()
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
            doomed = self.folder / f"{_REMOVED}{old}"
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
        hosts.barrier("checkpoints closed")
        with self._writing():
            self._prune()
        self._manager.close()


def _silence_late_answers() -> None:
    """Other reads and writes of a failed one end later, in an event loop that is closed by then."""
    before = sys.unraisablehook

    def hook(found: Any) -> None:
        if "Event loop is closed" not in str(found.exc_value):
            before(found)

    sys.unraisablehook = hook


def sealed_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that were written to their end, the oldest first."""
    there = ((step, path) for step, path in _numbered(folder) if not path.is_symlink())
    return sorted(step for step, path in there if seals.is_sealed(path))


def look(folder: Path) -> Found:
    """The newest checkpoint whose every file is as it was written; changes nothing.

    Raises:
        InputError: there are checkpoints but all of them are damaged, or a folder has the name of
            a checkpoint and is none.
    """
    found = Found(None, [], [], [])
    writing = _being_written(folder)
    for step, path in sorted(_numbered(folder), reverse=True):
        if path.is_symlink() or not path.is_dir():
            raise InputError(
                f"{path}: expected a folder of this run, got a link or a file. Move it elsewhere."
            )
        if seals.is_sealed(path):
            damage = seals.damage(path, step)
            if damage is None:
                found = found._replace(step=step)
                break
            aside = _free_name(path, f"damaged-{step}")
            found.said.append(f"{path}: damaged, as {damage}; put aside as {aside}")
            found.damaged.append((path, aside))
        elif step == writing:
            found.said.append(f"{path}: writing it was cut short; removed")
        elif (path / _ORBAX_MARK).is_file():
            aside = _free_name(path, f"unsealed-{step}")
            found.said.append(f"{path}: it has no {seals.NAME}; put aside as {aside}")
            found.damaged.append((path, aside))
        else:
            raise InputError(
                f"{path}: expected a checkpoint of this run, got another folder. Move it elsewhere."
            )
    if found.step is None and any("damaged, as " in line for line in found.said):
        raise InputError(
            f"{folder}: expected a whole checkpoint, got only damaged ones "
            f"({'; '.join(found.said[:2])}). Bring one back from a copy, or use a new --workdir."
        )
    found.cut_short.extend(_cut_short(folder, writing))
    return found


def tidy(folder: Path, found: Found) -> None:
    """Put aside what is damaged, and remove what a kill left half-written."""
    for path, aside in found.damaged:
        path.rename(path.with_name(aside))
    for path in found.cut_short:
        shutil.rmtree(path)
    (folder / WRITING).unlink(missing_ok=True)


def _being_written(folder: Path) -> int | None:
    """The step whose checkpoint was begun and not sealed."""
    file = folder / WRITING
    text = file.read_bytes() if file.is_file() else b""
    return int(text) if re.fullmatch(rb"[0-9]{1,18}\n", text) else None


def _cut_short(folder: Path, writing: int | None) -> list[Path]:
    """Folders that only this program makes: of a checkpoint half-written or half-removed."""
    if not folder.is_dir():
        return []
    half = re.compile(rf"{writing}(\.orbax-checkpoint-tmp.*)?" if writing is not None else r"(?!)")
    return [
        child
        for child in folder.iterdir()
        if re.fullmatch(rf"{re.escape(_REMOVED)}[0-9]+", child.name)
        or (half.fullmatch(child.name) and not seals.is_sealed(child))
    ]


def _free_name(path: Path, name: str) -> str:
    """The name, or the first of it with a number that nothing has."""
    names = (name, *(f"{name}-{i}" for i in range(2, 10**6)))
    return next(n for n in names if not os.path.lexists(path.with_name(n)))


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """What has the name of a step."""
    if not folder.is_dir():
        return []
    return [
        (int(child.name), child)
        for child in folder.iterdir()
        if re.fullmatch(r"0|[1-9][0-9]{0,17}", child.name)
    ]


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
        isinstance(run["config"], dict) and isinstance(run["base"], str)
    ):
        raise InputError(
            f"{path}: expected the config and the base of a run, got something else. Go on from "
            "another checkpoint, or use a new --workdir."
        )
    return Identity(run["config"], run["base"])


def read_data(path: Path) -> dict[str, Any]:
    """The position in the data (``batches``) and the first score (``before``) of a checkpoint.

    Raises:
        InputError: another program wrote it.
    """
    data = _read(path, "data/metadata")
    if data.keys() != {"batches", "before"} or not all(isinstance(v, dict) for v in data.values()):
        raise InputError(
            f"{path}: expected a position in the data and a score, got something else. Go on from "
            "another checkpoint, or use a new --workdir."
        )
    return data


def _read(path: Path, name: str) -> dict[str, Any]:
    """A file that orbax wrote as JSON."""
    return read_object(path / name)


def check_same_run(saved: Identity, now: Identity, where: str) -> None:
    """Raises InputError where going on would not be the same run, naming the first difference."""
    if saved.base != now.base:
        raise InputError(
            f"{where}: expected the base model this run began with (fingerprint "
            f"{saved.base[:12]}), got another one ({now.base[:12]}). Set model.name_or_path to the "
            "first base, or use a new --workdir."
        )
    for key, before, after in differences(saved.config, now.config):
        if any(key == free or key.startswith(free + ".") for free in FREE_KEYS):
            continue
        if key == "training.max_steps" and _extends(now.config, before, after):
            continue
        raise InputError(
            f"{where}: expected {key} to stay {before!r}, got {after!r}. Set it back, or use a new "
            "--workdir."
        )


def _extends(config: Mapping[str, Any], before: Any, after: Any) -> bool:
    """A run may be lengthened where nothing depends on its length."""
    training = config["training"]
    steady = training["schedule"] == "constant" and training["warmup"] == 0.0
    longer = isinstance(before, int) and isinstance(after, int) and after > before
    return longer and steady and not depends_on_length(config["regularizers"])


def differences(
    before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    """Dotted keys whose values differ, with both values.

    Example:
        >>> differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}})
        [('a.c', 2, 3)]
    """
    found = []
    for key in sorted(set(before) | set(after)):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append((f"{prefix}{key}", old, new))
    return found
