"""The optimizer chain against torch and transformers, value by value."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from balora_jax.config import TrainingConfig
from balora_jax.training.optim import decays, learning_rate_schedule, make_optimizer

THEIRS = {
    "cosine": get_cosine_schedule_with_warmup,
    "linear": get_linear_schedule_with_warmup,
    "constant": lambda optimizer, warmup, _: get_constant_schedule_with_warmup(optimizer, warmup),
}


def config(**changes):
    return TrainingConfig(**{"max_steps": 10, "learning_rate": 3e-3, "warmup": 0.0, **changes})


@pytest.mark.parametrize("schedule", THEIRS)
@pytest.mark.parametrize(
    ("total", "warmup", "warmup_steps"),
    [(1, 0.0, 0), (1, 0.03, 1), (7, 0.5, 4), (10, 0.0, 0), (40, 0.03, 2), (100, 0.07, 8)],
)
def test_learning_rates_equal_transformers(schedule, total, warmup, warmup_steps):
    """⌈warmup · steps⌉; 0.07 · 100 is a little over 7 in floating point, there as here."""
    ours = learning_rate_schedule(config(schedule=schedule, warmup=warmup), total)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=3e-3)
    theirs = THEIRS[schedule](optimizer, warmup_steps, total)
    want = []
    for _ in range(total):
        want.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    got = np.array([float(ours(jnp.int32(step))) for step in range(total)])
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-9)


SHAPES = {"layers.q.lora_a": (2, 5, 3), "layers.q.lora_b": (2, 3, 4), "score.bias": (6,)}


def problem(seed=0, steps=5):
    rng = np.random.default_rng(seed)
    params = {path: np.float32(rng.standard_normal(shape)) for path, shape in SHAPES.items()}
    sizes = (0.02, 3.0, 0.5, 1e-3, 8.0)
    grads = [
        {path: np.float32(sizes[i] * rng.standard_normal(shape)) for path, shape in SHAPES.items()}
        for i in range(steps)
    ]
    return params, grads


def run(settings, params, grads, total=10):
    optimizer = make_optimizer(settings, total)
    params = {path: jnp.asarray(value) for path, value in params.items()}
    state = optimizer.init(params)
    for step in grads:
        updates, state = optimizer.update(jax.tree.map(jnp.asarray, step), state, params)
        params = optax.apply_updates(params, updates)
    return {path: np.asarray(value) for path, value in params.items()}


@pytest.mark.parametrize("clip", [None, 0.8])
@pytest.mark.parametrize("ratio", [1.0, 6.0])
def test_adamw_chain_equals_torch(clip, ratio):
    """Clipping, decay of matrices only, LoRA+ as a learning rate of its own, a moving schedule."""
    options = {"beta1": 0.8, "beta2": 0.95, "epsilon": 1e-4, "weight_decay": 0.2}
    settings = config(**options, clip_norm=clip, lora_plus_ratio=ratio, warmup=0.2)
    params, grads = problem()
    got = run(settings, params, grads)
    leaves = {
        p: torch.nn.Parameter(torch.tensor(v, dtype=torch.float64)) for p, v in params.items()
    }
    groups = [
        {"params": [leaves["layers.q.lora_a"]], "weight_decay": 0.2},
        {"params": [leaves["layers.q.lora_b"]], "weight_decay": 0.2, "lr": 3e-3 * ratio},
        {"params": [leaves["score.bias"]], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.8, 0.95), eps=1e-4)
    schedule = get_cosine_schedule_with_warmup(optimizer, 2, 10)
    for step in grads:
        for path, leaf in leaves.items():
            leaf.grad = torch.tensor(step[path], dtype=torch.float64)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(leaves.values(), clip)
        optimizer.step()
        schedule.step()
    for path, leaf in leaves.items():
        moved = np.abs(leaf.detach().numpy() - params[path]).max()
        np.testing.assert_allclose(got[path], leaf.detach().numpy(), atol=1e-4 * moved)


def test_lion_equals_its_definition():
    """Chen et al. 2023: the sign of an interpolation, decoupled decay."""
    options = {"beta1": 0.7, "beta2": 0.9, "weight_decay": 0.2, "schedule": "constant"}
    settings = config(**options, optimizer="lion", clip_norm=None, lora_plus_ratio=2.0)
    params, grads = problem(1)
    got = run(settings, params, grads)
    for path, value in params.items():
        x, m = np.float64(value), 0.0
        rate = 3e-3 * (2.0 if path.endswith("lora_b") else 1.0)
        decay = 0.2 if x.ndim == 3 else 0.0
        for step in grads:
            x = x - rate * (np.sign(0.7 * m + 0.3 * np.float64(step[path])) + decay * x)
            m = 0.9 * m + 0.1 * np.float64(step[path])
        np.testing.assert_allclose(got[path], x, atol=1e-6)


def test_sgd_equals_its_definition():
    options = {"schedule": "linear", "weight_decay": 0.1, "optimizer": "sgd"}
    settings = config(**options, clip_norm=0.5, lora_plus_ratio=3.0)
    params, grads = problem(2)
    got = run(settings, params, grads)
    values = {path: np.float64(value) for path, value in params.items()}
    for i, step in enumerate(grads):
        norm = np.sqrt(sum((np.float64(g) ** 2).sum() for g in step.values()))
        for path, x in values.items():
            g = np.float64(step[path]) * min(1.0, 0.5 / norm)
            rate = 3e-3 * (1 - i / 10) * (3.0 if path.endswith("lora_b") else 1.0)
            values[path] = x - rate * (g + (0.1 * x if x.ndim == 3 else 0.0))
    for path, x in values.items():
        np.testing.assert_allclose(got[path], x, atol=1e-6)


def test_ratio_touches_only_b():
    params, grads = problem(3, steps=1)
    plain, boosted = (
        run(config(optimizer="sgd", clip_norm=None, lora_plus_ratio=ratio), params, grads)
        for ratio in (1.0, 16.0)
    )
    for path, value in params.items():
        factor = 16.0 if path == "layers.q.lora_b" else 1.0
        moved = np.float64(plain[path]) - value
        assert np.abs(moved).max() > 1e-6
        np.testing.assert_allclose(np.float64(boosted[path]) - value, factor * moved, atol=2e-6)


def test_decay_is_for_matrices():
    params = {path: jnp.zeros(shape) for path, shape in SHAPES.items()}
    assert decays(params) == {
        "layers.q.lora_a": True,
        "layers.q.lora_b": True,
        "score.bias": False,
    }
