r"""The answer that a text states: one reader for what a model says and for what is right.

The order is that of `read_answer`: the marker, ``####``, the last ``\boxed{}``, and a text that is
nothing but an answer.
"""

import re

from balora_jax.evals.numbers import SIZES, TYPOGRAPHY, units_of

ANSWER_MARKER = "The answer is:"
GSM8K_MARKER = "####"
_MOST_CHARACTERS = 1000


def read_answer(text: str, marker: str = ANSWER_MARKER) -> str | None:
    r"""The answer that a text states, laid bare by `bare_answer`.

    The first of these that the text has: what follows the last marker; what follows the last
    ``####``; the content of the last ``\boxed{}``; the text itself where it is one line that is
    three words at most, or a number or mathematics with two words at most behind it.

    Args:
        text: A generated text, a reference solution, or a cell with an answer alone.
        marker: What announces the answer.

    Returns:
        The answer. None where the text states none: the last number of a longer text is not taken
        for its answer.

    >>> read_answer("2 + 2 is 4. The answer is: **4**."), read_answer("#### 1,010")
    ('4', '1,010')
    >>> read_answer(r"Hence $x = \boxed{\frac{1}{2}}$."), read_answer("It is 4.")
    ('\\frac{1}{2}', None)
    """
    for found in (
        extract_answer(text, marker),
        extract_answer(text, GSM8K_MARKER),
        last_boxed(text),
    ):
        if found and (answer := bare_answer(found)):
            return answer
    marked = marker in text or GSM8K_MARKER in text
    return None if marked else _alone(text)


def extract_answer(text: str, marker: str = ANSWER_MARKER) -> str | None:
    r"""What follows the last marker, up to the end of the first line that says something.

    A line goes on where a brace or an environment of LaTeX is still open at its end.

    Args:
        text: The generated text.
        marker: What announces the answer.

    Returns:
        The answer without spaces around it. None if there is no marker, or nothing after it.

    >>> extract_answer("2 + 2 is 4. The answer is: 4")
    '4'
    >>> extract_answer("The answer is:\n\\[\n5\n\\]\n")
    '5'

    **Source:** the answers of MetaMathQA end in this marker, those of GSM8K in ``####``.
    """
    _, found, after = text.rpartition(marker)
    if not found:
        return None
    said = ""
    for line in after.splitlines():
        if not said and not re.search(r"\w", line):
            continue
        said += f" {line.strip()}"
        if not _open(said):
            break
    return said.strip() or None


def _open(text: str) -> bool:
    """Whether a brace or an environment of a text is still open."""
    braces = re.sub(r"\\.", "", text)
    begun, ended = text.count(r"\begin{"), text.count(r"\end{")
    return begun > ended or braces.count("{") > braces.count("}")


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


_WRAPPINGS = tuple(
    (re.compile(pattern, re.DOTALL), r"\1")
    for pattern in (
        r"(?<![\w)}])\*\*(?=\S)(.+?)(?<=\S)\*\*(?!\w)",
        r"(?<![\w)}])__(?=\S)(.+?)(?<=\S)__(?!\w)",
        r"\A\*(?=[^\s*])([^*]+)\*\Z",
        r"\A`+([^`]+)`+\Z",
        r"(?<!\\)\$\$([^$]+)\$\$",
        r"(?<!\\)\$((?:\\\$|[^$])+?)(?<!\\)\$",
        r"\\\((.+?)\\\)",
        r"\\\[(.+?)\\\]",
    )
)
_REMARK = re.compile(
    r"(?P<answer>.*\S)\s+\((?P<remark>[^()\\]*[^\W\d_]{2}[^()\\]*|[%°$]|[gmshL])\)\Z", re.DOTALL
)
_SAYS_MORE = re.compile(rf"{SIZES.pattern}|\b(?:or|and|not|mod)\b", re.IGNORECASE)


def bare_answer(answer: str) -> str:
    r"""An answer without what is only around it.

    Bold and code marks, dollar signs and brackets of LaTeX's, a ``\boxed`` inside, a full stop at
    the end, and a remark in brackets behind it go. A remark that gives another answer, or a size
    (``72 (or 73)``, ``3 (million)``), stays; of one that is a unit the brackets go.

    >>> bare_answer("**72**."), bare_answer(r"$\boxed{72}$ eggs"), bare_answer("72 (8 times 9).")
    ('72', '72', '72')
    """
    answer = answer.translate(TYPOGRAPHY).strip()[:_MOST_CHARACTERS]
    boxed = last_boxed(answer)
    answer = answer if boxed is None else boxed
    answer = re.sub(r"\A#+\s*", "", answer)
    for pattern, inside in _WRAPPINGS:
        answer = pattern.sub(inside, answer)
    # What is left of a bracket whose other half stands on another line.
    answer = re.sub(r"\A(?:\\[\[(]|\$\$)|(?:\\[\])]|\$\$)\Z", "", answer.strip())
    answer = re.sub(r"(?<=[^.\s])[.。]+\Z", "", answer.strip())
    match = _REMARK.fullmatch(answer)
    if match is not None:
        remark = match["remark"]
        if len(remark.split()) <= 3 and units_of(f"1 {remark}"):
            answer = f"{match['answer']} {remark}"
        elif not _SAYS_MORE.search(remark):
            answer = match["answer"]
    return answer.strip()


def _alone(text: str) -> str | None:
    """A text that is nothing but an answer."""
    answer = bare_answer(text)
    if not re.search(r"\w", answer) or "\n" in answer or len(answer) > 200:
        return None
    said = re.sub(r"\\(?:begin|end)\{\w+\}|\\(?:text|mbox|mathrm)(?![a-z])", "", answer)
    words = re.findall(r"(?<![\\\w])[^\W\d_]{2,}", said)
    spoken = len(words) <= 3 and not re.search(r"\d", said)
    measured = len(words) <= 2 and not re.match(r"[^\w\\]*[^\W\d_]{2}", said)
    return answer if spoken or measured else None
