"""The loss and the terms of a decoder on held-out rows of text, taken as training examples."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from balora_jax.array_types import Array, Float
from balora_jax.config import DataConfig, EvalConfig
from balora_jax.data.examples import Example
from balora_jax.data.layout import Shape, laid_out, placed, shapes_for
from balora_jax.data.sources import load_rows
from balora_jax.data.templates import ExampleSettings
from balora_jax.evals.benchmark import Benchmark, TextBenchmark
from balora_jax.numerics.objective import TASK
from balora_jax.parallel import hosts, sharding
from balora_jax.progress import progress_bar
from balora_jax.tasks.text.loss import Arrays, Constants, Counts, TextLoss, counts_of
from balora_jax.tasks.text.score import Rows, example_settings

SHOW_PROGRESS_ABOVE = 500
_MOST_STEPS = 128
"""Micro-batches that are looked at to choose the shapes."""


class HeldOutRows(NamedTuple):
    """Validation rows before they are tokenised, and how they become examples."""

    rows: Rows
    settings: ExampleSettings


def held_out_rows(data: DataConfig, config: EvalConfig, benchmark: Benchmark) -> HeldOutRows:
    """The validation rows as training examples: the prompt of the score, and a response.

    The response is that of the training rows where the rows have its column, else the right answer.
    """
    asks = benchmark if isinstance(benchmark, TextBenchmark) else None
    source, split = data.validation, data.validation_split
    if source is None and asks is not None:
        source, split = asks.source, asks.split
    assert source is not None  # checked before
    rows: Rows = list(map(dict, load_rows(source, split=split, limit=data.validation_limit)))
    settings = example_settings(data)
    if asks is None or data.messages_column is not None:
        return HeldOutRows(rows, settings)
    prompt = config.prompt_column or asks.prompt_column or data.prompt_column
    response = config.gold_column or asks.gold_column or data.response_column
    if asks.question is not None:
        rows = [{**row, prompt: asks.question(row)} for row in rows]
    first = rows[0] if rows else {}
    prompt = prompt if prompt in first else data.prompt_column
    response = data.response_column if data.response_column in first else response
    return HeldOutRows(rows, replace(settings, prompt_column=prompt, response_column=response))


class TextValidator:
    """Loss, perplexity and terms of held-out examples, with one compiled forward for a whole run.

    Sums over positions are divided once, by the count over all examples. A term that couples rows
    is a statistic of a micro-batch: here of as many examples as one of the training has, in their
    order, and of the micro-batches the mean by their counted positions.

    Args:
        loss: of the training, on all rows of the teacher.
        examples: the held-out ones.
        micro_batch: examples of a micro-batch.
        length: tokens of a row that holds one example.
        packed: whether several examples may lie in one row.
        pad_id: the token for empty places.
        mesh: the devices.
    """

    def __init__(
        self,
        loss: TextLoss,
        examples: Sequence[Example],
        *,
        micro_batch: int,
        length: int,
        packed: bool,
        pad_id: int,
        mesh: Mesh,
    ):
        self.loss, self.pad_id, self.mesh = loss, pad_id, mesh
        self.groups = [
            examples[start : start + micro_batch] for start in range(0, len(examples), micro_batch)
        ]
        self.shapes = (Shape(micro_batch, length),)
        if packed:
            seen = self.groups[:: -(-len(self.groups) // _MOST_STEPS)]
            self.shapes = shapes_for(
                [[_lengths(group)] for group in seen],
                self.shapes[0],
                row_multiple=sharding.row_parts(mesh),
                length_multiple=sharding.token_parts(mesh),
            )
        self.terms = loss.objective.term_set.terms
        self.names = (TASK, *(term.name for term in self.terms))
        self._forward = jax.jit(self._sums, out_shardings=sharding.replicated(mesh))

    def __call__(self, constants: Constants, trainable: Arrays) -> dict[str, float]:
        """``loss``, ``perplexity`` and each term that is on, unweighted."""
        total = sum(map(len, self.groups))
        quiet = total < SHOW_PROGRESS_ABOVE or not hosts.is_first()
        found = []
        with progress_bar(total=total, desc="validation", unit="row", disable=quiet) as bar:
            for group in self.groups:
                found.append(hosts.gathered(self._forward(constants, trainable, self._laid(group))))
                bar.update(len(group))
                hosts.moved()
        sums = np.stack(found).astype(np.float64)
        values, tasks, counted = sums[:, :-2], sums[:, -2].sum(), sums[:, -1]
        loss = _ratio(values[:, 0].sum(), tasks)
        with np.errstate(over="ignore"):
            figures = {"loss": loss, "perplexity": float(np.exp(loss))}
        for term, value in zip(self.terms, values[:, 1:].T, strict=True):
            total = value @ counted if term.couples_rows else value.sum()
            figures[term.name] = _ratio(total, counted.sum())
        return figures

    def _sums(self, constants: Constants, trainable: Arrays, batch: Arrays) -> Float[Array, "S"]:
        """Of one micro-batch: the sum of the loss and of each term, and both counts."""
        counts = counts_of(batch, self.loss.objective.mask_alignment)
        one = jnp.ones((), jnp.float32)
        weights = {term.name: one for term in self.terms}
        _, parts = self.loss(trainable, constants, batch, Counts(one, one, 1), weights, None)
        values = [parts[name] for name in self.names]
        return jnp.stack([jnp.asarray(v, jnp.float32) for v in (*values, counts.task, counts.term)])

    def _laid(self, group: Sequence[Example]) -> dict[str, Array]:
        """Arrays [B, T] of a micro-batch, on the devices that hold their rows."""
        if len(self.shapes) == 1:
            shape, rows = self.shapes[0], [[number] for number in range(len(group))]
        else:
            shape, (rows,) = placed([_lengths(group)], self.shapes)
        batch = laid_out(group, rows, shape, self.pad_id, numbered=False)
        layout = NamedSharding(
            self.mesh, PartitionSpec(*sharding.batch_sharding(self.mesh).spec[1:])
        )
        return {name: hosts.place(array, layout) for name, array in batch.items()}


def _lengths(group: Sequence[Example]) -> list[int]:
    return [len(example.input_ids) for example in group]


def _ratio(total: Any, count: Any) -> float:
    return float(total / count) if count else 0.0
