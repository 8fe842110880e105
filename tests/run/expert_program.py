"""A program: one step of models with spread experts on virtual devices against one, as JSON.

``python -m tests.run.expert_program``; run by test_expert_meshes.py with BALORA_EXPERT_MESHES=all,
in a process of its own.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from balora_jax.config import MeshConfig
from balora_jax.parallel import sharding
from balora_jax.training import steps
from tests import compiler
from tests.run import mesh_program

WIDE = {"hidden_size": 64, "head_dim": 16}
MODELS = {
    "mixtral": {**mesh_program.MODELS["mixtral"], **WIDE, "intermediate_size": 128},
    "qwen3_moe": {
        **mesh_program.DECODER,
        **WIDE,
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "norm_topk_prob": False,
    },
}
LAYERS, EXPERTS = 2, 4
NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
ADAPTERS = {
    "experts": {"target_modules": ["o_proj", "w1", "w2"], "start": "pissa"},
    "attention": {"target_modules": ["q_proj", "o_proj"]},
    "DoRA": {"target_modules": ["w1", "w2", "w3"], "method": "dora"},
    "dropout": {"target_modules": ["v_proj", "w1", "w2"], "dropout": 0.3},
}
MESHES = {
    "expert 2": {"expert": 2},
    "expert 4": {"expert": 4},
    "data 2, expert 2": {"data": 2, "expert": 2},
    "fsdp 2, expert 2": {"fsdp": 2, "expert": 2},
    "expert 2, tensor 2": {"expert": 2, "tensor": 2},
    "expert 2, sequence 2": {"expert": 2, "sequence": 2},
    "fsdp 2, expert 2, tensor 2": {"fsdp": 2, "expert": 2, "tensor": 2},
}
ALL = os.environ.get("BALORA_EXPERT_MESHES") == "all"
CASES = [
    (model, adapter, kind, ["expert 2", "fsdp 2, expert 2, tensor 2"])
    for model, adapter, kind in itertools.product(MODELS, ADAPTERS, ("none", "int8", "nf4"))
    if adapter in ("experts", "attention") or kind == "none"
]
CASES.append(("mixtral", "experts", "none", list(MESHES)[1:-1]))
PAIRS = [
    (f"{model}, {adapter}, {kind}", mesh)
    for model, adapter, kind, meshes in CASES
    for mesh in meshes
    if ALL
]


def found():
    """What the program prints."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.run.expert_program"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
        env={**os.environ, **compiler.on_cpu(8)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def by_layer(path, value, parts):
    """From the order of a run, its devices one after another, to that of one device."""
    if ".experts." not in path:
        return value
    apart = value.reshape(parts, LAYERS, EXPERTS // parts, *value.shape[1:])
    return np.concatenate([np.concatenate(apart[:, i]) for i in range(LAYERS)])


def by_device(path, value, parts):
    """The reverse."""
    places = by_layer(path, np.arange(len(value)), parts) if value.ndim else 0
    held = np.empty_like(value)
    held[places] = value
    return held


def run(title, folder, mesh):
    """As ``mesh_program.run``, with how many times smaller a device's experts are."""
    model, adapter, kind = title.split(", ")
    section = dict(ADAPTERS[adapter])
    if model == "qwen3_moe":
        section["target_modules"] = [NAMES.get(name, name) for name in section["target_modules"]]
    config = mesh_program.config_of(folder / model, section, kind)
    parts = mesh.shape["expert"]
    with jax.set_mesh(mesh):
        made = mesh_program.prepared(config, folder / model, mesh)
        program, functions, trainable, constants = made
        before = {
            path: np.asarray(value)
            + by_device(path, mesh_program.noise(path, value.shape, 0.1), parts)
            for path, value in trainable.items()
        }
        state = steps.initial_state(program.layout.placed(before), functions.optimizer, mesh)
        step = steps.compile_step(functions, state, mesh)
        batch = steps.place_batch(mesh_program.batch_of(is_encoder=False), mesh)
        state, metrics = step(state, constants, batch, jax.random.key(0))
    held = {**constants.frozen, **constants.origin, **state.adapters}
    kernel = constants.frozen["layers.block_sparse_moe.experts.w1.kernel"]
    share = kernel.nbytes // kernel.addressable_shards[0].data.nbytes
    return share, (
        {name: float(value) for name, value in metrics.items()},
        {
            path: by_layer(path, np.asarray(value, np.float64) - before[path], parts)
            for path, value in state.adapters.items()
        },
        {
            path: by_layer(path, np.asarray(value), parts)
            for path, value in constants.frozen.items()
        },
        {
            path: value
            for path, value in held.items()
            if value.sharding.spec != program.layout(path, value.shape).spec
        },
        [],
    )


def main():
    results = {}
    one = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, raw in MODELS.items():
            mesh_program.write_checkpoint(folder / name, raw)
        for title in dict.fromkeys(title for title, _ in PAIRS):
            _, alone = run(title, folder, one)
            for name in [mesh for case, mesh in PAIRS if case == title]:
                sizes = {"data": 1, **MESHES[name]}
                devices = jax.devices()[: int(np.prod(list(sizes.values())))]
                mesh = sharding.make_mesh(MeshConfig(**sizes), devices)
                share, spread = run(title, folder, mesh)
                results[f"{title} / {name}"] = mesh_program.compared(alone, spread) | {
                    "share": share
                }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
