"""The table of hard strings, by our grader with and without algebra, and by those of others."""

import pytest

from balora_jax.evals.equality import exact_match
from balora_jax.evals.graders import authors, lm_eval
from balora_jax.evals.judge import Judge, has_math_verify
from tests.evals.hard_strings import ALGEBRA, MISSED, RIGHT, WRONG

EVERY = [*RIGHT, *ALGEBRA, *WRONG, *MISSED]
OTHERS = {
    "A": (authors.NUMBERS, "The answer is: {}"),
    "a": (authors.MATHEMATICS, "The answer is: {}"),
    "S": (lm_eval.STRICT_NUMBERS, "#### {}"),
    "F": (lm_eval.FLEXIBLE_NUMBERS, "It is {}"),
    "s": (lm_eval.STRICT_MATHEMATICS, "so ${}$"),
    "f": (lm_eval.FLEXIBLE_MATHEMATICS, r"so $\boxed{{{}}}$"),
}


def ids(rows):
    return [f"{prediction} | {gold}" for prediction, gold, _ in rows]


@pytest.fixture(scope="module")
def judge():
    if not has_math_verify():
        pytest.skip("math-verify is not installed")
    with Judge(seconds=20) as running:
        yield running


def test_the_table_is_large():
    assert len(RIGHT + ALGEBRA) > 80
    assert len(WRONG) > 80
    assert len(MISSED) == 1
    assert len({row[:2] for row in EVERY}) == len(EVERY)


@pytest.mark.parametrize(("prediction", "gold", "others"), RIGHT, ids=ids(RIGHT))
def test_right_without_algebra(prediction, gold, others):
    assert exact_match(prediction, gold)


@pytest.mark.parametrize(
    ("prediction", "gold", "others"), rows := [*ALGEBRA, *WRONG, *MISSED], ids=ids(rows)
)
def test_not_right_without_algebra(prediction, gold, others):
    assert not exact_match(prediction, gold)


def test_with_algebra(judge):
    found = {row[:2] for row in EVERY if exact_match(*row[:2], judge)}
    assert found == {row[:2] for row in (*RIGHT, *ALGEBRA)}
    assert judge.undecided == 0


@pytest.mark.parametrize("letter", OTHERS)
def test_graders_of_others(letter):
    grader, text = OTHERS[letter]
    found = {
        (prediction, gold)
        for prediction, gold, _ in EVERY
        if grader.right(grader.read(text.format(prediction), "The answer is:"), gold)
    }
    assert found == {row[:2] for row in EVERY if letter in row[2]}
    assert found
