"""The optimizer: an optax chain of clipping, the update rule, masked decay and the schedule."""

import math
from typing import Any

import jax
import optax

from balora_jax.config import TrainingConfig


def learning_rate_schedule(config: TrainingConfig, total_steps: int) -> optax.Schedule:
    """Learning rate of each optimizer step, counted from 0.

    Source: the trainer of ``transformers``, which the published runs used: linear warm-up from 0
    over ⌈warmup · steps⌉, then to 0 along half a cosine or a line, or constant.
    """
    peak, warmup = config.learning_rate, math.ceil(config.warmup * total_steps)
    decay_steps = max(total_steps - warmup, 1)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, decay_steps),
        "linear": optax.linear_schedule(peak, 0.0, decay_steps),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(config: TrainingConfig, total_steps: int) -> optax.GradientTransformation:
    """Clip by global norm → update rule → masked weight decay → LoRA+ ratio → learning rate.

    Parameters are flat dicts by dotted path; the ratio applies to ``lora_b``.
    Source of the ratio: LoRA+ (arXiv 2402.12354).
    """
    b1, b2 = config.beta1, config.beta2
    rule = {
        "adamw": lambda: optax.scale_by_adam(b1=b1, b2=b2, eps=config.epsilon),
        "lion": lambda: optax.scale_by_lion(b1=b1, b2=b2),
        "sgd": lambda: optax.identity(),
    }[config.optimizer]()
    clip = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    return optax.chain(
        *clip,
        rule,
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        scale_up_factor(config.lora_plus_ratio),
        optax.scale_by_learning_rate(learning_rate_schedule(config, total_steps)),
    )


def decays(params: dict[str, jax.Array]) -> dict[str, bool]:
    """Weight decay applies to matrices (stacked: three axes), never to biases or scales."""
    matrices = (".kernel", ".embedding", ".weight")
    return {path: leaf.ndim >= 3 or path.endswith(matrices) for path, leaf in params.items()}


def scale_up_factor(ratio: float) -> optax.GradientTransformation:
    """Multiply the updates of every B by ``ratio`` (LoRA+); 1 changes nothing."""

    def update(updates: Any, params: Any = None) -> Any:
        del params
        return {
            path: leaf * ratio if path.endswith(".lora_b") else leaf
            for path, leaf in updates.items()
        }

    return optax.identity() if ratio == 1.0 else optax.stateless(update)
