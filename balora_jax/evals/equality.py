r"""Whether two answers are the same: as numbers, as texts, part by part, or proven by algebra."""

import re
from collections.abc import Callable
from fractions import Fraction

from balora_jax.evals.answers import bare_answer
from balora_jax.evals.mathematics import RELATION, Parts, normalise_math, parts_of
from balora_jax.evals.numbers import parse_number, units_of

Proof = Callable[[str, str], bool]
"""``(prediction, gold)`` in LaTeX → whether they are the same expression."""

_FUNCTIONS = (
    "sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|log|ln|exp|min|max|gcd|lcm|mod"
)
_FEW_LEVELS = 20


def exact_match(prediction: str | None, gold: str, prove: Proof | None = None) -> bool:
    r"""Whether the predicted answer is the gold one.

    Two numbers are right where their values are equal (``\frac{3}{4}`` and ``0.75`` are; ``0.333``
    and ``1/3`` are not). All else is right where it is the same after `normalise_math`, part by
    part: a tuple and an interval in their order, a list and a set in any. What is left is asked of
    ``prove``. Two different units of measure are never right; one that only one side names is
    not looked at, and neither is ``%``.

    Args:
        prediction: An answer, as `read_answer` gives it, or None, which is never right.
        gold: The gold answer.
        prove: Decides what is no number and no text; without it such answers are wrong.

    >>> exact_match("$1,000", "1000.0"), exact_match(r"\dfrac{1}{2}", "0.5"), exact_match(None, "1")
    (True, True, False)
    >>> exact_match("2, 1", "1, 2"), exact_match("(2, 1)", "(1, 2)"), exact_match("5 m", "5 cm")
    (True, False, False)
    """
    if prediction is None:
        return False
    ours, right = bare_answer(prediction), bare_answer(gold)
    units = units_of(ours), units_of(right)
    if all(units) and not units[0] & units[1]:
        return False
    return _same(ours, right, prove, _FEW_LEVELS)


def _same(ours: str, right: str, prove: Proof | None, levels: int) -> bool:
    values = _value(ours), _value(right)
    if None not in values:
        return values[0] == values[1]
    ours, right = _told(normalise_math(ours), normalise_math(right))
    if ours == right:
        return ours != ""
    if _is_text(ours) or _is_text(right):
        return _folded(ours) == _folded(right) != ""
    parts = parts_of(ours), parts_of(right)
    if all(len(p.elements) == 1 and not p.brackets for p in parts):
        ours, right = (p.elements[0] for p in parts)
        return ours == right or _proven(ours, right, prove)
    if levels and _alike(*parts):
        return _same_parts(*parts, lambda a, b: _same(a, b, prove, levels - 1))
    return _is_range(parts[0], right) and _proven(ours, right, prove)


def _alike(ours: Parts, right: Parts) -> bool:
    same_kind = ours.brackets == right.brackets or not (ours.ordered or right.ordered)
    return same_kind and len(ours.elements) == len(right.elements)


def _same_parts(ours: Parts, right: Parts, same: Callable[[str, str], bool]) -> bool:
    if ours.ordered:
        return all(map(same, ours.elements, right.elements))
    left = list(right.elements)
    for element in ours.elements:
        found = next((i for i, other in enumerate(left) if same(element, other)), None)
        if found is None:
            return False
        del left[found]
    return True


def _is_range(ours: Parts, right: str) -> bool:
    r"""Whether an interval stands against a relation, as ``(3,\infty)`` against ``x>3``."""
    return ours.ordered and len(ours.elements) == 2 and RELATION.search(right) is not None


def _value(text: str) -> Fraction | None:
    """The value of a number as text or as LaTeX writes it."""
    for spelling in (text, normalise_math(text)):
        spelling = re.sub(r"(\d)\s*\\[dt]?frac", r"\1 \\frac", spelling)
        value = parse_number(re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", spelling))
        if value is not None:
            return value
    return None


_NAME = re.compile(
    r"(?P<name>[a-zA-Z]{1,2}(?:_\{?\w+\}?)?|\\[a-z]+|[a-zA-Z]\([a-zA-Z,]*\))(?:=|\\in(?![a-zA-Z]))"
)
_EQUATES = re.compile(r"=|\\in(?![a-zA-Z])")
_SUM = re.compile(r"[-+*/().^\d\s×·{}]*(?:\\(?:times|cdot|div|frac)[-+*/().^\d\s×·{}]*)*")


def _told(ours: str, right: str) -> tuple[str, str]:
    """Two answers without the name, or the sum, that one of them sets in front of ``=``."""
    return _without_front(ours, right), _without_front(right, ours)


def _without_front(text: str, other: str) -> str:
    if _EQUATES.search(other):
        return text
    name = _NAME.match(text)
    if name and not _EQUATES.search(text, name.end()):
        return text[name.end() :]
    before, found, behind = text.rpartition("=")
    sums = all(_SUM.fullmatch(part) and part for part in before.split("="))
    return behind if found and sums else text


def _is_text(text: str) -> bool:
    """Whether a text has words, a time, a base or a range, of which algebra would make products."""
    text = re.sub(r"\\(?:begin|end)\{\w+\}", "", text)
    if re.search(rf"(?<![\\a-zA-Z])(?!(?:{_FUNCTIONS})(?![a-z]))[^\W\d_]{{3,}}", text):
        return True
    if re.search(r"\d:\d|\d_\{?\d|(?<!_)\d \d|[?#@]", text):
        return True
    return re.fullmatch(r"\d+-\d+|[^\W\d_]{2}", text) is not None


def _folded(text: str) -> str:
    """A text whose case, where it has words, does not matter."""
    return text.lower() if re.search(r"[^\W\d_]{2}", text) else text


def _proven(ours: str, right: str, prove: Proof | None) -> bool:
    return prove is not None and _may_be_same(ours, right) and prove(ours, right)


_COMMAND = re.compile(r"\\(?!(?:pi|theta|alpha|beta|gamma|phi|omega|infty)(?![a-zA-Z]))[a-zA-Z]+")
_SLIP = re.compile(r"[a-zA-Z)}\]]\d|[-+*/^=<>_,(\[{]\Z|\A[*/^=<>_,)\]}]|[+*/^=]{2}")


def _may_be_same(ours: str, right: str) -> bool:
    """Whether algebra has a say: small texts of one kind, in the same letters."""
    if bool(_EQUATES.search(ours)) != bool(_EQUATES.search(right)):
        return False
    both = f"{ours} {right}"
    # Slips are a number behind a letter or a bracket, a sign with nothing on one side, and an
    # infinity that belongs to a set.
    if re.search(r"\[-?\\infty|\\infty\]", both):
        return False
    if any(_SLIP.search(_COMMAND.sub(" ", text)) for text in (ours, right)):
        return False
    digits = max(map(len, re.findall(r"\d+", both)), default=0)
    powers = [len(run) for pair in re.findall(r"\^\{?[-+]?(\d+)|(\d+)!", both) for run in pair]
    if len(ours) > 200 or len(right) > 200 or digits > 30 or max(powers, default=0) > 3:
        return False
    commands = r"\\(?:begin|end)\{\w+\}|\\[a-zA-Z]+"
    letters = [set(re.sub(commands, "", text)) for text in (ours, right)]
    other_case = {letter.swapcase() for letter in letters[0] - letters[1] if letter.isalpha()}
    return not other_case & (letters[1] - letters[0])


def fractions_for_decimals(text: str) -> str:
    r"""LaTeX in which no decimal is left, so that nothing is rounded.

    >>> fractions_for_decimals("2.5x+.05")
    '\\frac{25}{10}x+\\frac{5}{100}'
    """

    def fraction(match: re.Match[str]) -> str:
        digits = match[2]
        return rf"\frac{{{int(match[1] + digits)}}}{{1{'0' * len(digits)}}}"

    return re.sub(r"(\d*)\.(\d+)", fraction, text)
