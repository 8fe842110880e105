"""The protocol of a start, which makes the first factors of an adapter."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from balora_jax.array_types import Array, Float, PRNGKeyArray
from balora_jax.errors import InputError
from balora_jax.models.adapters import AdaptedModule

Factors = tuple[Float[Array, "D R"], Float[Array, "R F"]]


@runtime_checkable
class Start(Protocol):
    """First values of A and B of every adapted layer; a subclass is one start.

    Attributes:
        name: what ``adapter.start`` calls it.
        has_origin: it is not zero, so that the adapter keeps a frozen copy that it is measured
            from.
        rows: rows of training text whose hidden inputs it reads; 0 for none.
        rank_divisor: it takes multiples of this rank only.
    """

    name: str
    has_origin: bool = True
    rows: int = 0
    rank_divisor: int = 1

    @property
    def allows_dropout(self) -> bool:
        """Whether the delta is zero at step 0 even where inputs are dropped."""
        return not self.has_origin

    @property
    def saved(self) -> Mapping[str, np.ndarray]:
        """Whole tensors that it brings along: none, other than the adapter of a folder."""
        return {}

    @property
    def fingerprint(self) -> str:
        """Identity of what it was read from: nothing, other than the adapter of a folder."""
        return ""

    def named(self, name: str) -> "Start | None":
        """The start of this name: this one, or one of its kind where the name holds a number."""
        return self if name == self.name else None

    def factors(
        self,
        kernel: Float[Array, "D F"],
        rank: int,
        scale: Float[Array, ""] | float,
        key: PRNGKeyArray,
        moment: Float[Array, "D D"] | None,
    ) -> Factors:
        """The factors of one layer, A [D, R] and B [R, F], float32; traced.

        Args:
            kernel: the layer's frozen weight, in the dtype in which it is kept.
            rank: R.
            scale: the factor on ``A B``.
            key: of this layer.
            moment: ``Σ x xᵀ`` over the tokens x of ``rows`` rows that enter the layer, float32,
                divided by their number; None for a start that reads no rows.
        """
        ...

    def check_ranks(self, modules: Sequence[AdaptedModule]) -> None:
        """Raises InputError for a rank that the start cannot have."""
        for module in modules:
            if module.rank % self.rank_divisor:
                even = self.rank_divisor == 2
                kind = "an even rank" if even else f"a multiple of {self.rank_divisor}"
                raise InputError(
                    f"adapter.rank: expected {kind} with the start {self.name!r}, got "
                    f"{module.rank} for {module.name}. Choose {kind}, or another start."
                )


def check_without_rows(start: Any) -> None:
    """Raises InputError where a start, of any kind, reads rows of text and there are none."""
    if start.rows:
        raise InputError(
            f"adapter.start: expected a start that reads no rows of data here, got "
            f"{start.name!r}, which does. Choose another, or train on text."
        )
