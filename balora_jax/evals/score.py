"""The score of a set of rows: greedy answers, compared with the right ones."""

from collections.abc import Mapping, Sequence
from typing import Any

from balora_jax.errors import InputError
from balora_jax.evals.answers import exact_match, extract_answer, last_boxed


def gold_answer(row: Mapping[str, Any], column: str, marker: str) -> str:
    r"""The right answer of a row: after ``####`` (GSM8K), after the marker, in the last
    ``\boxed{}`` (MATH), or the whole cell.

    Raises:
        InputError: the row has no such column.

    Example:
        >>> gold_answer({"output": "2 + 2 = 4. The answer is: 4"}, "output", "The answer is:")
        '4'
    """
    if column not in row:
        raise InputError(
            f"eval.gold_column: expected the column {column!r} in the validation rows, got "
            f"{', '.join(map(str, row))}. Name the column of the right answer."
        )
    cell = str(row[column])
    for found in (extract_answer(cell, "####"), extract_answer(cell, marker), last_boxed(cell)):
        if found is not None:
            return found
    return cell.strip()


def score_answers(
    texts: Sequence[str], golds: Sequence[str], marker: str
) -> dict[str, float | int]:
    """Share of texts whose stated answer is right, and share that state one at all.

    Example:
        >>> score_answers(["The answer is: 4", "four"], ["4.0", "4"], "The answer is:")
        {'exact_match': 0.5, 'answered': 0.5, 'rows': 2}
    """
    answers = [extract_answer(text, marker) for text in texts]
    right = sum(exact_match(answer, gold) for answer, gold in zip(answers, golds, strict=True))
    answered = sum(answer is not None for answer in answers)
    rows = max(len(texts), 1)
    return {"exact_match": right / rows, "answered": answered / rows, "rows": len(texts)}
