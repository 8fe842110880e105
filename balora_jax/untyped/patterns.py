r"""Regular expressions of others, which mean what they mean to ``re`` and always end.

The ones of a downloaded ``adapter_config.json`` may take longer than the universe on a name of
thirty letters, and ``re`` cannot be stopped. The package ``regex`` reads the same syntax and has a
limit of time.
"""

import re
import time
import warnings
from collections.abc import Callable

import regex

from balora_jax.errors import InputError
from balora_jax.untyped.shown import shown

SECONDS = 2.0
"""Of the processor, for all names that one expression is asked of; a sane one needs a thousandth.
"""
_MOST_CHARACTERS = 10_000
# `x{e<=1}` are five letters to `re`, and "x with an error" to `regex`.
_FUZZY = re.compile(r"(?<!\\)(?<!\\N)\{[^\d,}]")


def whole_match(expression: str, where: str) -> Callable[[str], bool]:
    r"""A function that says whether an expression matches the whole of a name.

    Args:
        expression: as ``re.fullmatch`` takes it.
        where: the key that it stands in, for messages.

    Returns:
        The function; it raises ``InputError`` where an answer takes too long.

    Raises:
        InputError: no regular expression, or one of more than 10 000 characters.

    >>> matches = whole_match(r".*\.[qk]_proj", "adapter.target_modules")
    >>> matches("layers.3.q_proj"), matches("layers.3.o_proj"), matches("q_proj.extra")
    (True, False, False)
    """
    return _limited(_compiled(expression, expression, where).fullmatch, expression, where)


def end_match(expression: str, where: str) -> Callable[[str], bool]:
    """Like :func:`whole_match`, of a name or its dotted end, as PEFT reads ``rank_pattern``.

    >>> matches = end_match("q_proj", "adapter.rank_pattern")
    >>> matches("layers.3.q_proj"), matches("q_proj"), matches("my_q_proj")
    (True, True, False)
    """
    compiled = _compiled(rf"(.*\.)?({expression})$", expression, where)
    return _limited(compiled.match, expression, where)


def _compiled(whole: str, expression: str, where: str) -> regex.Pattern[str]:
    fault = f"more than {_MOST_CHARACTERS} characters"
    if len(expression) <= _MOST_CHARACTERS:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # of what another version of Python may read apart
                re.compile(expression)
                re.compile(whole)
            if found := _FUZZY.search(expression):
                raise re.error(f"a brace before {found[0][1:]!r}; write \\{{ for the letter")
            return regex.compile(whole, regex.VERSION0)
        except (re.error, regex.error, OverflowError, RecursionError, Warning) as error:
            fault = str(error)
    raise InputError(
        f"{where}: expected a regular expression, got {shown(expression)} ({fault}). Correct it."
    )


def _limited(match: Callable[..., object], expression: str, where: str) -> Callable[[str], bool]:
    spent = 0.0

    def matches(name: str) -> bool:
        nonlocal spent
        begin = time.process_time()
        try:
            return match(name, timeout=max(SECONDS - spent, 0.001)) is not None
        except TimeoutError as error:
            raise InputError(
                f"{where}: expected a regular expression that comes to an end, got "
                f"{shown(expression)}, which did not in {SECONDS:g} s of work. Simplify it."
            ) from error
        finally:
            spent += time.process_time() - begin

    return matches
