"""The three regularizers of BA-LoRA as pure, jitted functions of logits.

Each returns a float32 scalar to be multiplied by a weight and added to a loss. They need nothing of
the rest of this package: logits may come from any model.

======================  ==================================  ====================================
                        token logits [N, V]                 class logits [B, C]
======================  ==================================  ====================================
keep what was known     :func:`consistency_nlg`             :func:`consistency_nlu`
stay diverse            :func:`diversity_nlg`               :func:`diversity_nlu`
keep a spread spectrum  :func:`spectral_nlg`                :func:`spectral_nlu`
======================  ==================================  ====================================

The two forms of a term are different formulas, as in the paper. Token logits are flattened,
``[B, T, V]`` to ``[N, V]``, and a mask ``[N]`` says which of them count; the logits of the others
may hold anything. ``consistency`` also takes the logits of a teacher, the frozen model, into which
no gradient flows. Masked means are over this call: in a step of several micro-batches, or of
several devices outside ``jit``, weigh each by its count. ``spectral`` and ``diversity_nlu`` couple
rows, so they are statistics of the batch that they are given.

These take whole logits. Where ``[N, V]`` does not fit in memory, :mod:`balora_jax.heads` computes
the token terms and their gradient from hidden states, a chunk of rows at a time.

Raises:
    InputError: by each function, for shapes that do not match or settings out of range.

Source: BA-LoRA (arXiv 2408.04556), whose six functions these are; each names its departures.

>>> import jax, jax.numpy as jnp
>>> teacher, student = jnp.array([[0.0, 0.0]]), jnp.array([[0.0, 2.0]])
>>> counted = jnp.array([True])
>>> round(float(consistency_nlg(student, teacher, counted, temperature=2.0)), 4)
0.4805
>>> gradient = jax.grad(lambda logits: diversity_nlg(logits, counted, top_k=0))(student)
>>> bool(gradient[0, 1] > 0)  # going downhill lowers the larger logit
True
"""

from balora_jax.numerics.terms.consistency import consistency_nlg, consistency_nlu
from balora_jax.numerics.terms.diversity import diversity_nlg, diversity_nlu
from balora_jax.numerics.terms.spectral import spectral_nlg, spectral_nlu

__all__ = [
    "consistency_nlg",
    "consistency_nlu",
    "diversity_nlg",
    "diversity_nlu",
    "spectral_nlg",
    "spectral_nlu",
]
