"""A benchmark: rows with right answers, and how what a model says about them is scored."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from balora_jax.errors import InputError
from balora_jax.evals.answers import exact_match, extract_answer

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Benchmark that ``eval.task`` names.

    Attributes:
        name: of it in configs.
        task: whose models it scores; None for any.
    """

    name: str
    task: str | None = None


@dataclass(frozen=True, kw_only=True)
class TextBenchmark(Benchmark):
    """Questions that a model answers in words.

    Attributes:
        gold: ``(row, column, marker)`` → the right answer of a row.
        parse: ``(text, marker)`` → the answer that a text states; None where it states none.
        right: ``(answer, gold)`` → whether an answer is the right one.
        question: row → the text of the question; None where it is a column as it stands.
        prompt_column, gold_column: of its own rows; those of the training data where not given.
        source, split: of its own rows, which ``data.validation`` replaces.

    Example:
        >>> last = TextBenchmark(
        ...     name="last_word", gold=column_text, parse=lambda text, marker: text.split()[-1]
        ... )
        >>> last.score(["it is 4", "so 5"], ["4", "6"], marker="")
        {'exact_match': 0.5, 'answered': 1.0, 'rows': 2}
    """

    task: str | None = "text"
    gold: Callable[[Row, str, str], str]
    parse: Callable[[str, str], str | None] = extract_answer
    right: Callable[[str | None, str], bool] = exact_match
    question: Callable[[Row], str] | None = None
    prompt_column: str | None = None
    gold_column: str | None = None
    source: str | None = None
    split: str = "test"

    def score(
        self, texts: Sequence[str], golds: Sequence[str], marker: str
    ) -> dict[str, float | int]:
        """Share of texts whose stated answer is right, and share that state one at all."""
        answers = [self.parse(text, marker) for text in texts]
        right = sum(self.right(answer, gold) for answer, gold in zip(answers, golds, strict=True))
        answered = sum(answer is not None for answer in answers)
        rows = max(len(texts), 1)
        return {"exact_match": right / rows, "answered": answered / rows, "rows": len(texts)}


def column_text(row: Row, column: str, marker: str = "") -> str:
    """The cell of the right answer as text, whatever the marker.

    Raises:
        InputError: the row has no such column.

    Example:
        >>> column_text({"answer": 4}, "answer")
        '4'
    """
    del marker
    if column not in row:
        raise InputError(
            f"eval.gold_column: expected the column {column!r} in the validation rows, got "
            f"{', '.join(map(str, row))}. Name the column of the right answer."
        )
    return str(row[column])
