r"""MATH: competition problems whose answer stands in the ``\boxed{}`` of the solution.

**Source:** Hendrycks et al. 2021, *Measuring Mathematical Problem Solving with the MATH Dataset*;
the 500 problems of Lightman et al. 2023 where no file is named.
"""

from balora_jax.errors import InputError
from balora_jax.evals.answers import last_boxed
from balora_jax.evals.benchmark import Row, TextBenchmark, column_text
from balora_jax.evals.graders import MATH_GRADERS


def gold_answer(row: Row, column: str, marker: str = "") -> str:
    r"""The right answer of a row: the content of the last ``\boxed{}``.

    Raises:
        InputError: there is no such column, or nothing boxed in it.

    Example:
        >>> gold_answer({"solution": r"Hence $x = \boxed{\frac{1}{2}}$."}, "solution")
        '\\frac{1}{2}'
    """
    cell = column_text(row, column, marker)
    gold = last_boxed(cell)
    if not gold:
        raise InputError(
            f"eval.gold_column: expected a \\boxed answer in {column!r}, got {cell[-40:]!r}. Check "
            "that the column holds MATH solutions."
        )
    return gold


MATH = TextBenchmark(
    name="math",
    gold=gold_answer,
    graders=MATH_GRADERS,
    prompt_column="problem",
    gold_column="solution",
    source="HuggingFaceH4/MATH-500",
)
