"""The cases that a benchmark compares: the step of a config with terms, start or head changed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from balora_jax.config import RunConfig
from balora_jax.config_file import parse_config
from balora_jax.errors import InputError
from balora_jax.numerics.schedules import WARMUP_FRACTION
from balora_jax.numerics.terms import TERMS
from balora_jax.plan import ahead
from balora_jax.plan.targets import Target


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: title.
        start: of the adapters; None for the config's.
        terms: regularizers that are on.
        settings: others, by ``section.key``.
    """

    name: str
    start: str | None
    terms: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)


def published() -> tuple[str, ...]:
    """The terms of the paper, which are on where a config says nothing of them."""
    return tuple(term.name for term in TERMS.values() if term.weight > 0)


def text_cases() -> tuple[Case, ...]:
    """What the terms, the teacher and the head cost a causal language model."""
    fused, plain = {"training.head": "fused"}, {"training.head": "plain"}
    return (
        Case("LoRA", "lora", (), fused),
        Case("PiSSA", None, (), fused),
        *(Case(f"+ {term}", None, (term,), fused) for term in TERMS),
        Case("BA-LoRA", None, published(), fused),
        Case("LoRA, plain head", "lora", (), plain),
        Case("BA-LoRA, plain head", None, published(), plain),
    )


def labels_cases() -> tuple[Case, ...]:
    """What the terms and the teacher cost an encoder."""
    ahead, each = {"regularizers.teacher_cache": True}, {"regularizers.teacher_cache": False}
    return (
        Case("LoRA", "lora", (), ahead),
        Case("PiSSA", None, (), ahead),
        Case("BA-LoRA", None, published(), ahead),
        Case("BA-LoRA, teacher in each step", None, published(), each),
    )


def cases_of(model: str) -> tuple[Case, ...]:
    """The cases of a kind of model."""
    return {"decoder": text_cases, "encoder": labels_cases}[model]()


def chosen(cases: Sequence[Case], names: Sequence[str]) -> tuple[Case, ...]:
    """The cases with these names, all without names.

    Raises:
        InputError: a name that no case has.
    """
    known = [case.name for case in cases]
    for name in names:
        if name not in known:
            raise InputError(
                f"--case: expected one of {', '.join(known)}, got {name!r}. Choose among them."
            )
    return tuple(case for case in cases if not names or case.name in names)


def configured(config: RunConfig, case: Case) -> RunConfig:
    """The config of a case; schedules are constant, so that every term is at work in every step."""
    tree = config.model_dump(mode="json")
    terms = tree["regularizers"]
    for term in TERMS.values():
        # The time of a step does not depend on the weight of a term that the config has off.
        weight = terms[term.name] or term.weight or 1.0
        terms[term.name] = weight if term.name in case.terms else 0.0
        terms[f"{term.name}_schedule"] = "constant"
    terms |= {"adaptive_min": None, "adaptive_max": None, "warmup_fraction": WARMUP_FRACTION}
    if case.start is not None:
        tree["adapter"]["start"] = case.start
    elif tree["adapter"]["start"] == "lora":
        tree["adapter"]["start"] = "pissa"
    tree["training"] |= {"schedule": "constant", "warmup": 0.0}
    for key, value in case.settings.items():
        section, name = key.split(".")
        tree[section][name] = value
    return parse_config(tree, case.name)


def compiled_for(target: Target, config: RunConfig, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Compile cases of a config for a target, a row for each.

    Raises:
        InputError: no compiler, or a step that it refuses for another reason than memory.
    """
    config = ahead.without_libraries(config, target)
    with ahead.compiler(target) as compile_one:
        return [
            compile_one(configured(config, case), case.name, head_alone=False) for case in cases
        ]
