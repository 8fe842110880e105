"""A trace of some steps of a run."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jax

from balora_jax.parallel import hosts


class Profile:
    """Trace of the devices between two steps, for TensorBoard and Perfetto.

    Args:
        steps: first and last step, or None for no trace.
        folder: where it is written, by the first process.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        self.first, self.last = steps if steps and hosts.is_first() else (0, 0)
        self.folder, self.on = folder, False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def before(self, step: int, state: Any) -> None:
        """Begin with the first step, when all before it is done."""
        if step == self.first:
            jax.block_until_ready(state)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every call of every library would drown the rest
            jax.profiler.start_trace(
                self.folder, create_perfetto_trace=True, profiler_options=options
            )
            self.on = True

    def named(self, step: int) -> AbstractContextManager[Any]:
        """Marks what is started inside as this step, where a trace is taken."""
        if not self.on:
            return nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def after(self, step: int, state: Any) -> None:
        """End with the last step, when it is done."""
        if step == self.last:
            jax.block_until_ready(state)
            self.stop()

    def stop(self) -> None:
        """Write what was traced; also where the run ends early."""
        if self.on:
            self.on = False
            jax.profiler.stop_trace()
            print(f"profile: {self.folder} (steps {self.first} to {self.last})", flush=True)
