"""The task loss and the regularizers from hidden states, without logits of all tokens.

With N tokens of width D and a vocabulary of V entries the logits ``Z = H Wᵀ`` are ``[N, V]``, far
larger than the hidden states ``H`` ``[N, D]``. :func:`head_loss` goes over them a chunk of rows at
a time and forms ``dloss/dH`` beside the values: three products of size N·D·V in all, and never more
than one chunk of student and teacher logits in memory. :func:`plain_head_loss` is the same by
automatic derivatives of whole logits, to compare with.

The head ``W`` is frozen; the gradient goes into the hidden states. What a call needs:

- :class:`Rows`: hidden states of student and teacher, labels, and masks of the rows that count for
  the cross-entropy and for the terms;
- :class:`TermSet`: which terms, each an object with its settings (:class:`Consistency`,
  :class:`Diversity`, :class:`Spectral`); static;
- the factor of each *sum* in the loss by name, so a weight divided by a count, and of the
  cross-entropy under ``task_loss``: arrays, which a schedule may change from step to step;
- ``factor``, for the spectral term: :func:`head_factor` of ``W``, made once. The singular values of
  ``H Wᵀ`` are those of ``H Rᵀ``, which is as wide as the model;
- :class:`LogitMap`, where logits are not plain products: a soft cap, a factor.

It returns the loss and :class:`HeadSums`, the sums of which it is made, for metrics.

>>> import jax, jax.numpy as jnp
>>> chosen = TermSet((Consistency(temperature=2.0), Diversity(top_k=0), Spectral(k=2)))
>>> hidden, table = jax.random.normal(jax.random.key(0), (6, 4)), jnp.eye(8, 4)
>>> counted = jnp.ones(6, bool)
>>> rows = Rows(hidden, 0.9 * hidden, jnp.arange(6), counted, counted)
>>> weights = {"task_loss": 1 / 6, "consistency": 0.1 / 6, "diversity": 0.05 / 6, "spectral": 0.01}
>>> scales = {name: jnp.float32(weight) for name, weight in weights.items()}
>>> factor = jnp.asarray(head_factor(table), jnp.float32)
>>> chunked, _ = head_loss(rows, table, scales, chosen, chunk=2, factor=factor)
>>> plain, _ = plain_head_loss(rows, table, scales, chosen)
>>> bool(abs(chunked - plain) < 1e-5)
True
"""

from balora_jax.numerics.head import head_loss, plain_head_loss
from balora_jax.numerics.head_types import HeadSums, LogitMap, Rows
from balora_jax.numerics.linalg import head_factor
from balora_jax.numerics.objective import TermSet
from balora_jax.numerics.terms.consistency import Consistency
from balora_jax.numerics.terms.diversity import Diversity
from balora_jax.numerics.terms.spectral import Spectral

__all__ = [
    "Consistency",
    "Diversity",
    "HeadSums",
    "LogitMap",
    "Rows",
    "Spectral",
    "TermSet",
    "head_factor",
    "head_loss",
    "plain_head_loss",
]
