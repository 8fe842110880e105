"""Program of a judge's child: pairs of LaTeX in, one JSON list a line; ``true`` or ``false`` out.

It imports nothing of the package, and ends with its input. The system's alarm, which nothing here
catches, ends it where one pair takes longer than the seconds it was given.
"""

import contextlib
import json
import logging
import os
import resource
import signal
import sys

MOST_MEMORY = 4 << 30
_STARTS_WITHIN = 120
_DIGITS = 60


def main() -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no verdict
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_STARTS_WITHIN)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    logging.disable(logging.CRITICAL)
    import math_verify  # noqa: F401  # pyright: ignore[reportMissingImports]

    answers.write("ready\n")
    answers.flush()
    signal.alarm(0)
    for line in sys.stdin:
        signal.alarm(int(sys.argv[1]))
        verdict = same(*json.loads(line))
        signal.alarm(0)
        answers.write("true\n" if verdict else "false\n")
        answers.flush()


def same(prediction: str, gold: str) -> bool:
    """Whether math-verify reads both, and finds them the same."""
    from math_verify import (  # pyright: ignore[reportMissingImports]
        LatexExtractionConfig,
        parse,
        verify,
    )

    # Its own limits of time are signals to this process, which would take the alarm's place.
    readings = [
        parse(
            rf"\boxed{{{text}}}",
            [LatexExtractionConfig(boxed_match_priority=0)],
            fallback_mode="no_fallback",
            extraction_mode="first_match",
            parsing_timeout=None,  # pyright: ignore[reportArgumentType]
        )
        for text in (gold, prediction)
    ]
    if not all(readings):
        return False
    return verify(
        *readings, float_rounding=_DIGITS, numeric_precision=_DIGITS, timeout_seconds=None
    )


if __name__ == "__main__":
    main()
