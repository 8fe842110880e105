import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balora_jax.errors import InputError
from balora_jax.numerics.head_types import HeadSums
from balora_jax.numerics.objective import (
    columns_of,
    confident,
    for_labels,
    label_remarks,
    length_schedules,
    objective_of,
    parts,
    scales,
    weights,
)
from balora_jax.numerics.schedules import adaptive_weight

NAMES = ("consistency", "diversity", "spectral")
COUNTS = {"task_count": jnp.float32(8), "term_count": jnp.float32(4)}


def factors(schedule, total):
    """λ2 at every step for λ2 = 2, divided by 2."""
    objective = objective_of({"diversity": 2.0, "diversity_schedule": schedule})
    return [float(weights(objective, t, total)["diversity"]) / 2 for t in range(total)]


def test_constant_weights():
    objective = objective_of({"consistency": 0.1, "diversity": 0.2, "spectral": 0.3})
    for step in (0, 7, 99):
        got = weights(objective, step, 100)
        assert list(got) == list(NAMES)
        assert [w.dtype for w in got.values()] == [jnp.float32] * 3
        np.testing.assert_allclose(list(got.values()), [0.1, 0.2, 0.3], rtol=1e-6)


def test_cosine_hand_values():
    objective = objective_of({"consistency": 0.025, "consistency_schedule": "cosine"})
    got = [float(weights(objective, t, 4)["consistency"]) / 0.025 for t in range(5)]
    half = math.sqrt(0.5)
    expected = [1.0, 0.55 + 0.45 * half, 0.55, 0.55 - 0.45 * half, 0.1]
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert float(weights(objective, 0, 1)["consistency"]) == pytest.approx(0.025, rel=1e-6)


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
    objective = objective_of(
        {
            "diversity": 1.0,
            "spectral": 1.0,
            "diversity_schedule": "linear_warmup",
            "spectral_schedule": "quadratic_warmup",
            "warmup_fraction": 0.29,
        }
    )
    # 0.29 · 100 is 28.999… in floating point; the warm-up still takes 29 steps.
    _, linear, quadratic = weights(objective, 28, 100).values()
    np.testing.assert_allclose([linear, quadratic], [28 / 29, (28 / 29) ** 2], rtol=1e-6)
    assert [float(w) for w in weights(objective, 29, 100).values()] == [0, 1, 1]


def test_steps_may_be_traced():
    objective = objective_of(
        {
            "consistency": 1.0,
            "diversity": 1.0,
            "consistency_schedule": "cosine",
            "diversity_schedule": "two_phase",
        }
    )
    traced = jax.jit(lambda t: weights(objective, t, 40))
    for step in (0, 9, 39):
        for name, value in weights(objective, step, 40).items():
            np.testing.assert_allclose(traced(step)[name], value, rtol=1e-6)


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
    off = weights(objective_of(schedules), step % total, total)
    assert [float(w) for w in off.values()] == [0, 0, 0]
    on = objective_of({"consistency": 1.0, "diversity": 1.0, "spectral": 1.0, **schedules})
    got = [float(w) for w in weights(on, step % total, total).values()]
    assert 0.1 - 1e-6 <= got[0] <= 1
    assert 0 <= got[1] <= 1
    assert got[1] == got[2]


def adaptive(entropy, columns, **settings):
    """λ1 on a micro-batch whose teacher has this mean entropy."""
    settings = {"consistency": 0.2, "consistency_schedule": "adaptive", **settings}
    return confident(objective_of(settings), {"consistency": jnp.float32(entropy)}, columns)


def test_adaptive_weight_hand_values():
    for entropy, expected in [(0, 0.2), (math.log(10) / 2, 0.11), (math.log(10), 0.02), (9, 0.02)]:
        got = adaptive(entropy, 10)["consistency"]
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    bounds = adaptive(math.log(10) / 4, 10, adaptive_min=0.0, adaptive_max=1.0)
    np.testing.assert_allclose(bounds["consistency"], 0.75, rtol=1e-6)
    assert adaptive(0.1, 10, consistency=0.0, adaptive_min=0.0, adaptive_max=1.0) == {}
    assert adaptive(0.1, 10, consistency_schedule="cosine") == {}


def settings_of_terms(found):
    consistency, diversity, spectral = (found[name].term for name in NAMES)
    return (
        consistency.temperature, diversity.top_k, spectral.norm, spectral.k, spectral.center_rows
    )  # fmt: skip


def test_variants_fill_in_their_forms():
    new, old = objective_of({}), objective_of({"variant": "arxiv_v1"})
    assert settings_of_terms(new) == (2.0, 20, "frobenius", 10, False)
    assert settings_of_terms(old) == (1.0, 0, "nuclear", 10, False)
    chosen = objective_of(
        {"temperature": 3.0, "top_k": 5, "norm": "nuclear", "k": 4, "center_rows": True}
    )
    assert settings_of_terms(chosen) == (3.0, 5, "nuclear", 4, True)
    same = objective_of({"variant": "arxiv_v1", "norm": "nuclear", "top_k": 0, "temperature": None})
    assert settings_of_terms(same) == (1.0, 0, "nuclear", 10, False)


def test_labels_take_the_nuclear_ratio_where_none_is_named():
    assert objective_of({}, labels=True)["spectral"].term.norm == "nuclear"
    named = objective_of({"norm": "frobenius"}, labels=True)
    assert named["spectral"].term.norm == "frobenius"


@pytest.mark.parametrize("term", NAMES)
def test_only_weighted_terms_are_computed(term):
    objective = objective_of({term: 0.1})
    assert [one.name for one in objective.term_set.terms] == [term]
    assert objective.needs_teacher == (term == "consistency")
    assert objective.term_set.needs_factor == (term == "spectral")
    assert objective.term_set.by_confidence == ()


def test_only_the_adaptive_schedule_needs_the_teachers_entropy():
    def asked(**settings):
        return objective_of(settings).term_set.by_confidence

    assert asked(consistency=0.1, consistency_schedule="adaptive") == ("consistency",)
    assert asked(consistency_schedule="adaptive") == ()
    assert asked(consistency=0.1, consistency_schedule="cosine") == ()


def sums(task, terms, **statistics):
    given = {name: jnp.float32(value) for name, value in terms.items()}
    extra = {name: jnp.float32(value) for name, value in statistics.items()}
    return HeadSums(jnp.float32(task), jnp.float32(3), jnp.float32(2), given, {}, extra)


def test_scales_and_parts_hand_values():
    objective = objective_of({"consistency": 0.5, "diversity": 0.25, "spectral": 2.0})
    found = scales(objective, weights(objective, 0, 1), **COUNTS, micro_batches=3)
    assert {name: float(scale) for name, scale in found.items()} == {
        "task_loss": 1 / 8,
        "consistency": 0.125,
        "diversity": 0.0625,
        "spectral": float(np.float32(2 / 3)),
    }
    assert all(scale.dtype == jnp.float32 for scale in found.values())
    terms = {"consistency": 2, "diversity": -6, "spectral": -0.75}
    got = parts(objective, sums(12, terms, spectral_residual=0.375), **COUNTS, micro_batches=3)
    assert {name: float(value) for name, value in got.items()} == {
        "task_loss": 1.5,
        "consistency": 0.5,
        "diversity": -1.5,
        "spectral": -0.25,
        "spectral_residual": 0.125,
    }


def test_terms_that_are_off_are_logged_as_zero():
    got = parts(objective_of({}), sums(8, {}), **COUNTS, micro_batches=1)
    assert {name: float(value) for name, value in got.items()} == {
        "task_loss": 1.0,
        **dict.fromkeys((*NAMES, "spectral_residual"), 0.0),
    }


def test_columns_of_weights_are_numbered_in_the_registrys_order():
    found = columns_of({"spectral": jnp.float32(3), "consistency": jnp.float32(1)})
    assert {name: float(value) for name, value in found.items()} == {"lambda1": 1, "lambda3": 3}


def test_parts_of_micro_batches_add_up_to_the_whole():
    objective = objective_of({"consistency": 1.0, "diversity": 1.0})
    split = [
        sums(12, {"consistency": 2, "diversity": -6}), sums(4, {"consistency": 6, "diversity": -2})
    ]  # fmt: skip
    whole = sums(16, {"consistency": 8, "diversity": -8})
    shares = [parts(objective, part, **COUNTS, micro_batches=2) for part in split]
    for name, value in parts(objective, whole, **COUNTS, micro_batches=1).items():
        assert float(value) == sum(float(share[name]) for share in shares), name


def test_nothing_counted_is_zero():
    zero = {"task_count": jnp.float32(0), "term_count": jnp.float32(0), "micro_batches": 10}
    objective = objective_of({"consistency": 1.0, "diversity": 1.0, "spectral": 1.0})
    found = scales(objective, weights(objective, 0, 1), **zero)
    np.testing.assert_allclose(list(found.values()), [0, 0, 0, 0.1], rtol=1e-6)
    logged = parts(objective, sums(0, dict.fromkeys(NAMES, 0)), **zero)
    assert all(float(value) == 0 for value in logged.values())


def test_one_output_leaves_two_terms_out():
    asked = {"consistency": 0.1, "diversity": 0.2, "spectral": 0.3}
    objective = objective_of(asked, labels=True)
    assert for_labels(objective, 2) == objective
    assert [one.term.name for one in for_labels(objective, 1).active] == ["consistency"]
    assert label_remarks(objective, 4, 1) == [
        "note: with one output the diversity and the spectral term are constants; they are left "
        "out.",
        "note: consistency with one output is the mean squared difference of the scores.",
    ]
    alone = objective_of({"diversity": 0.2}, labels=True)
    assert label_remarks(alone, 4, 1) == [
        "note: with one output the diversity term is a constant; it is left out."
    ]


@pytest.mark.parametrize(
    ("schedule", "longer"),
    [("constant", False), ("adaptive", False), ("cosine", True)],
)
def test_which_weights_depend_on_the_length_of_the_run(schedule, longer):
    terms = {f"{name}_schedule": "constant" for name in NAMES} | dict.fromkeys(NAMES, 0.1)
    terms["consistency_schedule"] = schedule
    assert bool(length_schedules(terms)) == longer
    assert not length_schedules(terms | {"consistency": 0.0})
    for rising in ("two_phase", "linear_warmup", "quadratic_warmup"):
        assert length_schedules(terms | {"spectral_schedule": rising})


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
            {"warmup_fraction": 0.2, "diversity_schedule": "two_phase"},
            "regularizers.warmup_fraction: expected a schedule that reads it, linear_warmup or "
            "quadratic_warmup, got none with 0.2. Remove it or change a schedule.",
        ),
        (
            {"kk": 3},
            "regularizers.kk: unknown key. It knows variant, mask_alignment, warmup_fraction, "
            "consistency, consistency_schedule, temperature, adaptive_min, adaptive_max, "
            "diversity, diversity_schedule, top_k, spectral, spectral_schedule, k, norm, "
            "center_rows. Correct it.",
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
        objective_of(fields)
    assert str(error.value) == expected


def test_bad_calls():
    nothing = objective_of({})
    with pytest.raises(InputError, match=r"^weights: expected total_steps of at least 1, got 0\."):
        weights(nothing, 0, 0)
    with pytest.raises(InputError, match=r"^adaptive_weight: expected a vocabulary of at least 2"):
        adaptive_weight(0.0, 1.0, jnp.float32(0), 1)
    with pytest.raises(InputError, match=r"^scales: expected micro_batches of at least 1, got 0"):
        scales(nothing, weights(nothing, 0, 1), **COUNTS, micro_batches=0)
    single = objective_of(
        {"consistency": 1.0, "consistency_schedule": "adaptive"}, labels=True
    )  # fmt: skip
    with pytest.raises(InputError) as error:
        for_labels(single, 1)
    assert str(error.value) == (
        "regularizers.consistency_schedule: expected constant or cosine for a regression, got "
        "adaptive: a single output has no entropy. Choose one of them."
    )
