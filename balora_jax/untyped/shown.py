"""A value of a user's as it stands in a message: on one line, in bounded length, escaped."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_ELLIPSIS = "…"
_MOST_OF_A_VALUE = 100
_MOST_OF_A_SENTENCE = 1000
_DEEPEST = 6

_names: dict[str, str] = {}


@contextmanager
def called(path: str, name: str) -> Iterator[None]:
    """Let a path be called by another name in every line and sentence, while the block runs."""
    _names[path] = name
    try:
        yield
    finally:
        del _names[path]


def in_names(text: str) -> str:
    """A text with the names that paths have for the user.

    >>> with called("/tmp/x1", "gs://b/run"):
    ...     in_names("/tmp/x1/adapter is written")
    'gs://b/run/adapter is written'
    """
    for path, name in _names.items():
        text = text.replace(path, name)
    return text


def shown(value: Any) -> str:
    r"""A value as Python writes it, on one line and cut after 100 characters.

    Text stands in quotes. What would move the cursor, break the line or reverse the order of
    characters is escaped. The work does not grow with the value: of a large one, or of one that
    holds itself, only the beginning is looked at.

    Args:
        value: anything that a parser gave.

    Returns:
        The text; an ellipsis at its end says that there is more.

    >>> print(shown("a\nb"), shown({"r": [8, None]}))
    'a\nb' {'r': [8, None]}
    """
    text = ""
    for piece in _pieces(value, _DEEPEST):
        text += piece
        if len(text) > _MOST_OF_A_VALUE:
            return text[: _MOST_OF_A_VALUE - 1] + _ELLIPSIS
    return text


def one_line(text: str, most: int = _MOST_OF_A_SENTENCE) -> str:
    r"""A text on one line: line breaks, control characters and terminal escapes are escaped.

    Args:
        text: a sentence, which may quote what a user or a library wrote.
        most: the most characters; a longer text loses its middle, where an ellipsis then stands.

    >>> print(one_line("no such file: a\nb\x1b[31m"))
    no such file: a\nb\x1b[31m
    >>> one_line("abcdefghij", most=5)
    'ab…ij'
    """
    text = in_names(text)
    if len(text) > 2 * most:  # escaped, a text only grows
        text = text[:most] + text[-most:]
    line = "".join(map(_escaped, text))
    if len(line) <= most:
        return line
    end = (most - 1) // 2
    return line[: most - 1 - end] + _ELLIPSIS + line[len(line) - end :]


def for_a_log(text: str) -> str:
    r"""A text of one line or more: everything but its line breaks is escaped as in a sentence.

    >>> print(for_a_log("first\nsecond\r\x1b[2K"))
    first
    second\r\x1b[2K
    """
    return "\n".join("".join(map(_escaped, line)) for line in in_names(text).split("\n"))


def _escaped(character: str) -> str:
    # Not printable: control characters, all line breaks, marks of direction, lone surrogates.
    return character if character.isprintable() else repr(character)[1:-1]


def _pieces(value: Any, levels: int) -> Iterator[str]:
    """What ``repr`` writes, one piece after another, each made when it is asked for."""
    if isinstance(value, dict | list | tuple) and levels == 0:
        yield _ELLIPSIS
    elif isinstance(value, dict):
        yield "{"
        for i, (key, inner) in enumerate(value.items()):
            yield ", " if i else ""
            yield from _pieces(key, levels - 1)
            yield ": "
            yield from _pieces(inner, levels - 1)
        yield "}"
    elif isinstance(value, list | tuple):
        yield "[" if isinstance(value, list) else "("
        for i, inner in enumerate(value):
            yield ", " if i else ""
            yield from _pieces(inner, levels - 1)
        yield "]" if isinstance(value, list) else ")"
    elif isinstance(value, str | bytes):
        yield repr(value[:_MOST_OF_A_VALUE])
    elif isinstance(value, int) and value.bit_length() > 1000:
        # Python refuses to write thousands of digits.
        yield f"a whole number of {value.bit_length()} bits"
    else:
        yield "".join(map(_escaped, repr(value)[: _MOST_OF_A_VALUE + 1]))
