"""A program: the head on eight virtual devices against one, printed as JSON.

``python -m tests.numerics.sharded_head``; run by test_head_mesh.py in a process of its own, because
the number of devices is fixed when JAX starts.
"""

import json
import os
from dataclasses import replace

from tests import compiler

if __name__ == "__main__":
    os.environ.update(compiler.on_cpu(8))

import jax
import jax.numpy as jnp
import numpy as np

from balora_jax.config import MeshConfig
from balora_jax.numerics import linalg
from balora_jax.numerics.head import head_loss, unwrapped
from balora_jax.numerics.head_types import LINEAR, ONE_DEVICE, LogitMap, Rows
from balora_jax.parallel import sharding
from tests.numerics.head_settings import SUMS, Scales, Settings, flat

N, D, V, CHUNK = 512, 160, 1200, 24
CAPPED = LogitMap(soft_cap=4.0)
PUBLISHED = Settings(teacher_entropy=False, temperature=2.0, top_k=20, k=10)
CASES = {
    "published": (PUBLISHED, LINEAR),
    "nuclear, full entropy": (
        replace(PUBLISHED, temperature=1.0, top_k=0, k=3, norm="nuclear"), LINEAR,
    ),
    "centred, adaptive": (
        replace(PUBLISHED, top_k=7, center_rows=True, teacher_entropy=True), LINEAR,
    ),
    "soft cap": (replace(PUBLISHED, center_rows=True), CAPPED),
}  # fmt: skip
NAMES = ("loss", *SUMS)
SCALES = Scales(0.3, 0.7, 1.1, 25.0)
ADAPTIVE = 0.01
# Sizes of data, fsdp, sequence and tensor.
MESHES = {"data": (8, 1, 1, 1), "fsdp and tensor": (2, 2, 1, 2), "tensor": (1, 1, 1, 8)}


def adapt(scales, mean_entropy):
    return scales | {"consistency": ADAPTIVE * mean_entropy["consistency"]}


def arrays():
    """Hidden states in units of 2^-8, a head in units of 2^-10: no row times column is 2^24 units.

    So products and their partial sums are exact in float32, whatever their order.
    """
    rng = np.random.default_rng(0)
    decay = np.linspace(1, 0.05, D)
    student = rng.standard_normal((N, D)) * decay
    teacher = student + 0.3 * rng.standard_normal((N, D)) * decay
    # Devices own different numbers of rows that count, so their loops have different lengths.
    label_mask = rng.random(N) < np.repeat(np.linspace(0, 1, 8), N // 8)
    embedding = rng.standard_normal((V, D)) / 4
    # The mean of a device's columns is not that of all.
    embedding[:, 0] += np.linspace(0, 2, V)
    # Ties, so that the rule for equal logits must hold across devices.
    embedding = np.concatenate([embedding[: V // 2]] * 2)
    student, teacher, embedding = (
        np.round(array * unit) / unit
        for array, unit in ((student, 2**8), (teacher, 2**8), (embedding, 2**10))
    )
    longest = max((abs(hidden) @ abs(embedding).T).max() for hidden in (student, teacher))
    assert longest * 2**18 < 2**24
    rows = Rows(
        jnp.asarray(student, jnp.float32),
        jnp.asarray(teacher, jnp.float32),
        jnp.asarray(rng.integers(0, V, N), jnp.int32),
        jnp.asarray(label_mask),
        jnp.asarray(np.roll(label_mask, 1)),
    )
    return rows, jnp.asarray(embedding, jnp.float32)


def run(rows, embedding, spec, logit_map, mesh):
    factor = jnp.asarray(linalg.head_factor(np.asarray(embedding), center=spec.center_rows))
    axes, across = ONE_DEVICE, unwrapped
    if mesh is not None:
        axes, across = sharding.head_axes(mesh), sharding.across_devices(mesh)

    @jax.jit
    def value_and_gradient(rows, embedding, factor):
        def loss(student):
            return head_loss(
                rows._replace(student=student), embedding, SCALES.by_name, spec.chosen, chunk=CHUNK,
                factor=factor, logit_map=logit_map, adapt=adapt, axes=axes, across=across,
            )  # fmt: skip

        return jax.value_and_grad(loss, has_aux=True)(rows.student)

    (loss, sums), gradient = value_and_gradient(rows, embedding, factor)
    return np.float64([loss, *flat(sums)]), np.float64(gradient)


def main():
    rows, embedding = arrays()
    found = {}
    for name, (spec, logit_map) in CASES.items():
        values, gradient = run(rows, embedding, spec, logit_map, None)
        for title, sizes in MESHES.items():
            mesh = sharding.make_mesh(
                MeshConfig(**dict(zip(("data", "fsdp", "sequence", "tensor"), sizes, strict=True)))
            )
            with jax.set_mesh(mesh):
                other_values, other = run(rows, embedding, spec, logit_map, mesh)
            found[f"{name} / {title}"] = {
                "one": dict(zip(NAMES, values, strict=True)),
                "mesh": dict(zip(NAMES, other_values, strict=True)),
                "gradient": float(np.linalg.norm(other - gradient)),
                # Of the rows that each of eight devices would own.
                "parts": np.linalg.norm(gradient.reshape(8, -1), axis=1).tolist(),
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
