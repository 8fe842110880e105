"""A head fitted on frozen features, before anything else trains."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from balora_jax.array_types import Array, Float
from balora_jax.numerics import losses

Arrays = dict[str, Array]

STEPS, LEARNING_RATE, WEIGHT_DECAY = 300, 1e-2, 1e-2


def fit_head(
    bind: Callable[..., Any],
    frozen: Arrays,
    head: Arrays,
    features: Float[np.ndarray, "N D"],
    labels: np.ndarray,
    outputs: int,
) -> Arrays:
    """A head that fits the labels from the features [N, D], from the given one on.

    Full-batch AdamW on the task's loss; the encoder is not run, so its size does not matter.
    Source: linear probing before fine-tuning (Kumar et al. 2022), here with the pooler.
    """
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    inputs, targets = jnp.asarray(features), jnp.asarray(labels)
    everywhere = jnp.ones(targets.shape, bool)

    def loss(head: Arrays) -> Array:
        logits = bind(frozen, head).head_logits(inputs)
        if outputs == 1:
            total, count = losses.mean_squared_error(logits[:, 0], targets, everywhere)
        else:
            total, count = losses.cross_entropy(logits, targets, everywhere)
        return total / count

    @jax.jit
    def fit(head: Arrays) -> Any:
        def step(carry, _):
            head, state = carry
            updates, state = optimizer.update(jax.grad(loss)(head), state, head)
            return (optax.apply_updates(head, updates), state), None

        return jax.lax.scan(step, (head, optimizer.init(head)), None, length=STEPS)[0][0]

    return fit(head)
