"""Two terms of a user's own: one on logits with a setting, one on hidden states of both models."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from balora_jax.numerics.terms import TERMS
from balora_jax.numerics.terms.term import Term, setting


@dataclass(frozen=True)
class Peak(Term):
    """The mean power of a row's logits, below its maximum."""

    name: ClassVar[str] = "peak"
    title: ClassVar[str] = "peak: mean power of logits"
    power: float = setting(2.0, "exponent of the term peak.")

    def rows(self, student, teacher):
        del teacher
        return jnp.mean(jnp.abs(student) ** self.power, axis=-1)


@dataclass(frozen=True)
class Moved(Term):
    """How far the hidden states moved."""

    name: ClassVar[str] = "moved"
    title: ClassVar[str] = "moved: squared distance of hidden states"
    reads: ClassVar = "hidden"
    needs_teacher: ClassVar[bool] = True

    def hidden_rows(self, student, teacher):
        return jnp.mean((student - teacher) ** 2, axis=-1)


TERMS.register(Peak())
TERMS.register(Moved())
