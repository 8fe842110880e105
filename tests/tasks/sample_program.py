"""A program: the loss with a sampled and with a kept teacher on four virtual devices, against one.

``python -m tests.tasks.sample_program FILE``; by test_text_sample.py in a process of its own,
because the number of devices is fixed when JAX starts. ``FILE`` gets both as JSON.
"""

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from tests import compiler

if __name__ == "__main__":
    os.environ.update(compiler.on_cpu(4))

import jax
import jax.numpy as jnp
import numpy as np

from balora_jax.config import MeshConfig
from balora_jax.numerics.objective import weights
from balora_jax.parallel import sharding
from balora_jax.tasks.text.loss import HIDDEN, HeadPlan, tokens_of
from balora_jax.tasks.text.sample import RowSample, Share
from balora_jax.training import steps
from tests.training import tiny_loss

ON = {"consistency": 0.7, "diversity": 0.3, "spectral": 0.4, "k": 3, "top_k": 5}
FEW = {"consistency": 0.7, "diversity": 0.3, "top_k": 5}  # quick to compile


@dataclass(frozen=True)
class Given(RowSample):
    """Rows that the test draws: key number i draws those of place i in a table."""

    table: tuple = ()

    def draw(self, key):
        return jnp.asarray(self.table)[jax.random.key_data(key)[-1]]


@dataclass(frozen=True)
class Of(Share):
    """The share that is one sample."""

    sample: RowSample | None = None

    def of(self, rows):
        return self.sample


def compute(head="fused", sample=None, mesh=None, on=ON, **batch):
    """``number of a key -> (loss, parts), gradient`` of the four rows, jitted."""
    tiny = tiny_loss.Tiny(head=head, **on)
    loss = replace(tiny.parts.loss, share=Of(0.5, sample=sample), drops=False)
    whole = tiny_loss.batch(1) | batch
    if mesh is not None:
        flatten, across = sharding.flatten_tokens(mesh), sharding.across_devices(mesh)
        axes, layout = sharding.head_axes(mesh), sharding.head_layout(mesh)
        loss = replace(loss, head=HeadPlan(head, tiny_loss.CHUNK, axes, across, layout, flatten))
    placed = {k: jnp.asarray(v) for k, v in whole.items()}
    placed = placed if mesh is None else steps.place_batch(whole, mesh)
    counts, scales = tiny.parts.counts(placed), weights(tiny.objective, 0, 10)

    def both(batch, key):
        one = {name: value[0] for name, value in batch.items()}
        found = jax.value_and_grad(loss, has_aux=True)
        return found(tiny.adapters, tiny.constants, one, counts, scales, key)

    jitted = jax.jit(both)
    return lambda number=0: jitted(placed, jax.random.key(number))


def hidden_of(batch):
    """The teacher's hidden states of the counted positions, zero elsewhere."""
    tiny = tiny_loss.Tiny(**ON)
    bound = tiny.plain.bind(tiny.constants.frozen)
    one = {name: jnp.asarray(value[0]) for name, value in batch.items()}
    hidden = np.asarray(bound.hidden(*tokens_of(one)))
    return np.where(one["loss_mask"][..., None] >= 0, hidden, 0)[None]


def figures(found):
    (loss, parts), gradient = found
    values = {"loss": loss, **parts}
    values |= {f"gradient {k}": jnp.sum(v * jnp.cos(jnp.arange(v.size)).reshape(v.shape))
               for k, v in gradient.items()}  # fmt: skip
    return {name: float(value) for name, value in values.items()}


def main():
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, sequence=2))
    kept = {HIDDEN: hidden_of(tiny_loss.batch(1))}
    one = Given(4, 2, table=(((1, 2),),))
    parts = Given(2, 1, 2, sharding.across_rows(mesh), table=(((1,), (0,)),))
    with jax.set_mesh(mesh):
        table = {
            "sampled": figures(compute(sample=parts, mesh=mesh, on=FEW)()),
            "sampled, plain": figures(compute("plain", sample=parts, mesh=mesh, on=FEW)()),
            "kept, sampled": figures(compute(sample=parts, mesh=mesh, on=FEW, **kept)()),
        }
    wanted = dict.fromkeys(table, figures(compute(sample=one, on=FEW)()))
    Path(sys.argv[1]).write_text(json.dumps({"found": table, "wanted": wanted}))


if __name__ == "__main__":
    main()
