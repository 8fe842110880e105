"""Memory of a step as planned and as measured on virtual CPU devices.

``python -m balora_jax.figures.planned_memory CONFIG [--devices 8] [--set ...]`` compiles the
step of a config, fills its arguments, runs it and compares the growth of the process with the
plan. Devices of a CPU share their process, so the growth stands against the sum over all of them.
"""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from balora_jax.bench import measure
from balora_jax.config import RunConfig
from balora_jax.config_file import load_config
from balora_jax.errors import InputError
from balora_jax.options import Parser, add_config
from balora_jax.plan import arguments, compiled
from balora_jax.plan.targets import parse_target

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
             "MALLOC_ARENA_MAX": "2"}  # fmt: skip
"""glibc gives memory of freed arrays back at once, so that resident memory is memory in use."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print planned and measured bytes as JSON."""
    parser = Parser(description=__doc__)
    add_config(parser)
    parser.add_argument("--devices", type=int, default=8, help="virtual CPU devices")
    parser.add_argument("--here", action="store_true", help="in this process, as it was started")
    options = parser.parse_args(arguments)
    config = load_config(options.config, options.set)
    if options.here:
        print(json.dumps(measured(config)))
    else:
        print(json.dumps(measured_apart(options.config, options.set, options.devices), indent=2))


def measured_apart(file: str, settings: Sequence[str], devices: int) -> dict[str, Any]:
    """:func:`measured` in a process of its own, with so many devices and an allocator that tells.

    Raises:
        InputError: what that process could not do; its message is above.
    """
    environment = os.environ | parse_target(f"cpu:{devices}").environment | ALLOCATOR
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-m", "balora_jax.figures.planned_memory", file, "--here"]
    command += ["--set", *settings] if settings else []
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise InputError(
            f"planned_memory: expected the step to run on {devices} devices, got exit code "
            f"{done.returncode}; the message is above. Correct the config."
        )
    return json.loads(done.stdout.splitlines()[-1])


def measured(config: RunConfig) -> dict[str, Any]:
    """Planned and measured bytes of a step on all devices of this process.

    Returns:
        ``planned`` (bytes of all devices by the compiler, by part), ``grown`` (growth of resident
        memory from before the arguments exist to the highest point of the step), ``ratio`` of
        growth to plan, ``loss``.

    Raises:
        InputError: where the system does not tell the peak of a process.
    """
    import jax

    from balora_jax.tasks.text.program import text_program
    from balora_jax.training import steps

    base = arguments.opened_base(config.model)
    program = text_program(config, base.config)
    abstract = arguments.abstract_arguments(program, compiled.STEPS)
    with jax.set_mesh(program.mesh):
        parts = program.step_parts(compiled.STEPS)
        step = steps.compile_step(parts, abstract[0], program.mesh).lower(*abstract).compile()
        key = jax.device_put(jax.random.key(0), abstract[3].sharding)
    planned = {name: size * program.mesh.size for name, size in compiled.memory_of(step).items()}
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        raise InputError("planned_memory: expected glibc, got another. Run it on Linux.")
    libc.malloc_trim(0)  # what the compiler freed must not hide what the arrays take
    before = measure.reset_peak()
    state, constants, batch = filled(abstract[:3])
    state, values = step(state, constants, batch, key)
    loss = float(values["loss"])
    peak = measure.resident("VmHWM")
    if before is None or peak is None:
        raise InputError("planned_memory: expected /proc/self/clear_refs, got none. Use Linux.")
    grown = peak - before
    return {
        "devices": program.mesh.size,
        "planned": planned,
        "grown": grown,
        "ratio": grown / planned["total"],
        "loss": loss,
    }


def filled(tree: Any) -> Any:
    """Arrays for abstract arguments: small numbers, every page written, a copy for each device."""
    import jax
    import numpy as np

    def fill(leaf: Any) -> Any:
        value = 1 if np.issubdtype(leaf.dtype, np.integer) else 0.01

        def part(index: Any) -> np.ndarray:
            shape = [len(range(*cut.indices(n))) for cut, n in zip(index, leaf.shape, strict=True)]
            return np.full(shape, value, leaf.dtype)

        return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)

    return jax.tree.map(fill, tree)


if __name__ == "__main__":
    main()
