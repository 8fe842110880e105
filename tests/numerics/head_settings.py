"""Settings of a pass over the head as flat values, and its sums as a flat list."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from balora_jax.numerics.objective import TermSet
from balora_jax.numerics.terms.consistency import Consistency
from balora_jax.numerics.terms.diversity import Diversity
from balora_jax.numerics.terms.spectral import Spectral

TERMS = ("consistency", "diversity", "spectral")
SUMS = (
    *("task_sum", "task_count", "consistency_sum", "diversity_sum", "term_count"),
    *("teacher_entropy_sum", "spectral", "spectral_residual"),
)


class Scales(NamedTuple):
    """One factor for each sum of the loss."""

    task: float
    consistency: float
    diversity: float
    spectral: float

    @property
    def by_name(self):
        names = ("task_loss", *TERMS)
        return {name: jnp.asarray(v, jnp.float32) for name, v in zip(names, self, strict=True)}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a case computes, and how: read by references, and turned into what the pass takes."""

    on: tuple = TERMS
    teacher_entropy: bool = True
    temperature: float = 2.0
    top_k: int = 4
    k: int = 3
    norm: str = "frobenius"
    center_rows: bool = False

    @property
    def chosen(self):
        every = {
            "consistency": Consistency(temperature=self.temperature),
            "diversity": Diversity(top_k=self.top_k),
            "spectral": Spectral(k=self.k, norm=self.norm, center_rows=self.center_rows),
        }
        by_entropy = ("consistency",) if self.teacher_entropy else ()
        return TermSet(tuple(every[name] for name in TERMS if name in self.on), by_entropy)


def flat(sums):
    """Every number in the order of ``SUMS``, 0 for what was not computed."""
    zero = jnp.zeros((), jnp.float32)
    return [
        *(sums.task_sum, sums.task_count),
        *(sums.terms.get(name, zero) for name in ("consistency", "diversity")),
        *(sums.term_count, sums.teacher_entropy.get("consistency", zero)),
        *(sums.terms.get("spectral", zero), sums.statistics.get("spectral_residual", zero)),
    ]
