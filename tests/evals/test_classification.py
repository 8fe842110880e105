"""Scores of labels: SciPy, textbook formulas in fractions, values by hand, and every refusal."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from balora_jax.data.glue import GLUE, custom_task
from balora_jax.errors import InputError
from balora_jax.evals.classification import (
    METRICS,
    accuracy,
    f1,
    matthews,
    pearson,
    score_labels,
    spearman,
)

CLASS_METRICS = [accuracy, f1, matthews]


def pairs(element, least=1, most=30):
    return st.lists(st.tuples(element, element), min_size=least, max_size=most).map(
        lambda rows: tuple(map(list, zip(*rows, strict=True)))
    )


BINARY = pairs(st.integers(0, 1))
CLASSES = pairs(st.integers(0, 3))
SCORES = pairs(st.floats(-1e3, 1e3, width=32), least=2)
TIED = pairs(st.integers(-3, 3), least=2)


def confusion(predictions, golds):
    """True and false positives and negatives of class 1, counted row by row."""
    both = list(zip(predictions, golds, strict=True))
    return tuple(both.count(cell) for cell in ((1, 1), (1, 0), (0, 1), (0, 0)))


@given(CLASSES)
def test_accuracy_counts(rows):
    right = sum(p == g for p, g in zip(*rows, strict=True))
    assert accuracy(*rows) == pytest.approx(right / len(rows[0]), abs=1e-15)


@given(BINARY)
def test_f1_is_the_harmonic_mean(rows):
    tp, fp, fn, _ = confusion(*rows)
    expected = Fraction(0)
    if tp:
        precision, recall = Fraction(tp, tp + fp), Fraction(tp, tp + fn)
        expected = 2 / (1 / precision + 1 / recall)
    assert f1(*rows) == pytest.approx(float(expected), abs=1e-15)


@given(BINARY)
def test_matthews_of_two_classes_is_the_textbook_formula_and_phi(rows):
    tp, fp, fn, tn = confusion(*rows)
    below = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    expected = (tp * tn - fp * fn) / math.sqrt(below) if below else 0.0
    assert matthews(*rows) == pytest.approx(expected, abs=1e-14)
    # Which is Pearson's correlation of the ids.
    assert matthews(*rows) == pytest.approx(pearson(*rows), abs=1e-12)


@given(CLASSES)
def test_matthews_of_more_classes_is_the_correlation_of_indicators(rows):
    """R_K as a ratio of covariances summed over the classes, in fractions."""
    n = len(rows[0])

    def covariance(a, b):
        total = Fraction(0)
        for k in range(4):
            x, y = [v == k for v in a], [v == k for v in b]
            joint = Fraction(sum(p and q for p, q in zip(x, y, strict=True)), n)
            total += joint - Fraction(sum(x), n) * Fraction(sum(y), n)
        return total

    below = covariance(rows[0], rows[0]) * covariance(rows[1], rows[1])
    expected = float(covariance(*rows)) / math.sqrt(below) if below else 0.0
    assert matthews(*rows) == pytest.approx(expected, abs=1e-14)
    assert -1 <= matthews(*rows) <= 1


def test_published_values():
    """The examples in scikit-learn's own reference."""
    assert matthews([1, 0, 1, 1], [1, 1, 1, 0]) == pytest.approx(-1 / 3)
    assert f1([0, 1, 0, 0, 1, 1], [0, 1, 0, 1, 1, 0]) == pytest.approx(2 / 3)
    assert accuracy([0, 2, 1, 3], [0, 1, 2, 3]) == 0.5


def test_matthews_at_the_size_of_qqp():
    """The products pass 2^63: four quarters, one of them wrong."""
    quarter = 100_000
    golds = np.repeat([1, 1, 0, 0], quarter)
    predictions = np.repeat([1, 1, 1, 0], quarter)
    assert matthews(predictions, golds) == pytest.approx(1 / math.sqrt(3), abs=1e-15)
    assert matthews(golds, golds) == 1.0
    assert matthews(1 - golds, golds) == -1.0


@given(rows=st.one_of(SCORES, TIED))
def test_pearson_and_spearman_are_scipys(rows):
    for side in rows:
        # SciPy warns that it is inexact where the spread is lost in the rounding of the mean.
        assume(np.ptp(side) > 1e-6 * (1 + np.abs(side).max()))
    assert pearson(*rows) == pytest.approx(stats.pearsonr(*rows).statistic, abs=1e-9)
    assert spearman(*rows) == pytest.approx(stats.spearmanr(*rows).statistic, abs=1e-12)


@given(SCORES)
def test_correlations_stay_between_minus_one_and_one(rows):
    for metric in (pearson, spearman):
        assert -1 <= metric(*rows) <= 1
        assert metric(*rows) == pytest.approx(metric(*rows[::-1]), abs=1e-12)


def test_ties_share_the_mean_of_their_ranks():
    # Ranks 1, 2.5, 2.5, 4 against 1, 3, 2, 4: 1 − 6·0.5/60 does not hold with ties; 4.5/√(4.5·5).
    assert spearman([0, 7, 7, 9], [1, 3, 2, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


@pytest.mark.parametrize("scale", [1e-320, 1e-160, 1e160, 5e307])
def test_neither_large_nor_small_scores_overflow(scale):
    golds = np.array([1.0, 2.0, 4.0])
    expected = stats.pearsonr([3, 1, 2], golds).statistic
    assert pearson(np.array([3, 1, 2]) * scale, golds) == pytest.approx(expected, abs=1e-3)
    assert spearman(np.array([3, 1, 2]) * scale, golds) == pytest.approx(-0.5)


@pytest.mark.parametrize("constant", [0.0, 0.1, -3.3, 1e200])
@pytest.mark.parametrize("metric", [pearson, spearman])
def test_a_constant_correlates_with_nothing(metric, constant):
    some = [0.0, 1.0, 5.0]
    assert metric([constant] * 3, some) == 0.0
    assert metric(some, [constant] * 3) == 0.0
    assert metric([constant], [2.0]) == 0.0


@pytest.mark.parametrize("constant", [0, 1])
def test_a_constant_class_earns_nothing(constant):
    golds = [0, 1, 1, 0]
    assert matthews([constant] * 4, golds) == 0.0
    assert matthews(golds, [constant] * 4) == 0.0
    assert matthews([constant] * 4, [constant] * 4) == 0.0
    assert f1([0] * 4, golds) == 0.0
    assert f1([0] * 4, [0] * 4) == 0.0
    assert f1([1] * 4, golds) == pytest.approx(2 / 3)


def test_score_labels_follows_the_task():
    assert score_labels(GLUE["mrpc"].metrics, [1, 0, 1, 1], [1, 0, 0, 1]) == {
        "accuracy": 0.75,
        "f1": 0.8,
    }
    scored = score_labels(("spearman", "pearson"), [0.0, 1.0, 4.0], [0.0, 1.0, 2.0])
    assert list(scored) == ["spearman", "pearson"]
    assert scored == pytest.approx({"spearman": 1.0, "pearson": 4 / math.sqrt(2 * 26 / 3)})
    assert all(type(value) is float for value in scored.values())


def test_arrays_of_any_dtype():
    ids = np.array([1, 0, 1], np.int32)
    assert score_labels(["accuracy", "matthews"], ids, ids.astype(np.float32)) == {
        "accuracy": 1.0,
        "matthews": 1.0,
    }
    assert pearson(np.float32([1, 2]), np.float16([1, 2])) == pytest.approx(1.0)


def test_every_metric_of_every_task_is_known():
    tasks = [
        *GLUE.values(),
        custom_task("t", "y", ["a", "b"]),
        custom_task("t", "y", ["a", "b", "c"]),
    ]
    tasks.append(custom_task("t", "y", regression=True))
    assert {metric for task in tasks for metric in task.metrics} == set(METRICS)


@pytest.mark.parametrize("metric", [*CLASS_METRICS, pearson, spearman])
@pytest.mark.parametrize(
    ("predictions", "golds", "message"),
    [
        ([], [], "score: expected at least one row to score, got none. Add rows."),
        ([1], [1, 0], "one length, got the shapes (1,) and (2,). Give one of each for a row."),
        ([[1]], [[1]], "one length, got the shapes (1, 1) and (1, 1). "),
        ([1, math.nan], [1, 0], "score: expected finite predictions, got nan in row 2. "),
        ([1, 0], [1, math.inf], "score: expected finite right answers, got inf in row 2. "),
    ],
)
def test_what_cannot_be_scored_is_refused(metric, predictions, golds, message):
    with pytest.raises(InputError) as error:
        metric(predictions, golds)
    assert message in str(error.value)


@pytest.mark.parametrize("metric", CLASS_METRICS)
@pytest.mark.parametrize(
    ("predictions", "golds", "message"),
    [
        ([0, 1], [0, -1], "score: expected class ids from 0 as right answers, got -1 in row 2. "),
        ([0.5, 1], [0, 1], "score: expected class ids from 0 as predictions, got 0.5 in row 1. "),
    ],
)
def test_what_is_no_class_is_refused(metric, predictions, golds, message):
    with pytest.raises(InputError) as error:
        metric(predictions, golds)
    assert message in str(error.value)


def test_f1_of_three_classes_and_unknown_metrics_are_refused():
    with pytest.raises(InputError, match=r"f1: expected the classes 0 and 1, got 2\. Use accuracy"):
        f1([0, 1], [0, 2])
    with pytest.raises(InputError) as error:
        score_labels(["acuracy"], [0], [0])
    assert str(error.value) == (
        "metrics: expected some of accuracy, f1, matthews, pearson, spearman, got 'acuracy'. "
        "Choose of these."
    )
