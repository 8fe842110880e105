"""A program: the head on eight virtual devices against one, printed as JSON.

``python -m tests.numerics.sharded_head``; run by test_head_mesh.py in a process of its own, because
the number of devices is fixed when JAX starts.
"""

import json
import os

from tests import compiler

if __name__ == "__main__":
    os.environ.update(compiler.on_cpu(8))

import jax
import jax.numpy as jnp
import numpy as np

from balora_jax.config import MeshConfig
from balora_jax.numerics import linalg
from balora_jax.numerics.head import (
    LINEAR,
    ONE_DEVICE,
    HeadTerms,
    LogitMap,
    Rows,
    head_loss,
    unwrapped,
)
from balora_jax.numerics.logit_terms import TermScales, TermSpec
from balora_jax.parallel import sharding

N, D, V, CHUNK = 512, 160, 1200, 24
CAPPED = LogitMap(scale=0.8, soft_cap=4.0)
CASES = {
    "published": (TermSpec(True, True, True, 2.0, 20, 10, "frobenius", False, False), LINEAR),
    "nuclear, full entropy": (TermSpec(True, True, True, 1.0, 0, 3, "nuclear", False, False), LINEAR),
    "centred, adaptive": (TermSpec(True, True, True, 2.0, 7, 10, "frobenius", True, True), LINEAR),
    "soft cap": (TermSpec(True, True, True, 2.0, 20, 10, "frobenius", True, False), CAPPED),
}  # fmt: skip
# Sizes of data, fsdp, sequence and tensor.
MESHES = {"data": (8, 1, 1, 1), "fsdp and tensor": (2, 2, 1, 2), "tensor": (1, 1, 1, 8)}


def adapt(scales, mean_entropy):
    return scales._replace(consistency=0.01 * mean_entropy)


def arrays():
    rng = np.random.default_rng(0)
    decay = np.linspace(1, 0.05, D)
    student = rng.standard_normal((N, D)) * decay
    # Devices own different numbers of rows that count, so their loops have different lengths.
    label_mask = rng.random(N) < np.repeat(np.linspace(0, 1, 8), N // 8)
    embedding = rng.standard_normal((V, D)) / 4
    rows = Rows(
        jnp.asarray(student, jnp.float32),
        jnp.asarray(student + 0.3 * rng.standard_normal((N, D)) * decay, jnp.float32),
        jnp.asarray(rng.integers(0, V, N), jnp.int32),
        jnp.asarray(label_mask),
        jnp.asarray(np.roll(label_mask, 1)),
    )
    # Ties, so that the rule for equal logits must hold across devices.
    return rows, jnp.asarray(np.concatenate([embedding[: V // 2]] * 2), jnp.float32)


def run(rows, embedding, spec, logit_map, mesh):
    factor = jnp.asarray(linalg.head_factor(np.asarray(embedding), center=spec.center_rows))
    scales = TermScales(*(jnp.float32(s) for s in (0.3, 0.7, 1.1, 25.0)))
    axes, across = ONE_DEVICE, unwrapped
    if mesh is not None:
        axes, across = sharding.head_axes(mesh), sharding.across_devices(mesh)

    @jax.jit
    def value_and_gradient(rows, embedding, factor):
        def loss(student):
            return head_loss(
                rows._replace(student=student), embedding, scales, spec, chunk=CHUNK,
                factor=factor, logit_map=logit_map, adapt=adapt, axes=axes, across=across,
            )  # fmt: skip

        return jax.value_and_grad(loss, has_aux=True)(rows.student)

    (loss, terms), gradient = value_and_gradient(rows, embedding, factor)
    return np.float64([loss, *terms]), np.float64(gradient)


def main():
    rows, embedding = arrays()
    found = {}
    for name, (spec, logit_map) in CASES.items():
        values, gradient = run(rows, embedding, spec, logit_map, None)
        for title, sizes in MESHES.items():
            mesh = sharding.make_mesh(MeshConfig(**dict(zip(sharding.AXES, sizes, strict=True))))
            with jax.set_mesh(mesh):
                other_values, other = run(rows, embedding, spec, logit_map, mesh)
            # The last value is the residual of the iteration, which is rounding noise.
            error = np.abs(other_values - values)[:-1] / np.maximum(np.abs(values[:-1]), 1e-3)
            kl = 1 + HeadTerms._fields.index("consistency_sum")
            found[f"{name} / {title}"] = {
                "values": float(np.delete(error, kl).max()),
                "consistency": float(error[kl]),
                "gradient": float(np.abs(other - gradient).max() / np.abs(gradient).max()),
                "spectral": float(values[-2]),
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
