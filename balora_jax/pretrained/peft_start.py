"""A PEFT adapter as the start of new ones: its layers and its factors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from balora_jax.errors import InputError
from balora_jax.io.peft_reader import PeftAdapter
from balora_jax.models.adapters import AdaptedModule, LinearShape
from balora_jax.models.starts.stacks import Arrays, Layout, start_from_factors


@dataclass(frozen=True)
class PeftStart:
    """The adapter of a folder to go on from: its own method, rank, alpha and targets hold.

    Attributes:
        folder: where it was read.
        peft: what was read.
    """

    folder: str
    peft: PeftAdapter

    has_origin = False
    """It is measured from zero, as it was when it was saved."""

    rows = 0
    """It reads no rows of data."""

    @property
    def saved(self) -> Mapping[str, np.ndarray]:
        """Whole tensors that it brings along, by checkpoint name."""
        return self.peft.saved

    @property
    def use_rslora(self) -> bool:
        """Whether its scales are alpha / √rank."""
        return bool(self.peft.config.get("use_rslora"))

    def modules(self, linears: Sequence[LinearShape]) -> tuple[AdaptedModule, ...]:
        """The adapted layers on a base.

        Raises:
            InputError: a layer that the base does not have, or one of another size.
        """
        return peft_modules(self.peft, linears, self.folder)

    def begin(
        self, modules: Sequence[AdaptedModule], kernels: Mapping[str, Any], layout: Layout | None
    ) -> tuple[Arrays, Arrays]:
        """The adapters as they were saved, and their constants."""
        given = self.peft.tensors, self.peft.magnitudes
        return start_from_factors(modules, kernels, *given, layout)


def peft_modules(
    peft: PeftAdapter, linears: Sequence[LinearShape], where: str
) -> tuple[AdaptedModule, ...]:
    """The adapted layers of a PEFT adapter on this base.

    Raises:
        InputError: a layer that the base does not have, or one of another size.
    """
    known = {name: (shape, i) for shape in linears for i, name in enumerate(shape.names)}
    modules = []
    for name, (a, b) in peft.tensors.items():
        if name not in known:
            raise InputError(
                f"{where}: expected adapters for this base model, got one for {name!r}, which it "
                "does not have. Name the base the adapter was trained on."
            )
        shape, layer = known[name]
        if (a.shape[0], b.shape[1]) != (shape.in_features, shape.out_features):
            raise InputError(
                f"{where}: expected {shape.in_features} -> {shape.out_features} features at "
                f"{name}, got {a.shape[0]} -> {b.shape[1]}. Name the base it was trained on."
            )
        modules.append(
            AdaptedModule(
                name, shape.path, layer, peft.ranks[name], peft.alphas[name], peft.scales[name],
                shape.in_features, shape.out_features, peft.method,
            )
        )  # fmt: skip
    return tuple(modules)
