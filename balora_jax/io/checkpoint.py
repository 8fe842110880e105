"""Checkpoints: what a run needs to go on exactly where it was, and when it must refuse to."""

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from absl import logging

from balora_jax.errors import InputError, RunStoppedError
from balora_jax.io import seals
from balora_jax.numerics.objective import depends_on_length
from balora_jax.parallel import hosts

# What fails in a thread of orbax is raised again where it was asked for.
logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)

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


class Identity(NamedTuple):
    """Identity of a run: equal for two that are the same.

    Attributes:
        config: the resolved config as nested dicts.
        base: fingerprint of the pretrained checkpoint.
    """

    config: dict[str, Any]
    base: str


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
        """The step of the newest finished checkpoint (of those before a step), or None."""
        steps = [step for step in self._manager.all_steps() if step != self._unsealed]
        return max((s for s in steps if before is None or s < before), default=None)

    def path_of(self, step: int) -> Path:
        """Folder of a step's checkpoint."""
        return self.folder / str(step)

    def save(self, step: int, state: Any, data: Mapping[str, Any], identity: Identity) -> None:
        """Start writing; returns once the arrays are copied off the devices.

        Raises:
            RunStoppedError: this or the checkpoint before cannot be written.
        """
        self.wait()
        for old in sorted(self._manager.all_steps())[: -self.keep]:
            self._manager.delete(old)
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=ocp.args.JsonSave(dict(data)),
                    run=ocp.args.JsonSave(identity._asdict()),
                ),
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
                seals.seal(self.path_of(self._unsealed))
        self._unsealed = None

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
            good = self.latest_whole()
            kept = "there is no earlier one" if good is None else f"{self.path_of(good)} is whole"
            raise RunStoppedError(
                f"{self.folder}: expected room for a checkpoint, got: {os.strerror(number)}; "
                f"{kept}. Make room there and go on with --resume."
            ) from error

    def latest_whole(self) -> int | None:
        """The newest checkpoint that was sealed."""
        steps = (s for s in self._manager.all_steps() if seals.is_sealed(self.path_of(s)))
        return max(steps, default=None)

    def identity(self, step: int) -> Identity:
        """The config and base that a checkpoint was made with."""
        found = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))
        return Identity(**found["run"])

    def restore(self, step: int, like: Any) -> Restored:
        """Read a checkpoint onto the shapes and shardings of ``like``, whatever wrote it."""
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like
        )
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
            ),
        )
        return Restored(step, found["state"], found["data"])

    def close(self) -> None:
        """Finish writing, remove what is not to be kept, and let go."""
        self.wait()
        for old in sorted(self._manager.all_steps())[: -self.keep]:
            self._manager.delete(old)
        self._manager.close()


def newest_whole(folder: Path) -> tuple[int | None, list[str]]:
    """The newest checkpoint whose every file is as it was written, and what was found on the way.

    One whose writing was cut short, or whose files changed since, is put aside, not removed.

    Raises:
        InputError: there are checkpoints, but all of them are damaged.
    """
    steps = sorted((int(child.name) for child in _finished(folder)), reverse=True)
    found: list[str] = []
    damaged = 0
    for step in steps:
        path = folder / str(step)
        if not seals.is_sealed(path):
            aside = _put_aside(path, f"unsealed-{step}")
            found.append(f"{path}: writing it was cut short ({seals.NAME} is missing); {aside}")
            continue
        damage = seals.damage(path)
        if damage is None:
            return step, found
        damaged += 1
        found.append(f"{path}: damaged, as {damage}; {_put_aside(path, f'damaged-{step}')}")
    if damaged:
        raise InputError(
            f"{folder}: expected a whole checkpoint, got only damaged ones ({'; '.join(found)}). "
            "Bring one back from a copy, or use a new --workdir."
        )
    return None, found


def _put_aside(path: Path, name: str) -> str:
    aside = path.with_name(name)
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    return f"put aside as {name}"


def _finished(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [child for child in folder.iterdir() if child.is_dir() and child.name.isdigit()]


def discard(folder: Path) -> None:
    """Remove what an interrupted first checkpoint left behind, but nothing that was put aside."""
    for child in folder.iterdir() if folder.is_dir() else ():
        if child.name.startswith(("unsealed-", "damaged-")):
            continue
        if child.is_dir():
            shutil.rmtree(child)
        else:
            child.unlink()


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
    longer = before is not None and after is not None and after > before
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
