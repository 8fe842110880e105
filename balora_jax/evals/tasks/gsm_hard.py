"""GSM-hard: the problems of GSM8K with large numbers put in, whose answers programs computed.

**Source:** Gao et al. 2022, *PAL: Program-aided Language Models*; a number is right there within a
thousandth (``scripts/gsm_eval.py``), as their answers are floats.
"""

from fractions import Fraction

from balora_jax.evals.benchmark import TextBenchmark, column_text
from balora_jax.evals.graders import NUMBER_GRADERS
from balora_jax.evals.numbers import parse_number

_NEAR = Fraction(1, 1000)


def near(answer: str | None, gold: str) -> bool:
    """Whether a number is less than a thousandth away from the right one.

    Example:
        >>> near("762573.33", "762573.3333333334"), near("762573.33", "762573.3")
        (False, False)
        >>> near("762573.3333", "762573.3333333334"), near(None, "1")
        (True, False)
    """
    value, right = (None if text is None else parse_number(text) for text in (answer, gold))
    return value is not None and right is not None and abs(value - right) < _NEAR


GSM_HARD = TextBenchmark(
    name="gsm_hard",
    gold=column_text,
    right=near,
    graders=NUMBER_GRADERS,
    prompt_column="input",
    gold_column="target",
    source="reasoning-machines/gsm-hard",
    split="train",
)
