"""Moments of what enters the layers of a decoder on its training rows, for some starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from balora_jax.array_types import Array, Float
from balora_jax.data.examples import Example
from balora_jax.models.starts.moments import MEASURED, MOMENT
from balora_jax.parallel import hosts, sharding
from balora_jax.tasks.text.program import TextProgram, model_structure


@dataclass(frozen=True)
class RowMoments:
    """Second moments of the inputs of the frozen model's layers over rows of text.

    Attributes:
        program: the computation; its start says how many rows it reads.
        frozen: the weights.
        examples: the training rows; the first ones are taken.
        length: tokens of every row of a batch.
    """

    program: TextProgram
    frozen: Mapping[str, Array]
    examples: Sequence[Example]
    length: int

    def __call__(self, path: str) -> Float[Array, "L D D"]:
        """``Σ x xᵀ`` of each layer of a stack, divided by the number of its rows x; float32.

        One stack at a time: a stack's moments are as large as L kernels [D, D] in float32.
        """
        program, mesh = self.program, self.program.mesh
        model = model_structure(
            program.decoder, program.config.model, program.mesh, {path: MEASURED}
        )
        name = f"{path}.{MOMENT}"
        layout = sharding.Layout(model.axes, mesh)
        place = layout(name, model.adapters[name].shape)

        def ending(moments: dict[str, Array], frozen: Mapping[str, Array], batch: dict) -> Array:
            tokens = batch["input_ids"], batch["positions"], batch["segment_ids"]
            hidden = model.bind(frozen, moments).hidden(*tokens)
            return jnp.sum(hidden.astype(jnp.float32))

        @jax.jit
        def added(total: dict[str, Array], frozen: Mapping[str, Array], batch: dict) -> dict:
            found = jax.grad(ending)(jax.tree.map(jnp.zeros_like, total), frozen, batch)
            found = jax.tree.map(jnp.add, total, found)
            return jax.lax.with_sharding_constraint(found, {name: place})

        total = {name: jnp.zeros(model.adapters[name].shape, jnp.float32, device=place)}
        batches = self.batches()
        with jax.set_mesh(mesh):
            for batch in batches:
                total = added(total, self.frozen, batch)
        tokens = sum(batch["input_ids"].size for batch in batches)
        return total[name] / tokens

    def batches(self) -> list[dict[str, Array]]:
        """The rows end to end as batches [B, T] without padding; the last one begins again.

        A row that reaches over the end of a row of the batch goes on in the next, with its
        positions, but does not see its own beginning there.
        """
        training, mesh = self.program.config.training, self.program.mesh
        shape = training.batch_size // training.accumulation, self.length
        rows = self.examples[: self.program.adapters.start.rows]
        ids = np.concatenate([row.input_ids for row in rows]).astype(np.int32)
        positions = np.concatenate([np.arange(len(row.input_ids), dtype=np.int32) for row in rows])
        count = -(-len(ids) // (shape[0] * shape[1]))
        places = np.arange(count * shape[0] * shape[1], dtype=np.int32) % len(ids)
        tables = {
            "input_ids": ids[places],
            "positions": positions[places],
            "segment_ids": np.cumsum(positions[places] == 0, dtype=np.int32),
        }
        layout = NamedSharding(mesh, PartitionSpec(*sharding.batch_sharding(mesh).spec[1:]))
        whole = {name: table.reshape(count, *shape) for name, table in tables.items()}
        return [
            {name: hosts.place(table[i], layout) for name, table in whole.items()}
            for i in range(count)
        ]
