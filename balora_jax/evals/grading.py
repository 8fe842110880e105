"""A grader: how an answer is read from a text, and when it is the right one."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from balora_jax.errors import InputError
from balora_jax.evals.answers import read_answer
from balora_jax.evals.equality import exact_match
from balora_jax.evals.judge import Judge, has_math_verify


@dataclass(frozen=True)
class Grader:
    """Rule that says which texts are right.

    Attributes:
        name: of it in figures, and where ``eval.grader`` names it.
        read: ``(text, marker)`` → the answer that a text states; None where it states none.
        right: ``(answer, gold)`` → whether an answer is the right one.
        reads_marker: whether ``read`` looks at the marker.
    """

    name: str
    read: Callable[[str, str], str | None]
    right: Callable[[str | None, str], bool]
    reads_marker: bool = True


OURS = ("auto", "math_verify", "plain")
"""Values of ``eval.grader`` for benchmarks that compare numbers and mathematics in our way."""


def check_ours(name: str) -> None:
    """Raises InputError where math-verify is asked for and does not start."""
    if name != "math_verify":
        return
    with Judge() as judge:
        if not has_math_verify() or not judge.start():
            raise InputError(
                "eval.grader: expected the package math-verify with math_verify, got none that "
                "starts. Install it with pip install '.[eval]', or take auto or plain."
            )


def ours(name: str, judge: Judge) -> Grader:
    """Our grader, as ``eval.grader`` asks for it."""
    if name == "plain" or not has_math_verify():
        return Grader("plain", read_answer, exact_match)
    return Grader("math_verify", read_answer, partial(exact_match, prove=judge))
