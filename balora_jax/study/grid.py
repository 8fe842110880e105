"""The runs of a study: every data set by every variant by every seed."""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from balora_jax.config import RunConfig, StudyConfig
from balora_jax.config_file import parse_config
from balora_jax.errors import InputError

FIGURES, TABLE, PICTURE = FILES = ("study.json", "table.md", "study.png")
"""What a study writes into its folder beside the folders of its data sets."""


@dataclass(frozen=True)
class StudyRun:
    """One run of a study.

    Attributes:
        dataset, variant, seed: its place in the study.
        config: the base with the data set's settings, then the variant's, then the seed.
        folder: gets what ``fit`` leaves, and ``log.txt``.
    """

    dataset: str
    variant: str
    seed: int
    config: RunConfig
    folder: Path

    @property
    def name(self) -> str:
        """Its place as one word."""
        return f"{self.dataset}/{self.variant}/seed{self.seed}"


def plan_runs(config: RunConfig, folder: Path) -> list[StudyRun]:
    """Every run of a study, resolved and checked, in the order in which they are done.

    Raises:
        InputError: no variants, a name that is no folder's, or a setting that does not
            fit; the message names the data set and the variant.
    """
    study = config.study
    _check_grid(study)
    base = config.model_dump(mode="json", exclude={"study"})
    return [
        StudyRun(
            dataset,
            variant,
            seed,
            _resolved(base, f"study {dataset}/{variant}", (row, column), seed),
            folder / dataset / variant / f"seed{seed}",
        )
        for dataset, row in study.datasets.items()
        for variant, column in study.variants.items()
        for seed in study.seeds
    ]


def _check_grid(study: StudyConfig) -> None:
    if not study.variants:
        raise InputError(
            "study.variants: expected settings to compare, got none. Add study: with variants: "
            "{NAME: {key.path: value}}, and datasets and seeds if there are several."
        )
    if not study.datasets:
        raise InputError("study.datasets: expected at least one name, got none. Add one.")
    for what, names in (("datasets", study.datasets), ("variants", study.variants)):
        for name in names:
            if not re.fullmatch(r"[A-Za-z0-9_+-][A-Za-z0-9._+-]{0,99}", name):
                raise InputError(
                    f"study.{what}: expected a name of at most 100 letters, digits and . _ + -, "
                    f"got {name!r}. It becomes a folder's name: choose another."
                )
            if name in FILES:
                raise InputError(
                    f"study.{what}: expected a name that no file of a study has, got {name!r}. It "
                    "becomes a folder's name: choose another."
                )
    if not study.seeds or len(set(study.seeds)) < len(study.seeds):
        raise InputError(
            f"study.seeds: expected different seeds, got {list(study.seeds)}. Name each once."
        )


def _resolved(
    base: Mapping[str, Any], where: str, settings: Sequence[Mapping[str, Any]], seed: int
) -> RunConfig:
    tree = copy.deepcopy(dict(base))
    for one in settings:
        for key, value in one.items():
            _put(tree, key, value, where)
    tree["training"]["seed"] = seed
    return parse_config(tree, where)


def _put(tree: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set ``key.path`` to a value; a whole section as ``adapter: {rank: 4}`` is merged in."""
    *parents, leaf = key.split(".")
    if key == "training.seed":
        raise InputError(f"{where}: training.seed: expected seeds in study.seeds. Move it there.")
    if (parents or [leaf])[0] == "study":
        raise InputError(f"{where}: {key}: expected a setting of a run, got one of the study.")
    if not parents and isinstance(tree.get(leaf), dict):
        if not isinstance(value, Mapping):
            raise InputError(
                f"{where}: {key}: expected settings, got {value!r}. Write {key}.KEY: value."
            )
        for name, inner in value.items():
            _put(tree, f"{key}.{name}", inner, where)
        return
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise InputError(f"{where}: {key}: {parent!r} is not a section. Check the key.")
    node[leaf] = copy.deepcopy(value)


def chosen(runs: Sequence[StudyRun], only: Sequence[str]) -> list[StudyRun]:
    """The runs of these ``DATASET/VARIANT``; all of them if none is named.

    Raises:
        InputError: a name that no run has.
    """
    known = list(dict.fromkeys(f"{run.dataset}/{run.variant}" for run in runs))
    for name in only:
        if name not in known:
            raise InputError(
                f"--only: expected one of {', '.join(known)}, got {name!r}. Choose among them."
            )
    return [run for run in runs if not only or f"{run.dataset}/{run.variant}" in only]
