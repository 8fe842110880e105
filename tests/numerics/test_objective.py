import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balora_jax.errors import InputError
from balora_jax.numerics.head import HeadTerms
from balora_jax.numerics.objective import Objective, adaptive_weight, parts, scales, weights

COUNTS = {"task_count": jnp.float32(8), "term_count": jnp.float32(4)}


def factors(schedule, total):
    """λ2 at every step for λ2 = 2, divided by 2."""
    objective = Objective(diversity=2.0, diversity_schedule=schedule)
    return [float(weights(objective, t, total)[1]) / 2 for t in range(total)]


def test_constant_weights():
    objective = Objective(consistency=0.1, diversity=0.2, spectral=0.3)
    for step in (0, 7, 99):
        got = weights(objective, step, 100)
        assert [w.dtype for w in got] == [jnp.float32] * 3
        np.testing.assert_allclose(got, [0.1, 0.2, 0.3], rtol=1e-6)


def test_cosine_hand_values():
    objective = Objective(consistency=0.025, consistency_schedule="cosine")
    got = [float(weights(objective, t, 4)[0]) / 0.025 for t in range(5)]
    half = math.sqrt(0.5)
    expected = [1.0, 0.55 + 0.45 * half, 0.55, 0.55 - 0.45 * half, 0.1]
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert float(weights(objective, 0, 1)[0]) == pytest.approx(0.025, rel=1e-6)


def test_two_phase_hand_values():
    # 40 steps: 8 silent, a ramp of 2, then full.
    assert factors("two_phase", 40) == [0.0] * 9 + [0.5] + [1.0] * 30
    # 100 steps: 20 silent, a ramp of 5.
    np.testing.assert_allclose(
        factors("two_phase", 100)[19:27], [0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1], rtol=1e-6
    )


@pytest.mark.parametrize(
    ("total", "expected"),
    [(1, [0]), (2, [0, 1]), (3, [0, 1, 1]), (4, [0, 1, 1, 1]), (5, [0, 0, 1, 1, 1])],
)
def test_two_phase_of_very_short_runs(total, expected):
    assert factors("two_phase", total) == expected


def test_warmup_hand_values():
    np.testing.assert_allclose(
        factors("linear_warmup", 40)[:6], [0, 0.25, 0.5, 0.75, 1, 1], rtol=1e-6
    )
    np.testing.assert_allclose(
        factors("quadratic_warmup", 40)[:6], [0, 1 / 16, 0.25, 9 / 16, 1, 1], rtol=1e-6
    )
    for total in (1, 2, 3, 4, 5):
        assert factors("linear_warmup", total) == [1.0] * total
        assert factors("quadratic_warmup", total) == [1.0] * total


def test_warmup_fraction_and_separate_schedules():
    objective = Objective(
        diversity=1.0,
        spectral=1.0,
        diversity_schedule="linear_warmup",
        spectral_schedule="quadratic_warmup",
        warmup_fraction=0.29,
    )
    # 0.29 · 100 is 28.999… in floating point; the warm-up still takes 29 steps.
    _, linear, quadratic = weights(objective, 28, 100)
    np.testing.assert_allclose([linear, quadratic], [28 / 29, (28 / 29) ** 2], rtol=1e-6)
    assert [float(w) for w in weights(objective, 29, 100)[1:]] == [1, 1]


def test_steps_may_be_traced():
    objective = Objective(
        consistency=1.0,
        diversity=1.0,
        consistency_schedule="cosine",
        diversity_schedule="two_phase",
    )
    traced = jax.jit(lambda t: weights(objective, t, 40))
    for step in (0, 9, 39):
        np.testing.assert_allclose(traced(step), weights(objective, step, 40), rtol=1e-6)


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(["constant", "cosine", "adaptive"]),
    st.sampled_from(["constant", "two_phase", "linear_warmup", "quadratic_warmup"]),
    st.integers(0, 50),
    st.integers(1, 50),
)
def test_zero_weights_stay_zero_and_others_stay_in_range(first, second, step, total):
    schedules = {
        "consistency_schedule": first,
        "diversity_schedule": second,
        "spectral_schedule": second,
    }
    assert [float(w) for w in weights(Objective(**schedules), step % total, total)] == [0, 0, 0]
    on = Objective(consistency=1.0, diversity=1.0, spectral=1.0, **schedules)
    got = [float(w) for w in weights(on, step % total, total)]
    assert 0.1 - 1e-6 <= got[0] <= 1
    assert 0 <= got[1] <= 1
    assert got[1] == got[2]


def test_adaptive_weight_hand_values():
    objective = Objective(consistency=0.2, consistency_schedule="adaptive")
    for entropy, expected in [(0, 0.2), (math.log(10) / 2, 0.11), (math.log(10), 0.02), (9, 0.02)]:
        got = adaptive_weight(objective, jnp.float32(entropy), 10)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    bounds = Objective(
        consistency=0.2, consistency_schedule="adaptive", adaptive_min=0.0, adaptive_max=1.0
    )
    np.testing.assert_allclose(adaptive_weight(bounds, jnp.log(10.0) / 4, 10), 0.75, rtol=1e-6)
    off = Objective(consistency_schedule="adaptive", adaptive_min=0.0, adaptive_max=1.0)
    assert adaptive_weight(off, jnp.float32(0.1), 10) == 0


def test_variants_fill_in_their_forms():
    new, old = Objective().term_spec, Objective(variant="arxiv_v1").term_spec
    assert (new.temperature, new.top_k, new.norm, new.k) == (2.0, 20, "frobenius", 10)
    assert (old.temperature, old.top_k, old.norm, old.k) == (1.0, 0, "nuclear", 10)
    assert Objective().temperature == 2.0
    chosen = Objective(temperature=3.0, top_k=5, norm="nuclear", k=4, center_rows=True).term_spec
    assert (chosen.temperature, chosen.top_k, chosen.norm) == (3.0, 5, "nuclear")
    assert (chosen.k, chosen.center_rows) == (4, True)
    assert Objective(variant="arxiv_v1", norm="nuclear", top_k=0).top_k == 0


@pytest.mark.parametrize("term", ["consistency", "diversity", "spectral"])
def test_term_spec_computes_only_weighted_terms(term):
    objective = Objective(**{term: 0.1})
    spec = objective.term_spec
    on = {name for name in ("consistency", "diversity", "spectral") if getattr(spec, name)}
    assert on == {term}
    assert objective.needs_teacher == spec.needs_teacher == (term == "consistency")
    assert not spec.teacher_entropy


def test_only_the_adaptive_schedule_needs_the_teachers_entropy():
    assert Objective(consistency=0.1, consistency_schedule="adaptive").term_spec.teacher_entropy
    assert not Objective(consistency_schedule="adaptive").term_spec.teacher_entropy
    assert not Objective(consistency=0.1, consistency_schedule="cosine").term_spec.teacher_entropy


def terms(*values):
    return HeadTerms(*(jnp.float32(v) for v in values))


def test_scales_and_parts_hand_values():
    objective = Objective(consistency=0.5, diversity=0.25, spectral=2.0)
    found = scales(weights(objective, 0, 1), **COUNTS, micro_batches=3)
    assert [float(scale) for scale in found] == [1 / 8, 0.125, 0.0625, float(np.float32(2 / 3))]
    assert all(scale.dtype == jnp.float32 for scale in found)
    got = parts(
        terms(12, 3, 2, -6, 2, 0, -0.75, 0.375), jnp.float32(0.75), **COUNTS, micro_batches=3
    )
    assert {name: float(value) for name, value in got.items()} == {
        "task_loss": 1.5,
        "consistency": 0.5,
        "diversity": -1.5,
        "spectral": -0.25,
        "spectral_residual": 0.125,
        "lambda1": 0.25,
    }


def test_parts_of_micro_batches_add_up_to_the_whole():
    split = [terms(12, 3, 2, -6, 1, 0, 0, 0), terms(4, 5, 6, -2, 3, 0, 0, 0)]
    whole = terms(16, 8, 8, -8, 4, 0, 0, 0)
    shares = [parts(part, jnp.float32(0.5), **COUNTS, micro_batches=2) for part in split]
    for name, value in parts(whole, jnp.float32(0.5), **COUNTS, micro_batches=1).items():
        assert float(value) == sum(float(share[name]) for share in shares), name


def test_zero_counts_give_zero_scales_and_parts():
    zero = {"task_count": jnp.float32(0), "term_count": jnp.float32(0), "micro_batches": 1}
    objective = Objective(consistency=0.2, diversity=0.1, spectral=0.1)
    found = scales(weights(objective, 0, 1), **zero)
    np.testing.assert_allclose(found, [0, 0, 0, 0.1], rtol=1e-6)
    assert all(float(v) == 0 for v in parts(terms(*[0] * 8), jnp.float32(0), **zero).values())


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"variant": "v3"},
            "regularizers.variant: expected one of iclr2026, arxiv_v1, got 'v3'. Choose one of them.",
        ),
        (
            {"consistency_schedule": "two_phase"},
            "regularizers.consistency_schedule: expected one of constant, cosine, adaptive, got "
            "'two_phase'. Choose one of them.",
        ),
        (
            {"diversity_schedule": "cosine"},
            "regularizers.diversity_schedule: expected one of constant, two_phase, linear_warmup, "
            "quadratic_warmup, got 'cosine'. Choose one of them.",
        ),
        (
            {"spectral_schedule": "cosine"},
            "regularizers.spectral_schedule: expected one of constant, two_phase, linear_warmup, "
            "quadratic_warmup, got 'cosine'. Choose one of them.",
        ),
        (
            {"mask_alignment": "unshifted"},
            "regularizers.mask_alignment: expected one of shifted, official, got 'unshifted'. "
            "Choose one of them.",
        ),
        (
            {"diversity": -0.1},
            "regularizers.diversity: expected a weight of at least 0, got -0.1. "
            "Use 0 to switch the term off.",
        ),
        (
            {"spectral": float("nan")},
            "regularizers.spectral: expected a weight of at least 0, got nan. "
            "Use 0 to switch the term off.",
        ),
        (
            {"consistency": float("inf")},
            "regularizers.consistency: expected a weight of at least 0, got inf. "
            "Use 0 to switch the term off.",
        ),
        (
            {"temperature": 0.0},
            "regularizers.temperature: expected a temperature above 0, got 0.0. "
            "The published value is 2.",
        ),
        (
            {"top_k": -1},
            "regularizers.top_k: expected at least 0 (0 is the entire vocabulary), got -1. "
            "The published value is 20.",
        ),
        (
            {"k": 0},
            "regularizers.spectral term: expected k of at least 1, got 0. The published value is 10.",
        ),
        (
            {"norm": "max"},
            "regularizers.spectral term: expected norm frobenius or nuclear, got 'max'. "
            "Choose one of them.",
        ),
        (
            {"variant": "arxiv_v1", "temperature": 2.0},
            "regularizers.temperature: expected 1.0 for variant arxiv_v1, got 2.0. "
            "Leave it out or use variant iclr2026.",
        ),
        (
            {"variant": "arxiv_v1", "top_k": 20},
            "regularizers.top_k: expected 0 for variant arxiv_v1, got 20. "
            "Leave it out or use variant iclr2026.",
        ),
        (
            {"variant": "arxiv_v1", "norm": "frobenius"},
            "regularizers.norm: expected nuclear for variant arxiv_v1, got frobenius. "
            "Leave it out or use variant iclr2026.",
        ),
        (
            {"warmup_fraction": 1.5},
            "regularizers.warmup_fraction: expected a share of the steps between 0 and 1, got 1.5. "
            "The official default is 0.1.",
        ),
        (
            {"adaptive_min": 0.1},
            "regularizers.adaptive_min, adaptive_max: expected consistency_schedule adaptive, got "
            "constant. Remove the two or change the schedule.",
        ),
        (
            {
                "consistency": 1.0,
                "consistency_schedule": "adaptive",
                "adaptive_min": 0.5,
                "adaptive_max": 0.4,
            },
            "regularizers.adaptive_min, adaptive_max: expected 0 <= adaptive_min <= adaptive_max, got "
            "0.5 and 0.4. Swap or raise them.",
        ),
    ],
)
def test_bad_objectives(type_checks_off, fields, expected):
    with pytest.raises(InputError) as error:
        Objective(**fields)
    assert str(error.value) == expected


def test_bad_calls():
    with pytest.raises(InputError, match=r"^weights: expected total_steps of at least 1, got 0\."):
        weights(Objective(), 0, 0)
    with pytest.raises(InputError, match=r"^adaptive_weight: expected a vocabulary of at least 2"):
        adaptive_weight(Objective(), jnp.float32(0), 1)
    with pytest.raises(InputError, match=r"^scales: expected micro_batches of at least 1, got 0"):
        scales(weights(Objective(), 0, 1), **COUNTS, micro_batches=0)
