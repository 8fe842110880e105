r"""The grader of the BA-LoRA authors, which is PiSSA's and, before that, MetaMath's.

**Source:** ``utils/test_acc.py`` of the public code (llm172/BA-LoRA at 2829797, and
``inference/acc_gsm8k.py`` and ``acc_math.py`` of GraphPKU/PiSSA; ``eval_gsm8k.py`` and
``eval_math.py`` of meta-math/MetaMath). Its ``inference/gsm8k_inference.py`` also takes a hundredth
and a hundredfold of the right number; its script of the published pipeline does not, nor does this.
"""

import re

from balora_jax.evals.graders.hendrycks import is_equiv
from balora_jax.evals.grading import Grader

_NUMBER = re.compile(r"[-+]?\d*[.,/]?\d+")


def read_whole_number(text: str, marker: str) -> str | None:
    """The first number behind the last marker and a space, rounded to a whole one.

    A half goes to the even neighbour. One separator at most is read: ``1,450,000`` is 1450.

    >>> read_whole_number("The answer is: 18.4", "The answer is:")
    '18'
    >>> read_whole_number("The answer is: $1,450,000", "The answer is:")
    '1450'
    """
    _, found, after = text.rpartition(f"{marker} ")
    match = _NUMBER.search(after) if found else None
    if match is None:
        return None
    top, slash, bottom = match[0].replace(",", "").partition("/")
    if slash and not top.lstrip("+-"):
        return None
    try:
        return str(round(float(top) / float(1 if bottom.strip("0") == "" else bottom)))
    except OverflowError:  # infinite
        return None


def same_number(answer: str | None, gold: str) -> bool:
    """Whether a whole number is the gold one, as floats.

    >>> same_number("1450", "1,450"), same_number("18", "18.4")
    (True, False)
    """
    try:
        return answer is not None and float(answer) == float(gold.replace(",", ""))
    except ValueError:
        return False


def read_text(text: str, marker: str) -> str | None:
    r"""What follows the last marker and a space, up to a full stop at a line's end.

    >>> read_text("The answer is: \\frac{1}{2}.\nMore", "The answer is:")
    '\\frac{1}{2}'
    """
    _, found, after = text.rpartition(f"{marker} ")
    answer = after.split(".\n")[0].strip()
    return answer.removesuffix(".").strip() if found else None


def same_text(answer: str | None, gold: str) -> bool:
    r"""Whether an answer is the gold one by `hendrycks.is_equiv`.

    >>> same_text("0.5", r"\frac{1}{2}"), same_text(None, "1")
    (True, False)
    """
    return answer is not None and is_equiv(answer, gold)


NUMBERS = Grader("authors", read_whole_number, same_number)
MATHEMATICS = Grader("authors", read_text, same_text)
