"""The linear layers of a model that get an adapter, with its rank, scale and method."""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from balora_jax.errors import InputError
from balora_jax.models.methods.lora import LORA
from balora_jax.models.methods.method import Method, Part
from balora_jax.untyped.patterns import end_match, whole_match
from balora_jax.untyped.shown import shown

ALL_LINEAR = "all-linear"


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
    names = [name for shape in linears for name in shape.names]
    chosen = _chooser("target_modules", target_modules)
    _check_targets(names, target_modules, chosen)
    excluded = _chooser("exclude_modules", exclude_modules)
    ranks, alphas = _Patterns(rank_pattern or {}, rank), _Patterns(alpha_pattern or {}, alpha)
    for shape in linears:
        for i, name in enumerate(shape.names):
            if not chosen(name) or excluded(name):
                continue
            r, a = int(ranks.of(name)), float(alphas.of(name))
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
            f"adapter.target_modules={shown(target_modules)}. Exclude fewer layers."
        )
    used = ranks.used | alphas.used
    for key in (*ranks.values, *alphas.values):
        if key not in used:
            raise InputError(
                f"adapter.rank_pattern/alpha_pattern: {shown(key)} matches no adapted layer. "
                f"Use the end of a layer's name, such as {modules[0].name!r}, or remove it."
            )
    return tuple(modules)


def meant(
    linears: Sequence[LinearShape],
    target_modules: Sequence[str] | str,
    exclude_modules: Sequence[str] | str,
) -> list[str]:
    """Names of the layers that two such settings of PEFT mean together."""
    chosen = _chooser("target_modules", target_modules)
    excluded = _chooser("exclude_modules", exclude_modules)
    names = (name for shape in linears for name in shape.names)
    return [name for name in names if chosen(name) and not excluded(name)]


def _chooser(key: str, targets: Sequence[str] | str) -> Callable[[str], bool]:
    """Whether a name is meant by a list of endings, an expression, or ``all-linear``."""
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:  # in any case, as in PEFT
        return lambda name: True
    if isinstance(targets, str):
        return whole_match(targets, f"adapter.{key}")
    return lambda name: any(name == target or name.endswith("." + target) for target in targets)


def _check_targets(
    names: Sequence[str], targets: Sequence[str] | str, chosen: Callable[[str], bool]
) -> None:
    """Every target must match something: a silent miss would train less than was asked for."""
    if isinstance(targets, str):
        missed = [] if any(map(chosen, names)) else [targets]
    else:
        endings = [(target, _chooser("target_modules", [target])) for target in targets]
        missed = [target for target, ends in endings if not any(map(ends, names))]
    kinds = sorted({name.rsplit(".", 1)[-1] for name in names})
    if not isinstance(targets, str) and not targets:
        raise InputError(
            f"adapter.target_modules: expected at least one layer, got an empty list. "
            f"This model has {', '.join(kinds)}."
        )
    if missed:
        hint = _hint(missed[0], kinds, alone=isinstance(targets, str))
        raise InputError(
            f"adapter.target_modules: {shown(missed[0])} matches no linear layer that takes an "
            f"adapter.{hint} There are {', '.join(kinds)} (embeddings and heads take none)."
        )


def _hint(missed: str, kinds: Sequence[str], *, alone: bool) -> str:
    """What may have been meant by a target that matches nothing, as a sentence or nothing."""
    if not alone and missed.lower() == ALL_LINEAR:
        return f" Did you mean {ALL_LINEAR}, without brackets?"
    named = [kind for kind in kinds if kind in missed.split("|")]
    if alone and named:
        return (
            f" A text is one expression for whole names: did you mean the list "
            f"[{', '.join(named)}]?"
        )
    near = difflib.get_close_matches(missed, kinds, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


class _Patterns:
    """A setting by layer: the value of the first pattern that matches a name, or the default."""

    def __init__(self, values: Mapping[str, float], default: float) -> None:
        self.values, self.default = values, default
        self.used: set[str] = set()
        self._matches = {
            key: end_match(key, "adapter.rank_pattern/alpha_pattern") for key in values
        }

    def of(self, name: str) -> float:
        """The value of a layer by its name."""
        matching = [key for key, matches in self._matches.items() if matches(name)]
        self.used.update(matching)
        return self.values[matching[0]] if matching else self.default


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
