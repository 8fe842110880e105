r"""The answer that a text gives, and whether it is the right one.

Numbers are compared as exact fractions, never as floats. A text that is not plainly one number has
no value here (``3 to 4``, ``2x``, ``1,23``) and is compared as text.
"""

import re
from fractions import Fraction

ANSWER_MARKER = "The answer is:"
GSM8K_MARKER = "####"

_TYPOGRAPHY = str.maketrans({"−": "-", "–": "-", "－": "-", "\u00a0": " ", "\u202f": " "})
_DIGITS = r"(?:[1-9]\d{0,2}(?:,\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    rf"""
    (?P<sign>[+-]?) \s* (?:\\?\$|€|£)? \s* (?P<inner_sign>[+-]?)
    (?:(?P<whole>\d+)\ +(?=\d+\s*/\s*\d))?          # the 1 of "1 1/2"
    (?P<top>{_DIGITS}) (?:\s*/\s*(?P<bottom>{_DIGITS}))?
    (?P<rest>.*)
    """,
    re.VERBOSE | re.DOTALL | re.ASCII,
)
# Longer than any answer; Python refuses to read integers of some thousand digits.
_MOST_CHARACTERS = 1000
# After the number: a percent sign, a unit glued to it, words apart from it, an end of sentence.
_GLUED_UNITS = "km|cm|mm|kg|mg|ml|mL|lbs?|oz|ft|mph|kmh|hrs?|mins?|am|pm|AM|PM"
_WORD = r"(?:[^\W\d_]{2,}\.?|[gmshL]\b)"
_REST = re.compile(
    rf"(?:\s*\\?%|\s*\$|(?:{_GLUED_UNITS})\b)?(?P<words>(?:(?:\s+|(?<=[^\W\d_])[/-]){_WORD})*)\s*[.,;]?"
)
# Words that change a number's value: reading past them would be a guess.
_NOT_UNITS = frozenset(
    {
        "hundred",
        "thousand",
        "million",
        "billion",
        "trillion",
        "dozen",
        "dozens",
        "score",
        "half",
        "halves",
        "third",
        "thirds",
        "quarter",
        "quarters",
        "fourths",
        "fifths",
        "pi",
        "sqrt",
        "sin",
        "cos",
        "tan",
        "log",
        "ln",
        "exp",
        "or",
        "and",
        "to",
        "plus",
        "minus",
        "times",
        "over",
        "by",
        "mod",
        "squared",
        "cubed",
    }
)


def extract_answer(text: str, marker: str = ANSWER_MARKER) -> str | None:
    """The answer that a generated text states: what follows the last marker, up to its line's end.

    Args:
        text: The generated text.
        marker: What announces the answer.

    Returns:
        The answer without spaces around it. None if there is no marker, or nothing after it: the
        last number of such a text is not taken for its answer.

    >>> extract_answer("2 + 2 is 4. The answer is: 4")
    '4'
    >>> extract_answer("It is 4.") is None
    True

    **Source:** the answers of MetaMathQA end in this marker. Departure: no fallback to the last
    number of the text.
    """
    _, found, after = text.rpartition(marker)
    lines = after.strip().splitlines()
    return lines[0].strip() if found and lines else None


def parse_number(text: str) -> Fraction | None:
    r"""The exact value of a text that is one number, else None.

    Understood: thousands separators in their places, decimals, ``3/4``, ``1 1/2``, signs (the
    Unicode minus too), currency signs, ``%`` (a unit: ``50%`` is 50), a full stop at the end, and
    units after the number. A word that changes the value (``million``, ``dozen``), a letter right
    behind the digits (``2x``) and a second number make it None.

    >>> parse_number("$1,234.50 per month."), parse_number("−3/4"), parse_number("1,23")
    (Fraction(2469, 2), Fraction(-3, 4), None)
    """
    text = text.translate(_TYPOGRAPHY).strip()
    if len(text) > 1 and text[0] == text[-1] == "$":
        text = text[1:-1].strip()
    match = _NUMBER.fullmatch(text)
    if len(text) > _MOST_CHARACTERS or match is None or (match["sign"] and match["inner_sign"]):
        return None
    rest = _REST.fullmatch(match["rest"])
    if rest is None or _NOT_UNITS & set(re.split(r"[^a-z]+", rest["words"].lower())):
        return None
    value = _fraction(match["top"])
    if match["bottom"] is not None:
        bottom = _fraction(match["bottom"])
        if bottom == 0:
            return None
        value /= bottom
    value += int(match["whole"] or 0)
    return -value if "-" in (match["sign"], match["inner_sign"]) else value


def _fraction(digits: str) -> Fraction:
    return Fraction(digits.replace(",", "").rstrip("."))


def exact_match(prediction: str | None, gold: str) -> bool:
    r"""Whether the predicted answer is the gold one.

    Equal values if both are numbers (``\frac{3}{4}`` and ``0.75`` are), else equal texts after
    `normalise_math`. No prediction is never right.

    Args:
        prediction: An answer, as `extract_answer` or `last_boxed` gives it, or None.
        gold: The gold answer.

    >>> exact_match("$1,000", "1000.0"), exact_match(r"\dfrac{1}{2}", "0.5"), exact_match(None, "1")
    (True, True, False)
    """
    if prediction is None:
        return False
    values = _math_value(prediction), _math_value(gold)
    if values[0] is not None and values[1] is not None:
        return values[0] == values[1]
    normal = normalise_math(prediction)
    return normal != "" and normal == normalise_math(gold)


def _math_value(text: str) -> Fraction | None:
    """The value of a number as text or as LaTeX writes it."""
    plain = parse_number(text)
    if plain is not None:
        return plain
    normal = re.sub(r"(\d)\\frac", r"\1 \\frac", normalise_math(text))
    return parse_number(re.sub(r"\\frac\{(\d+)\}\{(\d+)\}", r"\1/\2", normal))


def last_boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}`` of a MATH solution, braces inside it included.

    ``\fbox`` counts as well, and ``\boxed 5`` gives what stands before the next space or ``$``.
    None if there is none, or its braces never close.

    >>> last_boxed(r"so \boxed{1}, or rather $\boxed{\frac{1}{2}}$.")
    '\\frac{1}{2}'
    """
    start = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))
    if start < 0:
        return None
    after = re.sub(r"\A\\[a-z]+\s*", "", text[start:])
    if not after.startswith("{"):
        bare = re.match(r"[^\s$]+", after)
        return bare[0] if bare else None
    depth = 0
    # An escaped brace is a sign of the text, not of its structure.
    for brace in re.finditer(r"\\.|[{}]", after, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return after[1 : brace.start()].strip()
    return None


_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\[!,;:> ]|\\q?quad(?![a-zA-Z])|~", " "),
        (r"\{,\}", ","),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])\.?", ""),
        (r"\^\{?\\circ\}?|\\degree\b|°", ""),
        (r"\\?\$|\\?%|\\[()\[\]]", ""),
        (r"\\(?:geq|leq|neq)\b", lambda m: m[0][:-1]),
        # A unit after the answer goes; text that is the answer loses its wrapping only.
        (r"(?<=[^\s{,(])\s*\\(?:text|mbox|mathrm|textrm)\{[^{}]*\}(?:\^\{?\d\}?)?\s*\.?$", ""),
        (r"\\(?:text|mbox|mathrm|mathbf|textbf|textrm|textit)\{([^{}]*)\}", r"\1"),
        (r"^\s*[a-zA-Z]{1,2}\s*=\s*(?=[^=]+$)", ""),
        (r"(?<![\d,.])\.(?=\d)", "0."),
        (r"\\sqrt\s*(\w)", r"\\sqrt{\1}"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
        (r"(\\frac\{[^{}]*\})\s*(\d)", r"\1{\2}"),
        (r"([_^])\{(\w)\}", r"\1\2"),
        # Between two digits a space is kept: "1 2" is not 12.
        (r"(?<!\d)\s+|\s+(?!\d)", ""),
        (r"(?<=\d)\s+(?=\d)", " "),
        (r"^(-?)(\d+)/(\d+)$", r"\1\\frac{\2}{\3}"),
        (r"\.+$", ""),
    )
)


def normalise_math(text: str) -> str:
    r"""One spelling for the ways in which MATH answers are written.

    ``\dfrac`` and ``1/2`` become ``\frac{1}{2}``; ``\left``, ``\right``, spacing, degrees, ``\$``,
    ``\%``, a leading ``x =``, a unit in ``\text`` and a full stop at the end go; thousands
    separators go where the whole is one number.

    >>> normalise_math(r"x = \dfrac12 \text{ cm}^2"), normalise_math(r"\left( 3, \pi \right)")
    ('\\frac{1}{2}', '(3,\\pi)')

    **Source:** the normalisation usual for MATH, in rules of our own. Departures: spaces between
    two digits stay, and a text is not cut at its first unit.
    """
    text = " ".join(text.translate(_TYPOGRAPHY).split())
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    if re.fullmatch(r"-?[1-9]\d{0,2}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    return text
