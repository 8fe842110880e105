"""Compile steps for devices that are not here, in a process that has their compiler.

``python -m balora_jax.plan.ahead TOPOLOGY`` answers each line of its input, a case, with a line.
The TPU compiler (``libtpu``, extra ``plan``) and the GPU compiler (``jax-cuda12-plugin``, extra
``plan-gpu``) must not be loaded where an ordinary start on a CPU would then look for a TPU or a
GPU, and virtual devices are a matter of the environment.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib import metadata
from typing import IO, Any, Protocol, runtime_checkable

from balora_jax.config import RunConfig
from balora_jax.config_file import parse_config
from balora_jax.errors import InputError
from balora_jax.parallel import sharding
from balora_jax.plan.targets import Target, described_devices, parse_target

GPU_COMPILER = "jax-cuda12-plugin"
"""The package with XLA's GPU compiler, of the same version as jaxlib."""


@runtime_checkable
class Compile(Protocol):
    """Compiles one step; see :func:`balora_jax.plan.compiled.compile_case` for the row."""

    def __call__(self, config: RunConfig, name: str, *, head_alone: bool) -> dict[str, Any]:
        """The figures of a case.

        Raises:
            InputError: a setting that does not fit, no compiler, or a step that it refuses for
                another reason than memory.
        """
        ...


@contextmanager
def compiler(target: Target) -> Iterator[Compile]:
    """What compiles for a target: this process for the devices here, else one of its own.

    Raises:
        InputError: GPUs that are not here, and no compiler for them.
    """
    if target.is_here:
        yield partial(_compile, target)
        return
    if target.described:
        check_gpu_compiler(target.name)
    command = [sys.executable, "-m", "balora_jax.plan.ahead", target.name]
    environment = os.environ | target.environment
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(
        command, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        try:
            yield partial(_ask, process, log, target)
        finally:
            process.kill()
            with suppress(BrokenPipeError):  # what it never read
                process.stdin.close()


def check_gpu_compiler(topology: str) -> None:
    """That XLA's GPU compiler is here, in the version of jaxlib.

    Raises:
        InputError: it is not.
    """
    wanted = metadata.version("jaxlib")
    try:
        found = metadata.version(GPU_COMPILER)
    except metadata.PackageNotFoundError:
        found = "none"
    if found != wanted:
        raise InputError(
            f"--topology {topology}: expected XLA's GPU compiler, {GPU_COMPILER} {wanted} (the "
            f"version of jaxlib), got {found}. Install it with pip install "
            f"{GPU_COMPILER}=={wanted}, best in an environment for plans alone."
        )


def _ask(
    process: subprocess.Popen,
    log: IO[str],
    target: Target,
    config: RunConfig,
    name: str,
    *,
    head_alone: bool,
) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    case = {"config": config.model_dump(mode="json"), "name": name, "head_alone": head_alone}
    answer = ""
    # A process that could not start has closed its end: its message is in the log.
    with suppress(BrokenPipeError):
        process.stdin.write(json.dumps(case) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
    if not answer:
        process.wait()
        log.seek(0)
        said = (log.read().strip().splitlines() or ["no message"])[-1][:400].rstrip(".")
        install = "Install the TPU compiler with pip install '.[plan]', or change"
        advice = install if target.platform == "tpu" else "Change"
        raise InputError(
            f"--topology {target.name}: expected the step to compile, got: {said}. {advice} "
            "topology, mesh or batch."
        )
    found = json.loads(answer)
    if "error" in found:
        raise InputError(found["error"])
    return found["row"]


def _compile(target: Target, config: RunConfig, name: str, *, head_alone: bool) -> dict[str, Any]:
    """Compile one case in this process."""
    from balora_jax.plan import arguments, compiled

    mesh = sharding.make_mesh(config.mesh, described_devices(target))
    base = arguments.opened_base(config.model)
    return compiled.compile_case(config, name, base.config, mesh, head_alone=head_alone)


def without_libraries(config: RunConfig, target: Target) -> RunConfig:
    """The config with attention that needs no cuDNN, for GPUs that are not here."""
    if target.platform != "gpu" or target.is_here:
        return config
    tree = config.model_dump(mode="json")
    tree["model"]["attention"] = "xla"
    return parse_config(tree, "plan")


def main(arguments: Sequence[str]) -> None:
    """Answer the cases on standard input until it ends."""
    (name,) = arguments
    target = parse_target(name)
    # Libraries may print; the answers have a channel of their own.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            case = json.loads(line)
            config = parse_config(case["config"], case["name"])
            try:
                row = _compile(target, config, case["name"], head_alone=case["head_alone"])
                found: dict[str, Any] = {"row": row}
            except InputError as error:
                found = {"error": str(error)}
            print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
