"""A benchmark: rows with right answers, and how what a model says about them is scored."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, NamedTuple

from balora_jax.errors import InputError
from balora_jax.evals.grading import OURS, Grader, check_ours, ours
from balora_jax.evals.judge import Judge

Row = Mapping[str, Any]

RATES = ("exact_match", "answered")
"""Figures of a score of texts that say how good it is: shares of the rows."""


class Verdict(NamedTuple):
    """What is made of one text.

    Attributes:
        answer: that it states; None where it states none.
        right: whether that is the right one.
    """

    answer: str | None
    right: bool


class Judged(NamedTuple):
    """What is made of all texts.

    Attributes:
        figures: of the whole.
        verdicts: of each text; none of a benchmark that says no more than its figures.
    """

    figures: dict[str, Any]
    verdicts: list[Verdict]


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
        parse: ``(text, marker)`` → the answer that a text states, None where it states none; our
            reader where not given.
        right: ``(answer, gold)`` → whether an answer is the right one; our comparison of numbers
            and mathematics where not given.
        graders: those of others that fit its answers, which ``eval.grader`` may name.
        question: row → the text of the question; None where it is a column as it stands.
        prompt_column, gold_column: of its own rows; those of the training data where not given.
        source, split: of its own rows, which ``data.validation`` replaces.

    Example:
        >>> last = TextBenchmark(
        ...     name="last_word",
        ...     gold=column_text,
        ...     parse=lambda text, marker: text.split()[-1],
        ...     right=lambda answer, gold: answer == gold,
        ... )
        >>> last.score(["it is 4", "so 5"], ["4", "6"], marker="")
        {'exact_match': 0.5, 'answered': 1.0, 'rows': 2, 'grader': 'last_word', 'undecided': 0}
    """

    task: str | None = "text"
    gold: Callable[[Row, str, str], str]
    parse: Callable[[str, str], str | None] | None = None
    right: Callable[[str | None, str], bool] | None = None
    graders: Sequence[Grader] = ()
    question: Callable[[Row], str] | None = None
    prompt_column: str | None = None
    gold_column: str | None = None
    source: str | None = None
    split: str = "test"

    def check_grader(self, name: str) -> None:
        """Raises InputError where the grader of this name does not fit, or is not installed."""
        known = [*(OURS if self.right is None else OURS[:1]), *(g.name for g in self.graders)]
        if name not in known:
            raise InputError(
                f"eval.grader: expected one of {', '.join(known)} with eval.task {self.name}, got "
                f"{name}. Choose one of them, or another benchmark."
            )
        if self.right is None:
            check_ours(name)

    def score(
        self, texts: Sequence[str], golds: Sequence[str], marker: str, grader: str = "auto"
    ) -> dict[str, Any]:
        """Share of texts whose stated answer is right, and share that state one at all.

        Returns:
            ``exact_match`` and ``answered`` in [0, 1]; ``rows``; ``grader``, the name of the one
            that judged (plain also where math-verify does not start); ``undecided``, pairs on
            which its algebra came to no end, and which count as wrong.

        Raises:
            InputError: a grader that does not fit, or is not installed.
        """
        return self._judged(texts, golds, marker, grader).figures

    def judged(
        self, texts: Sequence[str], golds: Sequence[str], marker: str, grader: str = "auto"
    ) -> Judged:
        """The figures of :meth:`score`, and what is made of each text.

        A subclass that has figures of its own has no verdicts, unless it has a ``judged`` as well.
        """
        if type(self).score is not TextBenchmark.score:
            return Judged(self.score(texts, golds, marker, grader), [])
        return self._judged(texts, golds, marker, grader)

    def _judged(
        self, texts: Sequence[str], golds: Sequence[str], marker: str, grader: str
    ) -> Judged:
        self.check_grader(grader)
        others = {g.name: g for g in self.graders}
        if grader in others:
            return _judged_by(others[grader], texts, golds, marker)
        with Judge() as judge:
            found = ours(grader, judge)
            if self.right is not None:
                found = Grader(self.name, found.read, self.right)
            found = replace(found, read=self.parse or found.read)
            figures, verdicts = _judged_by(found, texts, golds, marker)
            if judge.failed:  # it proved nothing
                figures["grader"] = "plain"
            return Judged(figures | {"undecided": judge.undecided}, verdicts)


def _judged_by(grader: Grader, texts: Sequence[str], golds: Sequence[str], marker: str) -> Judged:
    answers = [grader.read(text, marker) for text in texts]
    pairs = zip(answers, golds, strict=True)
    verdicts = [Verdict(answer, bool(grader.right(answer, gold))) for answer, gold in pairs]
    rows = max(len(texts), 1)
    figures = {
        "exact_match": sum(verdict.right for verdict in verdicts) / rows,
        "answered": sum(verdict.answer is not None for verdict in verdicts) / rows,
        "rows": len(texts),
        "grader": grader.name,
        "undecided": 0,
    }
    return Judged(figures, verdicts)


def column_text(row: Row, column: str, marker: str = "") -> str:
    """The cell of the right answer as text, whatever the marker.

    A float with a whole value is that whole number, and no float has an exponent.

    Raises:
        InputError: the row has no such column, or nothing in it.

    Example:
        >>> column_text({"answer": 4}, "answer"), column_text({"answer": 2125904.0}, "answer")
        ('4', '2125904')
    """
    del marker
    if column not in row:
        raise InputError(
            f"eval.gold_column: expected the column {column!r} in the validation rows, got "
            f"{', '.join(map(str, row))}. Name the column of the right answer."
        )
    cell = row[column]
    endless = isinstance(cell, float) and not math.isfinite(cell)
    if cell is None or endless or isinstance(cell, list | dict) or not str(cell).strip():
        got = "null" if cell is None else repr(cell)[:40]
        raise InputError(
            f"eval.gold_column: expected a right answer in {column!r}, got {got}. Fill it in, or "
            "drop the row."
        )
    if isinstance(cell, float):
        text = format(Decimal(repr(cell)), "f")
        return text.rstrip("0").rstrip(".") if "." in text else text
    return str(cell)


def golds_of(benchmark: TextBenchmark, rows: Sequence[Row], column: str, marker: str) -> list[str]:
    """The right answer of every row.

    Raises:
        InputError: a row that has none, by its number, counted from 1.
    """
    golds = []
    for number, row in enumerate(rows, start=1):
        try:
            golds.append(benchmark.gold(row, column, marker))
        except InputError as error:
            raise InputError(f"{place(number)}: {error}") from error
    return golds


def place(number: int) -> str:
    """What a row is called in a message.

    >>> place(3)
    'row 3 of the validation rows'
    """
    return f"row {number} of the validation rows"
