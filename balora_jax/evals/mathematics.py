r"""One spelling for mathematics, and the parts of a list, a tuple, an interval or a set."""

import re
from typing import NamedTuple

from balora_jax.evals.numbers import TYPOGRAPHY

RELATION = re.compile(r"[<>≤≥≠]|\\(?:[lg]e?q?|[lg]t|neq?)(?![a-zA-Z])")
"""Signs that set one thing beside another; ``=`` is not among them."""

_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<!\\)\\[!,;:> ]|\\q?quad(?![a-zA-Z])|~", " "),
        (r"\{,\}", ","),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])\.?", ""),
        (r"\^\{?\\circ\}?|\\degree\b|°", ""),
        (r"\\?\$|\\?%|\\[()\[\]]", ""),
        (r"\\(?:geq|leq|neq)\b", lambda m: m[0][:-1]),
        # A unit after the answer goes; text that is the answer loses its wrapping only.
        (r"(?<=[^\s{,(])\s*\\(?:text|mbox|mathrm|textrm)\{[^{}]*\}(?:\^\{?\d\}?)?\s*\.?$", ""),
        (r"\\(?:text|mbox|mathrm|mathbf|textbf|textrm|textit)\{([^{}]*)\}", r"\1"),
        (r"\b([ap])\.\s?m\b\.?", r"\1m"),
        (r"(?<![\d,.])\.(?=\d)", "0."),
        (r"\\sqrt\s*(\w)", r"\\sqrt{\1}"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
        (r"(\\frac\{[^{}]*\})\s*(\d)", r"\1{\2}"),
        (r"\\frac\{\s*-\s*(\d+)\s*\}\{\s*-\s*(\d+)\s*\}", r"\\frac{\1}{\2}"),
        (r"\\frac\{\s*-\s*(\d+)\s*\}\{\s*(\d+)\s*\}", r"-\\frac{\1}{\2}"),
        (r"\\frac\{\s*(\d+)\s*\}\{\s*-\s*(\d+)\s*\}", r"-\\frac{\1}{\2}"),
        (r"^\s*-\s*-", ""),
        (r"([_^])\{(\w)\}", r"\1\2"),
        # Between two digits a space is kept, and behind a command: "1 2" is not 12, nor "\\sin x"
        # a command of its own.
        (r"(\\[a-zA-Z]+)\s+(?=[a-zA-Z])", "\\1\0"),
        (r"(?<!\d)\s+|\s+(?!\d)", ""),
        (r"(?<=\d)\s+(?=\d)|\0", " "),
        (r"^(-?)(\d+)/(\d+)$", r"\1\\frac{\2}{\3}"),
        (r"\.+$", ""),
    )
)
_BETWEEN = re.compile(r"\s*,?\s*(?:\\(?:text|mbox)\{\s*(?:and|or)\s*\}|\b(?:and|or)\b)\s*")


def normalise_math(text: str) -> str:
    r"""One spelling for the ways in which MATH answers are written.

    ``\dfrac`` and ``1/2`` become ``\frac{1}{2}``, and its sign stands in front; ``\left``,
    ``\right``, spacing, degrees, ``\$``, ``\%``, a unit in ``\text`` and a full stop at the end go;
    ``and`` and ``or`` between two answers are commas; thousands separators go where the whole is
    one number.

    >>> normalise_math(r"\dfrac12 \text{ cm}^2"), normalise_math(r"\left( 3, \pi \right)")
    ('\\frac{1}{2}', '(3,\\pi)')

    **Source:** the normalisation usual for MATH, in rules of our own. Departures: spaces between
    two digits stay, a leading ``x =`` too, and a text is not cut at its first unit.
    """
    text = " ".join(text.translate(TYPOGRAPHY).split())
    if not RELATION.search(text):  # there "and" is another thing than "or"
        text = _BETWEEN.sub(",", text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    if re.fullmatch(r"-?[1-9]\d{0,2}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    return text


class Parts(NamedTuple):
    """What stands between the commas of an answer.

    Attributes:
        brackets: those around all of it, as ``()``, ``[)`` or ``{}`` of a set; empty without any;
            of a matrix its name and the lengths of its rows.
        elements: at least one.
    """

    brackets: str
    elements: tuple[str, ...]

    @property
    def ordered(self) -> bool:
        """Whether the elements have their places: a tuple or an interval, no list and no set."""
        return self.brackets not in ("", "{}")


_MATRIX = re.compile(
    r"\\begin\{(?P<name>[a-zA-Z]*matrix)\}(?P<inside>.*)\\end\{(?P=name)\}", re.DOTALL
)
_BRACKET = re.compile(r"\\begin\{|\\end\{|\\[{}]|\\.|[()\[\]{},]", re.DOTALL)
# How many levels each opens. The brace behind the name of an environment closes as well.
_LEVELS = {
    "(": 1,
    "[": 1,
    "{": 1,
    r"\{": 1,
    r"\begin{": 2,
    ")": -1,
    "]": -1,
    "}": -1,
    r"\}": -1,
    r"\end{": 0,
}


def parts_of(text: str) -> Parts:
    r"""The parts of a text in the spelling of `normalise_math`.

    One in round brackets loses them; of a set and of a list, ``\pm`` makes two elements.

    >>> parts_of("(1,2]"), parts_of(r"\{a,b\}").brackets, parts_of(r"1\pm\sqrt{2}").elements
    (Parts(brackets='(]', elements=('1', '2')), '{}', ('1+\\sqrt{2}', '1-\\sqrt{2}'))
    """
    matrix = _MATRIX.fullmatch(text)
    if matrix is not None and matrix["inside"].count(r"\begin") == 0:
        rows = [row.split("&") for row in re.split(r"\\\\", matrix["inside"]) if row]
        name = matrix["name"].replace("bmatrix", "pmatrix")
        shape = f"{name} {'x'.join(str(len(row)) for row in rows)}"
        return Parts(shape, tuple(element for row in rows for element in row))
    brackets, inside = _unwrapped(text)
    elements = tuple(_split(inside))
    if len(elements) == 1 and brackets in ("()", "gg"):
        return parts_of(inside)
    if brackets == "gg":
        brackets = ""
    if brackets in ("", "{}"):
        elements = tuple(side for element in elements for side in _both_signs(element))
    return Parts(brackets, elements)


def _unwrapped(text: str) -> tuple[str, str]:
    """The brackets around all of a text (``gg``: a group of LaTeX's), and what is inside."""
    depth, marks = 0, list(_BRACKET.finditer(text))
    if not marks or marks[0].start() != 0 or marks[0][0] not in ("(", "[", "{", r"\{"):
        return "", text
    for mark in marks:
        depth += _LEVELS.get(mark[0], 0)
        if depth == 0:
            if mark.end() != len(text):
                break
            names = {"{": "g", r"\{": "{", "}": "g", r"\}": "}"}
            brackets = "".join(names.get(m[0], m[0]) for m in (marks[0], mark))
            return brackets, text[marks[0].end() : mark.start()]
    return "", text


def _split(text: str) -> list[str]:
    """A text at its commas outside of brackets."""
    depth, start, found = 0, 0, []
    for mark in _BRACKET.finditer(text):
        if mark[0] == "," and depth == 0:
            found.append(text[start : mark.start()])
            start = mark.end()
        depth += _LEVELS.get(mark[0], 0)
    return [*found, text[start:]]


def _both_signs(text: str) -> tuple[str, ...]:
    if text.count(r"\pm") != 1:
        return (text,)
    before, _, behind = text.partition(r"\pm")
    return (f"{before}+{behind}" if before else behind, f"{before}-{behind}")
