"""Endings of a run before its last step: a signal, a device, another host or the disk."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax

from balora_jax.errors import InputError, RunStoppedError
from balora_jax.io import seals
from balora_jax.io.checkpoint_folder import sealed_steps
from balora_jax.io.store import Store
from balora_jax.paths import is_store
from balora_jax.signals import Signals
from balora_jax.training.workdir import CHECKPOINTS, CONFIG, holds_run


def saved(folder: Path) -> str:
    """What of a run is saved by now, and how to go on."""
    return _saved(str(folder), sealed_steps(folder / CHECKPOINTS), holds_run(folder))


def saved_at(workdir: str) -> str:
    """The same of a folder that may also lie in a store."""
    if not is_store(workdir):
        return saved(Path(workdir))
    store = Store(workdir, f"--workdir {workdir}")
    try:
        names = store.names()
    except OSError as error:
        return f"what is saved cannot be seen now ({error.strerror}). Go on with --resume."
    seal = re.compile(rf"{CHECKPOINTS}/([0-9]{{1,18}})/{re.escape(seals.NAME)}")
    steps = sorted(int(found[1]) for found in map(seal.fullmatch, names) if found)
    return _saved(store.address, steps, CONFIG in names)


def _saved(folder: str, steps: Sequence[int], begun: bool) -> str:
    if steps:
        newest = f"{folder}/{CHECKPOINTS}/{steps[-1]}"
        return f"{newest} is the newest whole checkpoint. Go on with --resume."
    if begun:
        return "no checkpoint is saved yet. Begin again with --resume."
    return "nothing was written. Begin again."


@contextmanager
def reading() -> Iterator[None]:
    """Before anything is written: a file that the system does not give is bad input.

    Raises:
        InputError: in one sentence.
    """
    try:
        yield
    except OSError as error:
        where = "input" if error.filename is None else str(error.filename)[:200]
        raise InputError(
            f"{where}: expected a file that can be read, got: {error.strerror or error}. Check the "
            "path and its permissions."
        ) from error


@contextmanager
def failures(folder: Path, signals: Signals) -> Iterator[None]:
    """Turn what a signal, a device, another host or the disk does to a run into its end.

    Raises:
        RunStoppedError: in one sentence, which names the newest whole checkpoint.
    """
    signals.outcome = lambda: saved(folder)  # also of a signal after the end
    try:
        with signals.interruption():
            yield
    except KeyboardInterrupt as error:
        raise RunStoppedError(signals.sentence()) from error
    except jax.errors.JaxRuntimeError as error:
        line = " ".join(str(error).split())[:300]
        advice = saved(folder)
        if "RESOURCE_EXHAUSTED" in line:
            advice = (
                "Lower training.batch_size, raise training.accumulation or mesh.fsdp, or set "
                "model.remat=full; balora plan says what fits."
            )
        elif jax.process_count() > 1:
            advice = f"Another host may be gone. Start all processes again: {advice}"
        raise RunStoppedError(f"{folder}: a device or a host failed: {line} {advice}") from error
    except OSError as error:
        raise RunStoppedError(
            f"{folder}: expected to read and write there, got: {error.strerror or error}. Correct "
            f"that; {saved(folder)}"
        ) from error
