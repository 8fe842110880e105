"""ASDiv: word problems of primary school in many wordings; the unit stands behind the answer.

**Source:** Miao et al. 2020, *A Diverse Corpus for Evaluating and Developing English Math Word
Problem Solvers*.
"""

from balora_jax.evals.benchmark import Row, TextBenchmark, column_text
from balora_jax.evals.graders import NUMBER_GRADERS


def question(row: Row) -> str:
    """The story of a row, and what is asked of it.

    Example:
        >>> question({"body": "Ann has 2 nuts.", "question": "How many has she?"})
        'Ann has 2 nuts. How many has she?'
    """
    return f"{row.get('body', '')} {row.get('question', '')}".strip()


def gold_answer(row: Row, column: str, marker: str = "") -> str:
    """The right answer without its unit, which stands in round brackets.

    Raises:
        InputError: there is no such column, or nothing in it.

    Example:
        >>> gold_answer({"answer": "9 (apples)"}, "answer")
        '9'
    """
    return column_text(row, column, marker).partition(" (")[0]


ASDIV = TextBenchmark(
    name="asdiv",
    gold=gold_answer,
    graders=NUMBER_GRADERS,
    question=question,
    prompt_column="question",
    gold_column="answer",
    source="EleutherAI/asdiv",
    split="validation",
)
