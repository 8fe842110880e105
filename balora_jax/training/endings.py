"""Endings of a run before its last step: a signal, a device, another host or the disk."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from balora_jax.errors import RunStoppedError


@contextmanager
def failures(folder: Path) -> Iterator[None]:
    """Turn what a device, another host or the disk does to a run into its end.

    Raises:
        RunStoppedError: in one sentence.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        line = " ".join(str(error).split())[:300]
        advice = "Go on with --resume."
        if "RESOURCE_EXHAUSTED" in line:
            advice = (
                "Lower training.batch_size, raise training.accumulation or mesh.fsdp, or set "
                "model.remat=full; balora plan says what fits."
            )
        elif jax.process_count() > 1:
            advice = "Another host may be gone. Start all processes again with --resume."
        raise RunStoppedError(f"{folder}: a device or a host failed: {line} {advice}") from error
    except OSError as error:
        raise RunStoppedError(
            f"{folder}: expected to read and write there, got: {error.strerror or error}. Correct "
            "that and go on with --resume."
        ) from error


@contextmanager
def interruptions() -> Iterator[list[str]]:
    """Collect the names of SIGTERM and SIGINT instead of dying; the loop looks between steps."""
    received: list[str] = []
    several = jax.process_count() > 1

    def record(number: int, _frame: object) -> None:
        if several:
            # The runtime takes SIGTERM, and lets all processes agree on the step to stop after.
            os.kill(os.getpid(), signal.SIGTERM)
            return
        received.append(signal.Signals(number).name)
        if len(received) > 1:
            raise KeyboardInterrupt

    try:
        taken = (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT)
        previous = {s: signal.signal(s, record) for s in taken}
    except ValueError:  # not in the main thread: the embedding program handles signals
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
