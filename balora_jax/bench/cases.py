"""The cases that a benchmark compares: the step of a config with terms, start or head changed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from balora_jax.config import RunConfig
from balora_jax.config_file import parse_config
from balora_jax.errors import InputError
from balora_jax.plan import ahead
from balora_jax.plan.targets import Target

TERMS = ("consistency", "diversity", "spectral")
PUBLISHED = {"consistency": 0.025, "diversity": 0.005, "spectral": 0.005}
"""Weights of a term that the config switches off; the time of a step does not depend on them."""


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


FUSED, PLAIN = {"training.head": "fused"}, {"training.head": "plain"}
TEXT_CASES = (
    Case("LoRA", "lora", (), FUSED),
    Case("PiSSA", None, (), FUSED),
    *(Case(f"+ {term}", None, (term,), FUSED) for term in TERMS),
    Case("BA-LoRA", None, TERMS, FUSED),
    Case("LoRA, plain head", "lora", (), PLAIN),
    Case("BA-LoRA, plain head", None, TERMS, PLAIN),
)
"""What the terms, the teacher and the head cost a causal language model."""

AHEAD, EACH_STEP = {"regularizers.teacher_cache": True}, {"regularizers.teacher_cache": False}
LABEL_CASES = (
    Case("LoRA", "lora", (), AHEAD),
    Case("PiSSA", None, (), AHEAD),
    Case("BA-LoRA", None, TERMS, AHEAD),
    Case("BA-LoRA, teacher in each step", None, TERMS, EACH_STEP),
)
"""What the terms and the teacher cost an encoder."""

CASES = {"decoder": TEXT_CASES, "encoder": LABEL_CASES}
"""By the kind of model that a task trains."""


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
    for term in TERMS:
        weight = tree["regularizers"][term] or PUBLISHED[term]
        tree["regularizers"][term] = weight if term in case.terms else 0.0
        tree["regularizers"][f"{term}_schedule"] = "constant"
    tree["regularizers"] |= {"adaptive_min": None, "adaptive_max": None}
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
    with ahead.compiler(target) as compile_one:
        return [
            compile_one(configured(config, case), case.name, head_alone=False) for case in cases
        ]
