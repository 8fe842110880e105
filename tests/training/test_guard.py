"""Updates skipped exactly where the loss or the gradient cannot be trusted."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balora_jax.config import TrainingConfig
from balora_jax.training import guard, optim, steps

KEY = jax.random.key(0)


def loss(adapters, constants, batch, counts, weights, key, emphasis):
    """``Σ x a²``: the data decide how large it is, and whether it is a number."""
    del constants, counts, weights, key, emphasis
    return jnp.sum(batch["input_ids"] * jnp.square(adapters["x.lora_a"])), {}


def parts_of(sigmas):
    training = TrainingConfig(
        max_steps=200, optimizer="adamw", learning_rate=0.01, schedule="linear", warmup=0.1
    )
    return steps.StepParts(
        loss=loss,
        counts=lambda batch: SimpleNamespace(tokens=jnp.float32(3)),
        weights=lambda step: {},
        optimizer=optim.make_optimizer(training, 200),
        learning_rate=optim.learning_rate_schedule(training, 200),
        dropout=False,
        spike_sigmas=sigmas,
    )


def run(values, sigmas=None):
    """The state after a step on each value, and the metrics of each."""
    parts = parts_of(sigmas)
    adapters = {"x.lora_a": jnp.asarray([1.0, -2.0, 3.0])}
    optimizer_state = parts.optimizer.init(adapters)
    state = steps.TrainState(jnp.int32(0), adapters, optimizer_state, guard.new_guard())
    step = jax.jit(lambda state, batch: steps.train_step(parts, state, None, batch, KEY))
    rows = []
    for value in values:
        state, found = step(state, {"input_ids": jnp.full((1, 3), value, jnp.float32)})
        rows.append({name: float(v) for name, v in found.items()})
    return state, rows


def same(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(bad):
    """Weights, moments and the schedule go on from where they were; only the count of steps not."""
    good = [1.0, 2.0, 0.5, 1.5]
    straight, rows = run(good)
    state, found = run([1.0, bad, 2.0, bad, bad, 0.5, 1.5])
    same((state.adapters, state.opt_state), (straight.adapters, straight.opt_state))
    assert int(state.step) == 7
    assert [row["skipped"] for row in found] == [0, 1, 1, 2, 3, 3, 3]
    assert [row["skipped_in_a_row"] for row in found] == [0, 1, 0, 1, 2, 0, 0]
    kept = [row for row in found if row["skipped_in_a_row"] == 0]
    for name in ("loss", "grad_norm", "learning_rate"):
        assert [row[name] for row in kept] == [row[name] for row in rows]
    assert rows[1]["learning_rate"] > 0
    assert np.isfinite(state.adapters["x.lora_a"]).all()


def test_spikes_follow_numpy():
    """The rule on 300 random losses, some of them spikes, against a loop over lists."""
    rng = np.random.default_rng(0)
    losses = rng.normal(-3.0, 0.5, 300)
    norms = rng.gamma(4.0, 0.3, 300)
    losses[[10, 180, 181, 230]] += [50.0, 8.0, 9.0, 3.1]
    norms[[150, 250]] *= 40.0
    state, found, kept, want = guard.new_guard(), [], [], []
    accept = jax.jit(lambda *a: guard.accepts(*a, 4.0))
    record = jax.jit(guard.record)
    for loss, norm in zip(np.float32(losses), np.float32(norms), strict=True):
        good = accept(state, loss, norm)
        state = record(state, good, loss, norm)
        found.append(bool(good))
        last = np.asarray(kept[-128:])
        spike = False
        if len(kept) >= 64:
            spike = (np.array([loss, norm]) > last.mean(0) + 4.0 * last.std(0, ddof=1)).any()
        want.append(not spike)
        if not spike:
            kept.append((loss, norm))
    assert found == want
    assert found[10]  # too early to tell
    assert not any(found[i] for i in (150, 180, 181, 250))
    assert 4 <= want.count(False) <= 8
    assert int(state.skipped) == want.count(False)


def test_spikes_are_skipped_only_if_asked():
    calm = [1.0 + 0.01 * (i % 7) for i in range(80)]
    straight, _ = run(calm)
    state, rows = run([*calm[:70], 50.0, *calm[70:]], sigmas=6.0)
    assert rows[70]["skipped_in_a_row"] == 1
    same(state.adapters, straight.adapters)
    other, rows = run([*calm[:70], 50.0, *calm[70:]])
    assert rows[-1]["skipped"] == 0
    assert not np.array_equal(other.adapters["x.lora_a"], straight.adapters["x.lora_a"])
