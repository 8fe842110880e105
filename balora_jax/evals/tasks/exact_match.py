"""Rows of any kind: the answer after the marker, compared as a number or as mathematics."""

from balora_jax.evals.answers import GSM8K_MARKER, extract_answer, last_boxed
from balora_jax.evals.benchmark import Row, TextBenchmark, column_text


def gold_answer(row: Row, column: str, marker: str) -> str:
    r"""The right answer of a row: after ``####`` (GSM8K), after the marker, in the last
    ``\boxed{}`` (MATH), or the whole cell.

    Raises:
        InputError: the row has no such column.

    Example:
        >>> gold_answer({"output": "2 + 2 = 4. The answer is: 4"}, "output", "The answer is:")
        '4'
    """
    cell = column_text(row, column)
    stated = (extract_answer(cell, GSM8K_MARKER), extract_answer(cell, marker), last_boxed(cell))
    return next((found for found in stated if found is not None), cell.strip())


EXACT_MATCH = TextBenchmark(name="exact_match", gold=gold_answer)
