"""The linear layers of a model that get an adapter, with its rank, scale and method."""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from balora_jax.errors import InputError
from balora_jax.models.methods.lora import LORA
from balora_jax.models.methods.method import Method, Part


@dataclass(frozen=True)
class AdaptedModule:
    """One adapted linear layer of the checkpoint.

    Attributes:
        name: its name in the checkpoint, ``model.layers.3.self_attn.q_proj``.
        path: the stacked layer that holds it here, ``layers.self_attn.q_proj``.
        layer: its index in that stack.
        rank: columns of A that train; the stack is zero-padded to its largest rank.
        alpha: numerator of the scale.
        scale: ``alpha / rank``, or ``alpha / sqrt(rank)`` with rank-stabilised scaling.
        in_features: rows of A.
        out_features: columns of B.
        method: what trains in it.
    """

    name: str
    path: str
    layer: int
    rank: int
    alpha: float
    scale: float
    in_features: int
    out_features: int
    method: Method = LORA

    @property
    def parameters(self) -> int:
        """Trainable numbers of this layer's adapter."""
        return self.method.parameters(self.rank, self.in_features, self.out_features)


@dataclass(frozen=True)
class AdapterShape:
    """Facts that a stacked linear layer needs to hold adapters (static, hashable)."""

    rank: int
    origin: bool
    dropout: float = 0.0
    method: Method = LORA

    @property
    def parts(self) -> dict[str, Part]:
        """The adapter's arrays by name."""
        return self.method.parts(origin=self.origin)


@dataclass(frozen=True)
class LinearShape:
    """A stack of linear layers as the planner sees it: our path, and each one's checkpoint name."""

    path: str
    names: tuple[str, ...]
    in_features: int
    out_features: int


def plan_adapters(
    linears: Sequence[LinearShape],
    *,
    rank: int,
    alpha: float,
    target_modules: Sequence[str] | str,
    exclude_modules: Sequence[str] | str = (),
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False,
    method: Method = LORA,
) -> tuple[AdaptedModule, ...]:
    """Which layers of a model get an adapter, with the rank and scale of each.

    ``target_modules`` and ``exclude_modules`` mean what they mean in PEFT: a list of name
    suffixes, one regular expression for the whole name, or ``all-linear``. Patterns are PEFT's
    too: a key matches a whole name or its dotted end.

    Raises:
        InputError: a target or pattern that matches no layer; a rank larger than a layer.
    """
    modules = []
    used = {key: False for key in (*(rank_pattern or {}), *(alpha_pattern or {}))}
    names = [name for shape in linears for name in shape.names]
    _check_targets(names, target_modules)
    _check_expressions("exclude_modules", [exclude_modules])
    _check_expressions("rank_pattern/alpha_pattern", list(used))
    for shape in linears:
        for i, name in enumerate(shape.names):
            if not _matches(name, target_modules) or _matches(name, exclude_modules):
                continue
            r = int(_pattern_value(name, rank_pattern or {}, rank, used))
            a = float(_pattern_value(name, alpha_pattern or {}, alpha, used))
            _check_rank(name, r, shape)
            scale = a / math.sqrt(r) if use_rslora else a / r
            modules.append(
                AdaptedModule(
                    name, shape.path, i, r, a, scale, shape.in_features, shape.out_features, method
                )
            )
    if not modules:
        raise InputError(
            "adapter.exclude_modules: expected to leave some target layer, but it excludes all of "
            f"adapter.target_modules={target_modules!r}. Exclude fewer layers."
        )
    for key, seen in used.items():
        if not seen:
            raise InputError(
                f"adapter.rank_pattern/alpha_pattern: {key!r} matches no adapted layer. "
                f"Use the end of a layer's name, such as {modules[0].name!r}, or remove it."
            )
    return tuple(modules)


def _matches(name: str, targets: Sequence[str] | str) -> bool:
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith("." + target) for target in targets)


def _check_targets(names: Sequence[str], targets: Sequence[str] | str) -> None:
    """Every target must match something: a silent miss would train less than was asked for."""
    try:
        missed = [
            target
            for target in ([targets] if isinstance(targets, str) else targets)
            if not any(_matches(name, targets if isinstance(targets, str) else [target])
                       for name in names)
        ]  # fmt: skip
    except re.error as error:
        raise InputError(
            f"adapter.target_modules: expected a regular expression, got {targets!r} ({error}). "
            "Correct it, or give a list of layer names."
        ) from error
    kinds = sorted({name.rsplit(".", 1)[-1] for name in names})
    if not isinstance(targets, str) and not targets:
        raise InputError(
            f"adapter.target_modules: expected at least one layer, got an empty list. "
            f"This model has {', '.join(kinds)}."
        )
    if missed:
        near = difflib.get_close_matches(missed[0], kinds, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise InputError(
            f"adapter.target_modules: {missed[0]!r} matches no linear layer of this model."
            f"{hint} It has {', '.join(kinds)} (embeddings and lm_head stay frozen)."
        )


def _check_expressions(key: str, expressions: Sequence[Sequence[str] | str]) -> None:
    for expression in expressions:
        try:
            re.compile(expression if isinstance(expression, str) else "")
        except re.error as error:
            raise InputError(
                f"adapter.{key}: expected a regular expression, got {expression!r} ({error}). "
                "Correct it."
            ) from error


def _pattern_value(
    name: str, patterns: Mapping[str, float], default: float, used: dict[str, bool]
) -> float:
    matching = [key for key in patterns if re.match(rf"(.*\.)?({key})$", name)]
    used.update(dict.fromkeys(matching, True))
    return patterns[matching[0]] if matching else default


def _check_rank(name: str, rank: int, shape: LinearShape) -> None:
    if rank < 1:
        raise InputError(f"adapter.rank: expected at least 1 for {name}, got {rank}. Raise it.")
    largest = min(shape.in_features, shape.out_features)
    if rank > largest:
        raise InputError(
            f"adapter.rank: expected at most {largest} for {name} "
            f"({shape.in_features} x {shape.out_features}), got {rank}. Lower the rank, or set it "
            "for this layer in adapter.rank_pattern."
        )


def adapter_shapes(
    modules: Sequence[AdaptedModule], *, origin: bool, dropout: float = 0.0
) -> dict[str, AdapterShape]:
    """For each stacked layer that is adapted, the largest rank in the stack, and the method.

    Raises:
        InputError: dropout with a method that does not allow it.
    """
    for module in modules:
        if dropout > 0.0 and not module.method.allows_dropout:
            raise InputError(
                f"adapter.dropout: expected 0 with the method {module.method.name}, got "
                f"{dropout}. Set it to 0, or choose another method."
            )
    ranks: dict[str, int] = {}
    for module in modules:
        ranks[module.path] = max(ranks.get(module.path, 0), module.rank)
    methods: dict[str, Method] = {module.path: module.method for module in modules}
    return {
        path: AdapterShape(rank, origin, dropout, methods[path]) for path, rank in ranks.items()
    }


def trainable_parameters(modules: Sequence[AdaptedModule]) -> int:
    """Number of trainable parameters, from shapes alone (padding not counted)."""
    return sum(module.parameters for module in modules)
