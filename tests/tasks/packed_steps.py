"""Steps on packed batches against the same steps on padded ones.

``python -m tests.tasks.packed_steps STEPS [CASE ...]`` prints a JSON object for each case; cases on
a mesh want ``BALORA_DEVICES=8``.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

from tests import compiler

if __name__ == "__main__":
    os.environ.update(compiler.on_cpu(int(os.environ.get("BALORA_DEVICES", "1"))))

import jax
import jax.numpy as jnp
import numpy as np
import optax

from balora_jax.config_file import parse_config
from balora_jax.data.labels import LabelsBatches
from balora_jax.data.layout import Shape
from balora_jax.tasks.registry import TASKS
from balora_jax.training import steps
from tests import same_inputs, tiny_labels_run, tiny_run

BETA = 0.9
TERMS = ("task_loss", "consistency", "diversity", "spectral")
ADAPTIVE = {"regularizers": {"consistency_schedule": "adaptive"}}
WHOLE = {"mesh": {"data": 1}}
# Case → task or model, and what is not as in the tiny runs.
CASES = {
    "text": ("llama", {**ADAPTIVE, **WHOLE}),
    "windows": ("gemma2", {**WHOLE, "regularizers": {"center_rows": True}}),
    "official": ("llama", {**WHOLE, "regularizers": {"mask_alignment": "official"}}),
    "plain head": ("llama", {**ADAPTIVE, **WHOLE, "training": {"head": "plain"}}),
    "labels": ("labels", {**ADAPTIVE, **WHOLE}),
    "mesh 2x2x2": ("llama", {**ADAPTIVE, "mesh": {"data": 2, "fsdp": 2, "tensor": 2}}),
    "mesh, sequence": ("llama", {"mesh": {"data": 2, "fsdp": 2, "sequence": 2}}),
    "mesh, windows": ("gemma2", {"mesh": {"data": 4, "tensor": 2}}),
    "mesh, labels": ("labels", {"mesh": {"data": 4, "tensor": 2}}),
}


def config_of(folder, case, steps_in_all):
    """The config of a case: rows of very unequal lengths, two micro-batches of eight."""
    kind, changes = CASES[case]
    rng = np.random.default_rng(0)
    if kind == "labels":
        inputs = tiny_labels_run.write_label_inputs(folder)
        rows = tiny_labels_run.reviews(60, 1)
        for row, more in zip(rows, rng.geometric(0.15, len(rows)), strict=True):
            row["text"] = " ".join([row["text"], *rng.choice(tiny_labels_run.OTHER, min(more, 24))])
        tiny_run.write_rows(inputs / "train.jsonl", rows)
        tree = tiny_labels_run.label_config_tree(inputs)
        # Else a step that overflows the two classes would leave nothing to compare.
        tree["regularizers"]["k"] = 1
    else:
        inputs = tiny_run.write_inputs(folder)
        same_inputs.write_gemma2(folder / "gemma2")
        rows = tiny_run.sums(60, 1)
        for row, more in zip(rows, rng.geometric(0.15, len(rows)), strict=True):
            row["answer"] += "".join(rng.choice(list("0123456789"), min(more, 40)))
        tiny_run.write_rows(inputs / "train.jsonl", rows)
        tree = tiny_run.config_tree(inputs, adapter=tiny_run.FEW, data={"max_length": 52})
        if kind != "llama":
            tree["model"]["name_or_path"] = str(inputs / kind)
    tree["training"] |= {"max_steps": steps_in_all, "batch_size": 16}
    return parse_config(same_inputs.merged(tree, changes), case)


def batches_of(run, padded):
    """The run's own batches, or the same with one example in a row, and rows of one length."""
    if run.config.task == "text":
        return run.batches(mode="padding" if padded else "batch")
    batches: LabelsBatches = run.batches()
    if padded:
        batches.shapes = (Shape(batches.shapes[0].rows, run.length),)
    return batches


def paired(run, count, padded, packed):
    """Steps on both batches, each from the state that the padded step before it left.

    Yields the metrics of both, the largest difference of their gradients (that Adam's first moments
    tell) as a share of the largest number of each array's, and the shapes of both batches.
    """
    loaded, parts = run.load(), run.step_parts(count)
    constants = run.constants(loaded)
    state = steps.initial_state(loaded.trainable, parts.optimizer, run.mesh)
    step = steps.compile_step(parts, state, run.mesh)

    def after(state, batch):
        batch.pop("row", None)
        placed = steps.place_batch(batch, run.mesh)
        state, values = step(jax.tree.map(jnp.copy, state), constants, placed, jax.random.key(0))
        return state, {name: float(value) for name, value in values.items()}

    for _ in range(count):
        batches = next(padded), next(packed)
        before = moments(state)
        found = [after(state, batch) for batch in batches]
        state = found[0][0]
        one, other = (moments(held) for held, _ in found)
        parted = max(
            float(np.abs(one[path] - other[path]).max() / np.abs(one[path] - BETA * value).max())
            for path, value in before.items()
        )
        yield found[0][1], found[1][1], parted, [batch["input_ids"].shape for batch in batches]


def moments(state):
    """Adam's first moments by path: BETA of those before, and 1 - BETA of the gradient."""
    return jax.device_get(optax.tree_utils.tree_get(state.opt_state, "mu"))


def compared(case, count, *, shapes=None):
    """The largest differences of a case over its steps; values as a share of themselves.

    With ``shapes`` only so many of the run's, the largest, so that less is compiled.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = checked(Path(folder), case, count)
        ours = batches_of(run, padded=False)
        ours.shapes = ours.shapes[-(shapes or 0) :]
        with jax.set_mesh(run.mesh):
            found = list(paired(run, count, batches_of(run, padded=True), ours))
    names = [name for name in found[0][0] if name != "spectral_residual"]
    return {
        "values": {
            name: max(abs(a[name] - b[name]) / max(abs(a[name]), 1e-2) for a, b, _, _ in found)
            for name in names
        },
        "gradients": max(parted for _, _, parted, _ in found),
        "terms": {name: min(abs(b[name]) for _, b, _, _ in found[1:]) for name in TERMS},
        "places": [sum(int(np.prod(one[3][i])) for one in found) for i in (0, 1)],
        "shapes": len({one[3][1] for one in found}),
    }


def checked(folder, case, count):
    """The run of a case, ready for its weights."""
    config = config_of(folder, case, count)
    return TASKS[config.task].check(config)


def main(count, *cases):
    """Compare the cases, or all that fit the devices."""
    fitting = [case for case in CASES if ("mesh" in case) == (jax.device_count() > 1)]
    for case in cases or fitting:
        print(json.dumps({"case": case, "steps": int(count)} | compared(case, int(count))))


if __name__ == "__main__":
    main(*sys.argv[1:])
