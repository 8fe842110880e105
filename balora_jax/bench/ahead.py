"""What would a step need on devices that are not here? Compile it for them, from shapes alone.

``python -m balora_jax.bench.ahead TOPOLOGY CONFIG ...`` is run by :func:`compiled_for` in a process
of its own: the TPU compiler (``libtpu``, extra ``plan``) must not be loaded where an ordinary start
on a CPU or a GPU would then look for a TPU.
"""

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from balora_jax.config import RunConfig
from balora_jax.config_file import dump_config, load_config
from balora_jax.errors import InputError

ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
"""What libtpu needs to compile without a TPU and without asking a metadata server for one."""

KINDS = {"v4": "v4", "v5e": "v5litepod", "v5p": "v5p", "v6e": "v6e"}
"""Name of a topology to that of the accelerator type."""


def compiled_for(topology: str, config: RunConfig, names: Sequence[str]) -> list[dict[str, Any]]:
    """Compile cases of a config for a TPU slice such as ``v5e:4x4``; figures of each.

    Returns:
        A row per case: ``case``, ``bytes_per_device`` (arguments, temporaries, output, total; None
        where the step does not fit, and ``does_not_fit`` then says what it needs),
        ``flops_per_device`` (model FLOPs over devices), ``compile_seconds``.

    Raises:
        InputError: an unknown topology, no TPU compiler, or a step that it refuses.
    """
    kind = topology.partition(":")[0]
    if not re.fullmatch(r"(v4|v5e|v5p|v6e):\d+(x\d+){1,2}", topology):
        raise InputError(
            f"--topology: expected {', '.join(KINDS)} and a shape, such as v5e:4x4 or v5p:2x2x1, "
            f"got {topology!r}. Correct it."
        )
    chips = math.prod(int(size) for size in topology.partition(":")[2].split("x"))
    environment = os.environ | ENVIRONMENT | {"TPU_ACCELERATOR_TYPE": f"{KINDS[kind]}-{chips}"}
    command = [sys.executable, "-m", "balora_jax.bench.ahead", topology, *names]
    done = subprocess.run(
        command, input=dump_config(config), env=environment, capture_output=True, text=True
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(
            f"--topology {topology}: expected the step to compile, got: {last[:400]} Install the "
            "TPU compiler with pip install '.[plan]', or change the mesh or the batch."
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(arguments: Sequence[str]) -> None:
    """Compile the named cases of the config on standard input; print the rows as JSON."""
    import tempfile

    topology, *names = arguments
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(sys.stdin.read(), encoding="utf-8")
        config = load_config(file)
    print(json.dumps(_rows(topology, config, names)))


def _rows(topology: str, config: RunConfig, names: Sequence[str]) -> list[dict[str, Any]]:
    from jax.experimental import topologies

    from balora_jax.bench import workload
    from balora_jax.io.base import open_base
    from balora_jax.training import sharding

    described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    mesh = sharding.make_mesh(config.mesh, described.devices)
    name = config.model.name_or_path
    base = workload.shapes_only(name) or open_base(name, config.model.revision)
    return [
        compile_case(workload.configured(config, case), case.name, base.config, mesh)
        for case in workload.cases_named(names)
    ]


def compile_case(config: RunConfig, name: str, decoder: Any, mesh: Any) -> dict[str, Any]:
    """Compile one case for the devices of a mesh, from shapes alone."""
    import jax

    from balora_jax.bench import workload
    from balora_jax.training import assemble, steps

    program, _ = assemble.program_of(config, decoder, mesh)
    arguments = workload.abstract_arguments(program, 10)
    began = time.monotonic()
    with jax.set_mesh(mesh):
        step = steps.compile_step(assemble.step_parts(program, 10), arguments[0], mesh)
        lowered = step.lower(*arguments)
        try:
            compiled, needed = lowered.compile(), None
        except jax.errors.JaxRuntimeError as error:
            # A step that is too large is a result; whatever else the compiler refuses is not.
            found = re.search(r"temporaries \((\S+)\) exceeds available HBM \((\S+)\)", str(error))
            if found is None:
                raise
            compiled, needed = None, f"{found[1]} of {found[2]}"
    rows, length = config.training.batch_size, config.data.max_length
    counted = rows * (length - 1)
    return {
        "case": name,
        "bytes_per_device": None if compiled is None else memory_of(compiled),
        "does_not_fit": needed,
        "flops_per_device": workload.model_flops(program, (1, rows, length), counted) / mesh.size,
        "compile_seconds": round(time.monotonic() - began, 1),
    }


def memory_of(compiled: Any) -> dict[str, int]:
    """Bytes per device by the compiler's own analysis; donated outputs are counted once."""
    found = compiled.memory_analysis()
    arguments, temporaries = found.argument_size_in_bytes, found.temp_size_in_bytes
    output = found.output_size_in_bytes - found.alias_size_in_bytes
    return {
        "arguments": arguments,
        "temporaries": temporaries,
        "output": output,
        "total": arguments + temporaries + output,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
