"""The protocol of a task for the training loop: a checked run, with all but the loop itself."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jax.sharding import Mesh

from balora_jax.array_types import Array
from balora_jax.config import RunConfig
from balora_jax.data.layout import Epoch
from balora_jax.pretrained.checkpoint import Base, EncoderBase
from balora_jax.training.adapters import Adapters
from balora_jax.training.steps import StepParts

Arrays = dict[str, Array]

Validator = Callable[[Any, Arrays], dict[str, float]]
"""``(constants, trainable)`` → loss and terms of the validation rows by name, the loss first."""


class Scored(NamedTuple):
    """What a score finds.

    Attributes:
        figures: of the validation rows; none where these are not scored.
        predictions: of each validation row what was predicted, for the reader.
        samples: answers to the prompts of ``eval.samples``: ``prompt``, ``answer`` and, where there
            is one, ``gold``.
    """

    figures: dict[str, Any]
    predictions: Sequence[dict[str, Any]] = ()
    samples: Sequence[dict[str, Any]] = ()


Scorer = Callable[..., Scored]
"""``(constants, trainable, key, title)`` → what is found, with the figures printed as well."""


class Loaded(NamedTuple):
    """The arrays of a run at step 0.

    Attributes:
        frozen: the checkpoint's weights by path.
        origin: scales and frozen starts of the adapters.
        trainable: what the optimizer changes, float32.
    """

    frozen: Arrays
    origin: Arrays
    trainable: Arrays


@runtime_checkable
class Batches(Protocol):
    """Batches without end, whose position can be saved."""

    def __next__(self) -> dict[str, Any]:
        """Host arrays [micro-batches, B, …] by name."""
        ...

    def tokens(self, batch: dict[str, Any]) -> int:
        """Places of a batch that hold a token."""
        ...

    def epoch(self) -> Epoch:
        """What one epoch is like."""
        ...

    def batches_per_epoch(self) -> int:
        """Batches that one epoch fills, the last perhaps not wholly."""
        ...

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch given out, as plain JSON values."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a saved position."""
        ...


@runtime_checkable
class Run(Protocol):
    """A checked run of any task: opened and found right, with no weights loaded yet."""

    @property
    def config(self) -> RunConfig:
        """The whole run's settings."""
        ...

    @property
    def mesh(self) -> Mesh:
        """The devices."""
        ...

    @property
    def base(self) -> Base | EncoderBase:
        """The pretrained checkpoint."""
        ...

    @property
    def adapters(self) -> Adapters:
        """What trains, and where it begins."""
        ...

    @property
    def trainable(self) -> int:
        """Trainable parameters."""
        ...

    @property
    def total(self) -> int:
        """Parameters of the frozen model."""
        ...

    @property
    def length(self) -> int:
        """Tokens of the longest row of a batch with one example in a row."""
        ...

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each training example, int."""
        ...

    @property
    def report(self) -> Any:
        """What became of the training rows: counts by name."""
        ...

    def describe(self) -> list[str]:
        """Lines about the data, for the start of a run."""
        ...

    @property
    def left_out(self) -> list[dict[str, Any]]:
        """Training rows that cannot be read and were left out: ``set``, ``row``, ``reason``."""
        ...

    def load(self) -> Loaded:
        """The frozen weights, and the start of what trains."""
        ...

    def step_parts(self, total_steps: int) -> StepParts:
        """The pure functions of a training step."""
        ...

    def step_flops(self, shape: Sequence[int], counted: float) -> float:
        """Operations that a step cannot do without.

        Args:
            shape: of its batch, [micro-batches, B, T].
            counted: tokens in the loss.
        """
        ...

    def constants(self, loaded: Loaded) -> Any:
        """What a step reads and never changes: a NamedTuple with ``origin`` among its fields."""
        ...

    def batches(self) -> Batches:
        """The training batches, from the beginning."""
        ...

    def check_folders(self, folder: Path, shared: Path | None = None) -> None:
        """Raises InputError where what is kept of the teacher cannot be written; writes nothing."""
        ...

    def teacher(self, constants: Any, folder: Path, shared: Path | None = None) -> Any:
        """What is computed of the teacher before the first step; None for nothing.

        Kept in ``folder``, that of the run, or in ``shared``, that of several runs, if given.
        """
        ...

    def prepare(self, batch: dict[str, Any], teacher: Any) -> dict[str, Any]:
        """A batch as the step takes it, with its part of what :meth:`teacher` gave."""
        ...

    def validator(self) -> Validator | None:
        """What measures the loss of the validation rows; None where that is not asked for."""
        ...

    def scorer(self) -> Scorer | None:
        """What scores the validation rows; None where there are none."""
        ...
