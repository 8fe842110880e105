r"""The graders of lm-eval: strict and flexible, for numbers and for MATH.

**Source:** EleutherAI/lm-evaluation-harness: the two filters and the metric of
``tasks/gsm8k/gsm8k.yaml`` (version 3.0, in lm-eval 0.4.13); for MATH, strict is
``tasks/hendrycks_math`` of 0.4.13, and flexible its later ``extract_answer``. A text ends where the
harness would have stopped to generate it. lm-eval scores SVAMP, GSM-hard and ASDiv in other ways or
not at all; for these the names mean what they mean for GSM8K.
"""

import re

from balora_jax.evals.graders.hendrycks import boxed, is_equiv
from balora_jax.evals.grading import Grader

_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
_STOPS = re.compile(r"Question:|</s>|<\|im_end\|>")


def read_strict(text: str, _marker: str) -> str | None:
    """The number behind the first ``#### ``.

    >>> read_strict("so #### 1,010. Or #### 7", ""), read_strict("####7", "")
    ('1,010.', None)
    """
    match = _STRICT.search(_STOPS.split(text)[0])
    return match[1] if match else None


def read_flexible(text: str, _marker: str) -> str | None:
    """The last run of digits, separators and dollar signs, whatever stands before it.

    >>> read_flexible("It is $18 for 2 days.", ""), read_flexible("3.5 hours", "")
    ('2', '3.5')
    """
    return next(reversed(_FLEXIBLE.findall(_STOPS.split(text)[0])), None)


def same_number(answer: str | None, gold: str) -> bool:
    """Whether two numbers are one text without commas, dollar signs and a last full stop.

    >>> same_number("$1,010.", "1010"), same_number("18.0", "18")
    (True, False)
    """
    return answer is not None and _plain(answer) == _plain(gold)


def _plain(text: str) -> str:
    text = re.sub(r"(?s).*#### ", "", text.replace(",", "").replace("$", ""))
    return re.sub(r"\.$", "", text).lower()


def read_dollars(text: str, _marker: str) -> str:
    """What stands between the first and the last dollar sign, or the whole text.

    >>> read_dollars("so $x$ is $5$.", "")
    'x$ is $5'
    """
    text = text.split("Problem:")[0]
    first, last = text.find("$"), text.rfind("$")
    return text if first == last else text[first + 1 : last]


def read_boxed(text: str, marker: str) -> str:
    r"""The last ``\boxed{}``, the first ``\[ … \]``, or what `read_dollars` finds.

    >>> read_boxed(r"$x = \boxed{5}$", ""), read_boxed("so \\[ 5 \\]", "")
    ('5', '5')
    """
    text = text.split("Problem:")[0]
    found = boxed(text)
    if found is not None:
        return found
    display = re.search(r"\\\[(.+?)\\\]", text, re.DOTALL)
    return display[1].strip() if display else read_dollars(text, marker)


def same_text(answer: str | None, gold: str) -> bool:
    r"""Whether an answer is the gold one by `hendrycks.is_equiv`.

    >>> same_text("5", "5"), same_text(None, "5")
    (True, False)
    """
    return answer is not None and is_equiv(answer, gold)


STRICT_NUMBERS = Grader("lm_eval_strict", read_strict, same_number, reads_marker=False)
FLEXIBLE_NUMBERS = Grader("lm_eval_flexible", read_flexible, same_number, reads_marker=False)
STRICT_MATHEMATICS = Grader("lm_eval_strict", read_dollars, same_text, reads_marker=False)
FLEXIBLE_MATHEMATICS = Grader("lm_eval_flexible", read_boxed, same_text, reads_marker=False)
