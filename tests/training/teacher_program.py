"""A program: loss and gradients of a run away from its start, the teacher, on four virtual devices.

``python -m tests.training.teacher_program FOLDER KIND…``; by test_teacher.py in a process of its
own, because the number of devices is fixed when JAX starts. Of each kind ``FOLDER/KIND`` holds
``base``, ``adapter`` (the start), ``later`` (what trains now) and ``batch.npz``; ``mesh.npz`` is
written beside them.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

from tests import compiler

if __name__ == "__main__":
    os.environ.update(compiler.on_cpu(4))

import jax
import jax.numpy as jnp
import numpy as np

from balora_jax.config_file import parse_config
from balora_jax.models.whole import TOKEN_ROWS, stored
from balora_jax.pretrained.checkpoint import head_parts, open_base, open_encoder
from balora_jax.tasks.labels.program import labels_program
from balora_jax.tasks.text.program import text_program
from balora_jax.training import steps
from balora_jax.training.adapters import start_of
from balora_jax.training.run import Loaded

LAMBDAS = {"consistency": 0.7, "diversity": 0.3, "spectral": 0.4}
LABELS = "labels"
MESH = {"data": 1, "fsdp": 2, "tensor": 2}


def config_of(folder, kind, mesh, dropout=0.0, **regularizers):
    """The settings of a kind; ``plain`` in its name stands for the plain head."""
    tree = {
        "model": {"name_or_path": str(folder / "base")},
        "adapter": {"start": str(folder / "adapter"), "dropout": dropout},
        "regularizers": {**LAMBDAS, "teacher": "start", **regularizers},
        "data": {"train": "rows.jsonl", "max_length": 11},
        "training": {"max_steps": 3, "batch_size": 4},
        "mesh": mesh,
    }
    if kind == LABELS:
        labels = {"text_columns": ["text"], "label_column": "kind", "labels": ["a", "b", "c"]}
        tree |= {"task": "labels", "data": {"train": "rows.jsonl", **labels}}
        tree["regularizers"] |= {"norm": "nuclear", "k": 1, "teacher_cache": False}
    else:
        tree["regularizers"] |= {"k": 4}
        tree["training"] |= {"head": "plain" if "plain" in kind else "fused", "head_chunk": 5}
    return parse_config(tree, "here")


def begun(program, base, config):
    """The arrays of a program at its start."""
    frozen = base.load_for(program.plain, program.mesh)
    trainable, origin = program.adapters.begin(frozen, config.model, program.layout, seed=0)
    if config.task == "labels":
        parts = head_parts(program.adapters.start.saved, base.head_rules)
        assert parts.keys() == {rule.path for rule in base.head_rules}
        trainable |= program.layout.placed({k: jnp.asarray(v) for k, v in parts.items()})
    return Loaded(frozen, origin, trainable)


def opened(folder, kind, mesh, **settings):
    """A program, its checkpoint and its arrays at the start."""
    config = config_of(folder, kind, mesh, **settings)
    if kind == LABELS:
        base = open_encoder(str(folder / "base"), num_labels=3)
        program = labels_program(config, base)
    else:
        base = open_base(str(folder / "base"))
        program = text_program(config, base.config)
    return program, base, begun(program, base, config)


def ready(folder, kind, mesh, **settings):
    """A program, its checkpoint, its arrays at the start, and ``trainable -> (loss, parts)``."""
    program, base, loaded = opened(folder, kind, mesh, **settings)
    constants, parts = program.constants(loaded), program.step_parts(3)
    batch = steps.place_batch(
        {name: value[None] for name, value in np.load(folder / "batch.npz").items()}, program.mesh
    )
    weights = {name: jnp.float32(value) for name, value in LAMBDAS.items()}

    def measure(trainable, constants, batch, key):
        first = {name: value[0] for name, value in batch.items()}
        return parts.loss(trainable, constants, first, parts.counts(batch), weights, key)

    return program, base, loaded.trainable, measure, (constants, batch)


def begins(folder, kind, *keys, **settings):
    """The parts of the loss at the start on one device, for each key of the dropout."""
    program, _, trainable, measure, rest = ready(folder, kind, {"data": 1}, **settings)
    with jax.set_mesh(program.mesh):
        return [jax.jit(measure)(trainable, *rest, key)[1] for key in keys]


def measured(folder, kind, mesh):
    """Loss, its parts and the gradients by PEFT's names; the student is ``later``."""
    program, base, _, measure, rest = ready(folder, kind, mesh)
    moved = replace(program.adapters, start=start_of(str(folder / "later")))
    trainable = begun(replace(program, adapters=moved), base, program.config).trainable
    with jax.set_mesh(program.mesh):
        both = jax.jit(jax.value_and_grad(measure, has_aux=True))
        (loss, values), gradients = both(trainable, *rest, None)
    return {"loss": loss, **values}, named(program, base, gradients)


def named(program, base, gradients):
    """Gradients by the names of PEFT's parameters, in its orientation."""
    found = stored(program.adapters.whole, gradients)
    if TOKEN_ROWS in gradients:
        found["trainable_tokens_delta"] = gradients[TOKEN_ROWS]
    for rule in base.head_rules:
        value = np.asarray(gradients[rule.path])
        found[rule.name] = value.T if rule.transpose else value
    for module in program.adapters.modules:
        for leaf, name in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            value = gradients[f"{module.path}.{leaf}"][module.layer]
            found[f"{module.name}.{name}.default.weight"] = np.asarray(value).T
        if f"{module.path}.lora_magnitude" in gradients:
            value = gradients[f"{module.path}.lora_magnitude"][module.layer]
            found[f"{module.name}.lora_magnitude_vector.default.weight"] = value
    return {name: np.asarray(value) for name, value in found.items()}


def main():
    place = Path(sys.argv[1])
    for kind in sys.argv[2:]:
        values, gradients = measured(place / kind, kind, MESH)
        tables = {f"value {name}": np.asarray(value) for name, value in values.items()}
        np.savez(place / kind / "mesh.npz", **tables, **gradients)


if __name__ == "__main__":
    main()
