"""A program: starts, head factor and weights on many devices and in two processes, against one.

``python -m tests.run.start_program FOLDER`` does it on eight virtual devices and leaves the values
of a mesh of four for ``… FOLDER PROCESS PORT``, one of two processes with two devices each. Run by
test_start_meshes.py; the number of devices is fixed when JAX starts.
"""

import json
import os
import re
import sys
from pathlib import Path

from tests import compiler

if __name__ == "__main__":
    devices = 8 if len(sys.argv) == 2 else 2
    os.environ.update(compiler.on_cpu(devices), OPENBLAS_NUM_THREADS="1")

import jax
import jax.numpy as jnp
import numpy as np

from balora_jax.config import MeshConfig
from balora_jax.models import starts
from balora_jax.models.starts import stacks
from balora_jax.parallel.sharding import Layout, make_mesh
from balora_jax.pretrained.checkpoint import open_base
from balora_jax.tasks.text.program import text_program
from balora_jax.training.run import Loaded
from tests.run.mesh_program import MODELS, config_of, write_checkpoint

FROZEN = ("lm_head.embedding", "layers.mlp.down_proj.kernel", "layers.self_attn.k_proj.kernel")
TARGETS = ["q_proj", "down_proj"]
STARTS = ("pissa_niter_4", "pissa")
EVERY = (*STARTS, "lora", "olora", "orthogonal")


def mesh_of(tensor, fsdp):
    sizes = MeshConfig(data=1, fsdp=fsdp, tensor=tensor)
    return make_mesh(sizes, jax.devices()[: tensor * fsdp])


def arrays_of(folder, start, mesh, method="lora"):
    """Everything that a run begins with, by name."""
    adapter = {"target_modules": TARGETS, "start": start, "method": method}
    config = config_of(folder, adapter, "none")
    base = open_base(str(folder))
    program = text_program(config, base.config, mesh)
    with jax.set_mesh(mesh):
        frozen = base.load_for(program.plain, mesh)
        trainable, origin = program.adapters.begin(
            frozen, config.model, program.layout, seed=config.training.seed
        )
        constants = program.constants(Loaded(frozen, origin, trainable))
    factor = {"head_factor": constants.head_factor}
    arrays = {**frozen, **factor, **{f"origin {k}": v for k, v in origin.items()}, **trainable}
    return arrays, program.layout


def blocks_of(arrays):
    """The parts of every array that lie here, with the slices they are."""
    return {
        path: [(shard.index, np.asarray(shard.data)) for shard in array.addressable_shards]
        for path, array in arrays.items()
    }


def away(got, want):
    return float(np.abs(np.float64(got) - np.float64(want)).max() / np.abs(want).max())


def products(arrays):
    """A B by layer: alone free of the signs that a decomposition may choose."""
    return {
        stem: np.float64(arrays[f"{stem}.lora_a"]) @ np.float64(arrays[f"{stem}.lora_b"])
        for stem in {path.rpartition(".")[0] for path in arrays if path.endswith(".lora_a")}
    }


def compared(one, other, layout):
    whole = {path: np.asarray(value) for path, value in one.items()}
    found = {path: np.asarray(value) for path, value in other.items()}
    assert set(whole) == set(found)
    return {
        "frozen": all(np.array_equal(found[path], whole[path]) for path in FROZEN),
        "factors": max(away(found[p], v) for p, v in whole.items() if "lora_" in p and v.any()),
        "products": max(
            [away(products(found)[p], v) for p, v in products(whole).items() if v.any()] or [0.0]
        ),
        "head": away(found["head_factor"], whole["head_factor"]),
        "elsewhere": [
            path
            for path, value in other.items()
            if path != "head_factor"
            and value.sharding != layout(path.removeprefix("origin "), value.shape)
        ],
    }


def largest_gather(start, layout):
    """Numbers of the largest gathered array of a start's program, as a share of a layer's."""
    shape = (3, 256, 512)
    path = "layers.self_attn.q_proj"
    names = {f"{path}.lora_a": (3, 256, 4), f"{path}.lora_b": (3, 4, 512)}
    places = tuple(layout(*pair) for pair in names.items())
    empty = tuple(
        jax.ShapeDtypeStruct(pair[1], jnp.bfloat16, sharding=place)
        for pair, place in zip(names.items(), places, strict=True)
    )
    place = layout(f"{path}.kernel", shape)
    kernel = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)
    where = jnp.int32(0), jnp.float32(1), jax.random.key(0)
    compiled = stacks._write_layer.lower(
        empty, kernel, None, *where, starts.STARTS[start], 4, places
    ).compile()
    gathered = re.findall(r"= \w+\[([\d,]+)\][^=]* all-gather\(", compiled.as_text())
    assert "all-gather(" not in compiled.as_text() or gathered
    sizes = [np.prod([int(n) for n in text.split(",")]) for text in gathered]
    return float(max(sizes, default=0) / (256 * 512))


def main(folder):
    raw = MODELS["llama"]
    write_checkpoint(folder / "llama", raw)
    found = {}
    meshes = {"fsdp 8": mesh_of(1, 8), "tensor 2 x fsdp 4": mesh_of(2, 4)}
    for start in EVERY:
        one, _ = arrays_of(folder / "llama", start, mesh_of(1, 1))
        for title, mesh in meshes.items():
            if start in STARTS or title != "fsdp 8":
                other, layout = arrays_of(folder / "llama", start, mesh)
                found[f"{start} / {title}"] = compared(one, other, layout)
    for title, mesh in meshes.items():
        layout = Layout(layout.axes, mesh)
        found[f"gathered / {title}"] = {s: largest_gather(s, layout) for s in STARTS}
    for start in STARTS:
        four, _ = arrays_of(folder / "llama", start, mesh_of(2, 2), "dora")
        np.savez(folder / f"{start}.npz", **{k: np.asarray(v) for k, v in four.items()})
    print(json.dumps(found))


def worker(folder, process, port):
    """One of two processes; the largest difference from the values of one process."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address = f"127.0.0.1:{port}"
    jax.distributed.initialize(address, num_processes=2, process_id=process)
    assert jax.device_count() == 4
    found = {}
    for start in STARTS:
        wanted = np.load(folder / f"{start}.npz")
        here = blocks_of(arrays_of(folder / "llama", start, mesh_of(2, 2), "dora")[0])
        assert set(here) == set(wanted.files)
        found[start] = {
            path: max(away(part, wanted[path][index]) for index, part in parts)
            for path, parts in here.items()
        }
        found[start]["blocks"] = sum(len(parts) for parts in here.values())
    print(json.dumps(found))


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(Path(sys.argv[1]))
    else:
        worker(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
