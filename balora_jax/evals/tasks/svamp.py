"""SVAMP: word problems of one step, told in ways that a shallow reader falls for.

**Source:** Patel et al. 2021, *Are NLP Models really able to Solve Simple Math Word Problems?*
"""

from balora_jax.evals.benchmark import Row, TextBenchmark, column_text
from balora_jax.evals.graders import NUMBER_GRADERS


def question(row: Row) -> str:
    """The story of a row, and what is asked of it.

    Example:
        >>> question({"Body": "Ann has 2 nuts", "Question": "How many has she?"})
        'Ann has 2 nuts. How many has she?'
    """
    body = str(row.get("Body", "")).strip()
    return f"{body}{'' if body.endswith(('.', '?', '!')) else '.'} {row.get('Question', '')}"


SVAMP = TextBenchmark(
    name="svamp",
    gold=column_text,
    graders=NUMBER_GRADERS,
    question=question,
    prompt_column="Question",
    gold_column="Answer",
    source="ChilleD/SVAMP",
)
