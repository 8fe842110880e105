"""GLUE's metrics of predicted labels in float64, as scikit-learn and SciPy define them.

Every metric takes predictions and right answers of one length, and is a number even where its
formula divides by zero: such predictions tell nothing, and a metric that measures nothing is 0.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from balora_jax.array_types import Float, Int
from balora_jax.errors import InputError


def accuracy(predictions: ArrayLike, golds: ArrayLike) -> float:
    """Share of right class ids.

    Raises:
        InputError: Nothing to score, two lengths, or something else than class ids.

    >>> accuracy([1, 0, 2, 2], [1, 1, 2, 2])
    0.75
    """
    ours, right = _classes(predictions, golds)
    return float(np.mean(ours == right))


def f1(predictions: ArrayLike, golds: ArrayLike) -> float:
    """Harmonic mean of precision and recall of class 1, for two classes.

    Returns:
        A number in [0, 1]; 0 also if class 1 is neither predicted nor right anywhere.

    Raises:
        InputError: As `accuracy`, or a class other than 0 and 1.

    >>> f1([1, 1, 1, 0], [1, 1, 0, 1])  # precision 2/3, recall 2/3
    0.6666666666666666
    """
    ours, right = _classes(predictions, golds)
    highest = max(ours.max(), right.max())
    if highest > 1:
        raise InputError(f"f1: expected the classes 0 and 1, got {highest}. Use accuracy.")
    named = int(np.sum(ours == 1) + np.sum(right == 1))
    return 2 * int(np.sum((ours == 1) & (right == 1))) / named if named else 0.0


def matthews(predictions: ArrayLike, golds: ArrayLike) -> float:
    """Matthews correlation of class ids, for two classes or more.

    Returns:
        A number in [-1, 1]; 0 if the predictions or the right answers are all one class.

    Raises:
        InputError: As `accuracy`.

    **Source:** Gorodkin's R_K, which for two classes is Matthews' coefficient.

    >>> matthews([1, 1, 0, 0, 1], [1, 0, 0, 0, 1])  # (2·2 − 1·0) / √(3·2·3·2)
    0.6666666666666666
    """
    ours, right = _classes(predictions, golds)
    size = int(max(ours.max(), right.max())) + 1
    # Python's integers: products of four counts leave int64 at the size of QQP.
    predicted = np.bincount(ours, minlength=size).tolist()
    true = np.bincount(right, minlength=size).tolist()
    rows, hits = len(ours), int(np.sum(ours == right))
    joint = hits * rows - sum(p * t for p, t in zip(predicted, true, strict=True))
    spread = (rows**2 - sum(p * p for p in predicted)) * (rows**2 - sum(t * t for t in true))
    # The root of a whole number may be rounded down, past which the ratio would leave [-1, 1].
    return max(-1.0, min(1.0, joint / math.sqrt(spread))) if spread else 0.0


def pearson(predictions: ArrayLike, golds: ArrayLike) -> float:
    """Linear correlation of scores.

    Returns:
        A number in [-1, 1]; 0 if either side is constant. SciPy says NaN there, but a NaN would
        spoil every mean and every comparison of checkpoints, and a model that answers the same to
        each row has shown no correlation.

    Raises:
        InputError: Nothing to score, two lengths, or a score that is not finite.

    >>> pearson([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    1.0
    """
    ours, right = _scores(predictions, golds)
    return _correlation(ours, right)


def spearman(predictions: ArrayLike, golds: ArrayLike) -> float:
    """Correlation of the ranks of scores; equal scores share the mean of their ranks.

    Returns:
        A number in [-1, 1]; 0 if either side is constant, for the reason given in `pearson`.

    Raises:
        InputError: As `pearson`.

    >>> spearman([1.0, 2.0, 30.0], [0.0, 0.1, 0.2])
    1.0
    """
    ours, right = _scores(predictions, golds)
    return _correlation(_ranks(ours), _ranks(right))


METRICS: dict[str, Callable[[ArrayLike, ArrayLike], float]] = {
    metric.__name__: metric for metric in (accuracy, f1, matthews, pearson, spearman)
}
"""The metrics by the names that tasks call them."""


def score_labels(
    task_metrics: Sequence[str], predictions: ArrayLike, golds: ArrayLike
) -> dict[str, float]:
    """The metrics of a task, in its order.

    Args:
        task_metrics: Names in `METRICS`.
        predictions: Class ids [N], or scores [N] for a regression.
        golds: The right answers [N].

    Raises:
        InputError: An unknown metric, or what the metrics themselves refuse.

    >>> score_labels(("accuracy", "f1"), [1, 0, 1, 1], [1, 0, 0, 1])
    {'accuracy': 0.75, 'f1': 0.8}
    """
    for name in task_metrics:
        if name not in METRICS:
            raise InputError(
                f"metrics: expected some of {', '.join(METRICS)}, got {name!r}. Choose of these."
            )
    return {name: METRICS[name](predictions, golds) for name in task_metrics}


def _correlation(a: Float[np.ndarray, " N"], b: Float[np.ndarray, " N"]) -> float:
    if a.min() == a.max() or b.min() == b.max():
        return 0.0
    a, b = _unit(a), _unit(b)
    return float(np.clip(np.sum(a * b), -1.0, 1.0))


def _unit(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """The values less their mean, as a vector of length 1; scaled first, so no square overflows."""
    scaled = values / np.abs(values).max()
    centred = scaled - scaled.mean()
    centred /= np.abs(centred).max()
    return centred / np.sqrt(np.sum(centred**2))


def _ranks(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse.reshape(-1)]


def _scores(
    predictions: ArrayLike, golds: ArrayLike
) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    ours, right = np.asarray(predictions, np.float64), np.asarray(golds, np.float64)
    if ours.ndim != 1 or ours.shape != right.shape:
        raise InputError(
            f"score: expected predictions and right answers of one length, got the shapes "
            f"{ours.shape} and {right.shape}. Give one of each for a row."
        )
    if ours.size == 0:
        raise InputError("score: expected at least one row to score, got none. Add rows.")
    for what, values in (("predictions", ours), ("right answers", right)):
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            raise InputError(
                f"score: expected finite {what}, got {values[bad[0]]} in row {bad[0] + 1}. "
                "Check that the model has not diverged and that every row has a label."
            )
    return ours, right


def _classes(
    predictions: ArrayLike, golds: ArrayLike
) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    ours, right = _scores(predictions, golds)
    for what, values in (("predictions", ours), ("right answers", right)):
        bad = np.flatnonzero((values < 0) | (values != np.floor(values)))
        if bad.size:
            raise InputError(
                f"score: expected class ids from 0 as {what}, got {values[bad[0]]:g} in row "
                f"{bad[0] + 1}. Take the class with the largest logit, and rows with a label."
            )
    return ours.astype(np.int64), right.astype(np.int64)
