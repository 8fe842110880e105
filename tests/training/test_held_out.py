"""What a run makes of the figures of its held-out rows: the best, and when to stop."""

import math

import jax.numpy as jnp
import pytest

from balora_jax.config import EvalConfig, TrainingConfig
from balora_jax.training.held_out import HeldOut


def held_out(values=(), *, keep_best=None, patience=None, every=2, score_every=0):
    """Of a run of 7 steps whose validation loss takes these values one after another."""
    left = iter(values)
    return HeldOut(
        EvalConfig(every=every, score_every=score_every),
        TrainingConfig(max_steps=7, keep_best=keep_best, patience=patience),
        (lambda constants, adapters: {"loss": next(left)}) if every else None,
        7,
        {"a": jnp.zeros(2)},
    )


def go(found, steps, scores=None):
    """Measure and compare after steps, with adapters that are the step; which were the best."""
    best = []
    for step in steps:
        figures = found.measure(step, None, {}, lambda _, at=step: scores[at])
        if found.compare(step, figures, {"a": jnp.full(2, float(step))}, skipped=step - 1):
            best.append(step)
    return best


def test_when_something_is_measured():
    found = held_out(every=3, score_every=2)
    assert [step for step in range(8) if found.due(step) and step] == [2, 3, 4, 6, 7]
    assert not any(held_out(every=0).due(step) for step in range(8))
    assert held_out(every=0, score_every=1).is_on
    assert not held_out(every=0).is_on


def test_the_least_loss_is_the_best_and_the_first_of_equals(capsys):
    found = held_out([3.0, 2.0, 2.0, 2.5], keep_best="validation_loss")
    assert go(found, [2, 4, 6, 7]) == [2, 4]
    assert found.best["step"] == 4
    assert found.best["skipped"] == 3
    assert found.kept["a"].tolist() == [4, 4]
    assert found.without_gain == 2
    assert "step 4: validation loss 2.0000" in capsys.readouterr().out
    summary = found.summary({"validation_loss": 2.5})
    assert summary["validation"]["best"] == {
        "metric": "validation_loss",
        "step": 4,
        "value": 2.0,
        "validation_loss": 2.0,
    }
    assert "stopped_early" not in summary


def test_the_highest_score_is_the_best():
    scores = {1: {"accuracy": 0.2, "grader": "plain"}, 2: {"accuracy": 0.5}, 3: {"accuracy": 0.4}}
    found = held_out(keep_best="score_accuracy", every=0, score_every=1)
    assert go(found, [1, 2, 3], scores) == [1, 2]
    assert found.best["figures"] == {"score_accuracy": 0.5}


def test_a_loss_that_is_no_number_is_never_the_best():
    found = held_out([math.nan, math.inf, 5.0], keep_best="validation_loss", patience=3)
    assert go(found, [2]) == []
    assert found.measure(4, None, {}, dict) == {"validation_loss": None}
    found = held_out([math.nan, 5.0], keep_best="validation_loss", patience=3)
    assert go(found, [2, 4]) == [4]
    assert found.without_gain == 0


def test_patience_counts_measurements_in_a_row():
    found = held_out([3.0, 4.0, 2.0, 2.0, 3.0], patience=2, every=1)
    for step, ends in zip(range(1, 6), (False, False, False, False, True), strict=True):
        go(found, [step])
        assert found.exhausted == ends, step
    assert found.summary({})["stopped_early"]
    assert found.kept is None  # only where the best is to be kept
    said = found.ending(5)
    assert said == (
        "stopped early after step 5: 2 measurements without a better validation loss; the best was "
        "2.0000 after step 3"
    )


def test_a_state_is_the_same_after_a_resume():
    first = held_out([3.0, 4.0], keep_best="validation_loss", patience=2)
    first.begin(None, {})
    go(first, [2])
    second = held_out([4.5, 2.0], keep_best="validation_loss", patience=2)
    second.set_state(first.get_state(), first.kept)
    assert second.before == {"validation_loss": 3.0}
    assert go(second, [4]) == []
    assert (second.best, second.without_gain) == (first.best, 1)
    assert go(second, [6]) == [6]


def test_a_step_is_measured_once():
    found = held_out([3.0, 4.0])
    for _ in range(2):
        assert found.validate(7, "after", None, {}) == {"validation_loss": 3.0}
    with pytest.raises(StopIteration):
        held_out([]).validate(7, "after", None, {})
