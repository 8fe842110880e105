"""Checkpoints: what a run needs to go on exactly where it was, and when it must refuse to."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from balora_jax.errors import InputError

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
    "training.log_every",
    "training.log_gradient_share_every",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "mesh",
    "eval",
    "study",
)


class Identity(NamedTuple):
    """What makes two runs the same run.

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
    position in the data; the resolved config; and the fingerprint of the base.
    """

    def __init__(self, folder: Path, *, keep: int):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=True
        )
        self.folder = folder.absolute()
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest_step(self, before: int | None = None) -> int | None:
        """The step of the newest finished checkpoint (of those before a step), or None."""
        steps = self._manager.all_steps()
        return max((s for s in steps if before is None or s < before), default=None)

    def path_of(self, step: int) -> Path:
        """Folder of a step's checkpoint."""
        return self.folder / str(step)

    def save(self, step: int, state: Any, data: Mapping[str, Any], identity: Identity) -> None:
        """Start writing; returns once the arrays are copied off the devices."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=ocp.args.JsonSave(dict(data)),
                run=ocp.args.JsonSave(identity._asdict()),
            ),
        )

    def wait(self) -> None:
        """Until what was started is on disk."""
        self._manager.wait_until_finished()

    def identity(self, step: int) -> Identity:
        """The config and base that a checkpoint was made with."""
        found = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))
        return Identity(**found["run"])

    def restore(self, step: int, like: Any) -> Restored:
        """Read a checkpoint onto the shapes and shardings of ``like``."""
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
        """Finish writing and let go."""
        self._manager.close()


def has_checkpoints(folder: Path) -> bool:
    """Whether any finished checkpoint lies in ``folder`` (without touching it)."""
    return folder.is_dir() and any(
        child.is_dir() and child.name.isdigit() for child in folder.iterdir()
    )


def discard(folder: Path) -> None:
    """Remove what an interrupted first checkpoint left behind."""
    if folder.is_dir():
        shutil.rmtree(folder)


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
    training, terms = config["training"], config["regularizers"]
    schedules = [
        training["schedule"] if training["warmup"] == 0.0 else "warm-up",
        *(
            terms[f"{name}_schedule"] if terms[name] > 0.0 else "constant"
            for name in ("consistency", "diversity", "spectral")
        ),
    ]
    longer = before is not None and after is not None and after > before
    return longer and all(schedule in ("constant", "adaptive") for schedule in schedules)


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
