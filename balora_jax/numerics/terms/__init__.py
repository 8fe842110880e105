"""The terms of the loss beside the task's own: one file a term, and one line here.

The paper's functions stand with their terms: ``consistency_nlg`` and ``consistency_nlu`` in
:mod:`.consistency`, ``diversity_nlg`` and ``diversity_nlu`` in :mod:`.diversity`, ``spectral_nlg``
and ``spectral_nlu`` in :mod:`.spectral`. A user's file registers a term in the same way.
"""

import dataclasses

from balora_jax.errors import InputError
from balora_jax.numerics.terms.consistency import Consistency
from balora_jax.numerics.terms.diversity import Diversity
from balora_jax.numerics.terms.spectral import Spectral
from balora_jax.numerics.terms.term import Term
from balora_jax.registry import Registry

OF_THE_STEP = (
    *("step", "loss", "task_loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second"),
    *("step_seconds", "mfu", "fill", "skipped", "skipped_in_a_row"),
)
"""Columns of the metrics that no term can be called."""


def settings_of(term: Term) -> tuple[dataclasses.Field, ...]:
    """The settings of a term, in order.

    >>> [field.name for field in settings_of(Diversity())]
    ['top_k']
    """
    return tuple(field for field in dataclasses.fields(term) if field.name != "variant")


def keys_of(term: Term) -> list[str]:
    """The config keys of a term: its weight, its schedule and its settings.

    >>> keys_of(Diversity())
    ['diversity', 'diversity_schedule', 'top_k']
    """
    return [term.name, f"{term.name}_schedule", *(field.name for field in settings_of(term))]


class Terms(Registry[Term]):
    """The registry of terms, whose keys stand side by side in one section of a config."""

    def register(self, item: Term) -> Term:
        """Add a term at its default settings, and return it.

        Raises:
            InputError: Its name, one of its keys or of its columns is taken.
        """
        taken = {key for term in self.values() for key in (*keys_of(term), *term.statistics)}
        for key in (*keys_of(item), *item.statistics):
            if item.name not in self and key in taken | set(OF_THE_STEP):
                raise InputError(
                    f"term {item.name}: expected a name and settings of its own, got {key!r}, "
                    "which there is already. Choose another name."
                )
        return super().register(item)


TERMS = Terms("term", "regularizers")
TERMS.register(Consistency())
TERMS.register(Diversity())
TERMS.register(Spectral())
