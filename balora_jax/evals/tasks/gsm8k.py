"""GSM8K: word problems of grade-school mathematics, with a whole number after ``####``.

**Source:** Cobbe et al. 2021, *Training Verifiers to Solve Math Word Problems*.
"""

from balora_jax.errors import InputError
from balora_jax.evals.answers import GSM8K_MARKER, extract_answer
from balora_jax.evals.benchmark import Row, TextBenchmark, column_text
from balora_jax.evals.graders import NUMBER_GRADERS


def gold_answer(row: Row, column: str, marker: str = "") -> str:
    r"""The right answer of a row: what follows the last ``####``.

    Raises:
        InputError: there is no such column or no such mark, or nothing after it.

    Example:
        >>> gold_answer({"answer": "5 * 2 = <<5*2=10>>10\n#### 1,010"}, "answer")
        '1,010'
    """
    cell = column_text(row, column, marker)
    gold = extract_answer(cell, GSM8K_MARKER)
    if gold is None:
        raise InputError(
            f"eval.gold_column: expected an answer after {GSM8K_MARKER!r} in {column!r}, got "
            f"{cell[-40:]!r}. Check that the column holds GSM8K answers."
        )
    return gold


GSM8K = TextBenchmark(
    name="gsm8k",
    gold=gold_answer,
    graders=NUMBER_GRADERS,
    prompt_column="question",
    gold_column="answer",
    source="openai/gsm8k:main",
)
