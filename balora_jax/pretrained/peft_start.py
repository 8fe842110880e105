"""A PEFT adapter as the start of new ones: its layers and its factors."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from balora_jax.errors import InputError
from balora_jax.io.hf_files import shortened
from balora_jax.io.peft_reader import PeftAdapter
from balora_jax.models.adapters import AdaptedModule, LinearShape, meant
from balora_jax.models.starts.stacks import Arrays, Layout, start_from_factors
from balora_jax.models.whole import belongs_to
from balora_jax.untyped.shown import shown


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

    @cached_property
    def fingerprint(self) -> str:
        """Identity of what it computes, kept with checkpoints: every number, scale and name."""
        peft = self.peft
        settings = peft.method.name, self.use_rslora, peft.modules_to_save, peft.tokens
        total = hashlib.sha256(repr((settings, sorted(peft.alphas.items()))).encode())
        factors = {
            f"{name}.{side}": factor
            for name, pair in peft.tensors.items()
            for side, factor in zip("AB", pair, strict=True)
        }
        for group in (factors, peft.magnitudes, peft.saved):
            for name in sorted(group):
                value = np.ascontiguousarray(group[name])
                total.update(f"\n{name} {value.shape}\n".encode() + value.tobytes())
        return total.hexdigest()

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
        InputError: a layer that the base does not have, one of another size, or a target of the
            adapter's config without its tensors.
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
    _check_whole(peft, linears, where)
    return tuple(modules)


def _check_whole(peft: PeftAdapter, linears: Sequence[LinearShape], where: str) -> None:
    """Raises InputError where the adapter's file has other layers than its config names."""
    targets = _names(peft, "target_modules", where)
    without = _names(peft, "exclude_modules", where)
    if not targets or peft.config.get("layers_pattern"):
        return
    # PEFT numbers layers where it is given a list of modules.
    layers = None if isinstance(targets, str) else _layers(peft, where)
    wanted = {name for name in meant(linears, targets, without) if _is_in(name, layers)}
    found, whole = peft.tensors.keys(), peft.modules_to_save
    missing = [name for name in wanted - found if not belongs_to(f"{name}.weight", whole)]
    for wrong, what in ((missing, "none"), (found - wanted, "some")):
        if wrong:
            raise InputError(
                f"{where}: expected tensors of every layer that target_modules names"
                f"{'' if layers is None else ' and layers_to_transform numbers'}, and of no other, "
                f"got {what} of {shortened(sorted(wrong))}. Copy the adapter again."
            )


def _layers(peft: PeftAdapter, where: str) -> Sequence[int] | None:
    """Numbers of the layers that the adapter is on; None for all."""
    value = peft.config.get("layers_to_transform")
    listed = [value] if type(value) is int else value
    if listed is None or listed == []:
        return None
    if not isinstance(listed, list) or not all(type(one) is int for one in listed):
        raise InputError(
            f"{where}: expected layers_to_transform to be a number or a list of numbers, got "
            f"{shown(value)}. Correct the adapter's config."
        )
    return listed


def _is_in(name: str, layers: Sequence[int] | None) -> bool:
    """Whether PEFT takes a module as one of these layers: by the first number in its name."""
    number = re.search(r"\.(\d+)\.", name)
    return layers is None or (number is not None and int(number[1]) in layers)


def _names(peft: PeftAdapter, key: str, where: str) -> Sequence[str] | str:
    """A setting of PEFT that names modules: a text, or a list of them; empty where there is none.

    Raises:
        InputError: anything else.
    """
    value = peft.config.get(key) or ()
    listed = isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)
    if not (listed or isinstance(value, str)):
        raise InputError(
            f"{where}: expected {key} to be a text or a list of texts, got {shown(value)}. Correct "
            "the adapter's config."
        )
    return value
