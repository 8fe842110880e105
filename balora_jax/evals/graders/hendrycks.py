r"""The equality of strings that the MATH data set came with, and everybody's grader since.

**Source:** ``is_equiv`` and ``_strip_string`` of Hendrycks et al. 2021 (hendrycks/math,
``math_equivalence.py``), which MetaMath's and the authors' ``test_acc.py``, and lm-eval's
``hendrycks_math``, repeat. The rules here are our own words for what that code does, its oddities
included: where one of its rules fails, it compares the two texts as they are.
"""

import re

_REMOVED = (r"\left", r"\right", r"^{\circ}", r"^\circ", r"\$")


def is_equiv(prediction: str, gold: str) -> bool:
    r"""Whether two answers are one string after the usual normalisation.

    >>> is_equiv(r"\dfrac12", "0.5"), is_equiv("0.50", "0.5"), is_equiv("3 feet", "3")
    (True, False, False)
    """
    try:
        return stripped(prediction) == stripped(gold)
    except ValueError:
        return prediction == gold


def stripped(text: str) -> str:
    r"""An answer in the spelling of that code.

    Raises:
        ValueError: a rule of it fails, as on ``x/2``, whose parts are no whole numbers.

    >>> stripped(r"x = \tfrac{3}{4}\text{ cm}")
    '\\frac{3}{4}'
    """
    text = text.replace("\n", "").replace(r"\!", "").replace(r"\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac")
    for sign in _REMOVED:
        text = text.replace(sign, "")
    text = _without_unit(text).replace(r"\%", "")
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    text = f"0{text}" if text.startswith(".") else text
    name, *values = text.split("=")
    text = values[0] if len(values) == 1 and len(name) <= 2 else text
    text = _braced_fractions(_braced_roots(text).replace(" ", ""))
    return r"\frac{1}{2}" if text == "0.5" else _fraction_of_slash(text)


def _without_unit(text: str) -> str:
    before, *units = text.split(r"\text{ ")
    if len(units) > 1:
        raise ValueError("two units")
    return before


def _braced_roots(text: str) -> str:
    before, *roots = text.split(r"\sqrt")
    if not all(roots):
        raise ValueError("a root of nothing")
    return before + "".join(
        rf"\sqrt{root}" if root[0] == "{" else rf"\sqrt{{{root[0]}}}{root[1:]}" for root in roots
    )


def _braced_fractions(text: str) -> str:
    before, *fractions = text.split(r"\frac")
    for fraction in fractions:
        if not fraction:
            raise ValueError("a fraction of nothing")
        if fraction[0] == "{":
            before += rf"\frac{fraction}"
        elif len(fraction) < 2:
            return text
        else:
            bottom = fraction[1:] if fraction[1] == "{" else f"{{{fraction[1]}}}{fraction[2:]}"
            before += rf"\frac{{{fraction[0]}}}{bottom}"
    return before


def _fraction_of_slash(text: str) -> str:
    halves = text.split("/")
    if len(halves) != 2:
        return text
    top, bottom = map(int, halves)
    return rf"\frac{{{top}}}{{{bottom}}}" if text == f"{top}/{bottom}" else text


def boxed(solution: str) -> str | None:
    r"""What stands in the last ``\boxed{}`` by the rules of lm-eval's copy of that code.

    >>> boxed(r"so $\boxed{\frac{1}{2}}$."), boxed("none")
    ('\\frac{1}{2}', None)
    """
    if r"\boxed " in solution:
        return solution.rpartition(r"\boxed ")[2].split("$")[0]
    start = solution.rfind(r"\boxed")
    start = solution.rfind(r"\fbox") if start < 0 else start
    if start < 0:
        return None
    depth = 0
    for brace in re.finditer(r"[{}]", solution[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            whole = solution[start : start + brace.end()]
            return whole[len(r"\boxed{") : -1] if whole.startswith(r"\boxed{") else None
    return None
