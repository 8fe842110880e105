"""Rows of any kind: the answer that a text states, compared as a number or as mathematics."""

from balora_jax.evals.answers import bare_answer, read_answer
from balora_jax.evals.benchmark import Row, TextBenchmark, column_text


def gold_answer(row: Row, column: str, marker: str) -> str:
    r"""The right answer of a row, read as a model's is; or the whole cell.

    Raises:
        InputError: the row has no such column, or nothing in it.

    Example:
        >>> gold_answer({"output": "2 + 2 = 4. The answer is: 4"}, "output", "The answer is:")
        '4'
    """
    cell = column_text(row, column)
    return read_answer(cell, marker) or bare_answer(cell)


EXACT_MATCH = TextBenchmark(name="exact_match", gold=gold_answer)
