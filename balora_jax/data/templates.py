"""The settings of an example, and the texts that they take from a row."""

import dataclasses
import difflib
import math
import string
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from balora_jax.errors import InputError

Row = Mapping[str, Any]
Message = dict[str, str]

Overlong = Literal["truncate", "drop"]

ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
"""The Alpaca prompt for rows without an input field, the one that PiSSA and BA-LoRA train with."""

_NAMES = ("alpaca", "plain", "chat")
_ROLE_KEYS = (("role", "content"), ("from", "value"))
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}


@dataclasses.dataclass(frozen=True)
class ExampleSettings:
    """Recipe by which rows become examples.

    Attributes:
        template: ``alpaca``, ``plain`` (the prompt column and nothing else), ``chat`` (the
            tokenizer's own chat template), or a text with ``{column}`` places for the prompt;
            ``{{`` and ``}}`` are braces.
        prompt_column: The column of the instruction; a text template names its own columns.
        response_column: The column of the text to learn.
        messages_column: A column of whole conversations (``role``/``content`` or
            ``from``/``value`` turns) instead of the two; needs ``chat``.
        max_length: Most tokens of an example, the EOS included.
        overlong: ``truncate`` cuts the end of the response (and with it the EOS), ``drop`` leaves
            the row out.
    """

    template: str = "alpaca"
    prompt_column: str = "instruction"
    response_column: str = "output"
    messages_column: str | None = None
    max_length: int = 512
    overlong: Overlong = "truncate"

    def __post_init__(self) -> None:
        _check_choice("overlong", self.overlong, get_args(Overlong))
        if self.max_length < 2:
            raise InputError(
                f"max_length: expected at least 2 tokens, got {self.max_length}. Raise it."
            )
        if self.template not in _NAMES and self.response_column in _fields(self.template):
            raise InputError(
                f"template: expected columns of the prompt, got the response column "
                f"{self.response_column!r}, which would show the answer. Take it out."
            )
        if self.messages_column is not None and self.template != "chat":
            raise InputError(
                f"template: expected 'chat' with messages_column {self.messages_column!r}, got "
                f"{self.template!r}. Set template to 'chat' or leave messages_column out."
            )


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InputError(
            f"{name}: expected one of {', '.join(choices)}, got {value!r}."
            f"{_did_you_mean(value, choices)} Choose one of these."
        )


def _did_you_mean(text: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(text.lower(), choices, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _pieces(template: str) -> list[tuple[str, str | None]]:
    """Split a text template into (literal, column) pairs; no attribute or format is ever applied.

    >>> _pieces("Q: {question}")
    [('Q: ', 'question')]
    """
    try:
        pieces = [(text, field) for text, field, *_ in string.Formatter().parse(template)]
    except ValueError as error:
        raise InputError(
            f"template: expected a text with {{column}} places, got unmatched braces ({error}). "
            "Write a brace that is part of the text twice."
        ) from error
    if all(field is None for _, field in pieces):
        raise InputError(
            f"template: expected {', '.join(_NAMES)} or a text with a {{column}} place, got "
            f"{template!r}.{_did_you_mean(template, _NAMES)} Choose one of these."
        )
    return pieces


def _fields(template: str) -> list[str]:
    return [field for _, field in _pieces(template) if field is not None]


def prompt_text(row: Row, settings: ExampleSettings, where: str) -> str:
    """The text of the prompt, for every template but ``chat``.

    Args:
        row: The row; its response column need not exist.
        settings: Which template and which column.
        where: What to call the row in an error, such as ``row 3``.

    Raises:
        InputError: A column is missing, empty or not text.

    >>> prompt_text({"q": "1+1?"}, ExampleSettings("Q: {q} A:", response_column="a"), "row 1")
    'Q: 1+1? A:'
    """
    if settings.template == "plain":
        return cell_text(row, settings.prompt_column, where)
    if settings.template == "alpaca":
        return ALPACA.format(instruction=cell_text(row, settings.prompt_column, where))
    texts = []
    for literal, field in _pieces(settings.template):
        texts.append(literal if field is None else literal + cell_text(row, field, where))
    return "".join(texts)


def response_text(row: Row, settings: ExampleSettings, where: str) -> str:
    """The text to learn. Raises InputError as `prompt_text` does."""
    return cell_text(row, settings.response_column, where)


def cell_text(row: Row, column: str, where: str) -> str:
    """The text of one cell; a number is written as `str` writes it.

    Raises:
        InputError: The column is missing, or its cell is empty or neither text nor number.

    >>> cell_text({"answer": 42}, "answer", "row 1")
    '42'
    """
    cell = _cell(row, column, where)
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        got = "an empty cell"
    elif isinstance(cell, str):
        if cell.strip():
            return cell
        got = "an empty cell"
    elif isinstance(cell, float) and math.isinf(cell):
        got = "a number without bound"
    elif isinstance(cell, int | float):
        return str(cell)
    else:
        got = f"a {type(cell).__name__}"
    raise InputError(
        f"{where}: expected text in the column {column!r}, got {got}. "
        "Fill the cell or leave the row out."
    )


def _cell(row: Row, column: str, where: str) -> Any:
    if column not in row:
        raise InputError(
            f"{where}: expected a column {column!r}, got the columns {', '.join(row)}."
            f"{_did_you_mean(column, list(row))} Name the column of your data in the settings."
        )
    return row[column]


def messages_of(row: Row, settings: ExampleSettings, where: str) -> list[Message]:
    """The turns of a conversation as chat templates take them: `role` and `content` texts.

    Without a messages column these are one user turn and one assistant turn.

    Raises:
        InputError: A column is missing, or a turn has no role or no text.
    """
    if settings.messages_column is None:
        return [
            {"role": "user", "content": cell_text(row, settings.prompt_column, where)},
            {"role": "assistant", "content": response_text(row, settings, where)},
        ]
    turns = _cell(row, settings.messages_column, where)
    if not isinstance(turns, Sequence) or isinstance(turns, str) or len(turns) == 0:
        raise InputError(
            f"{where}: expected a list of turns in the column {settings.messages_column!r}, got "
            f"{'an empty one' if turns is None or turns == [] else f'a {type(turns).__name__}'}. "
            "Fix the row or leave it out."
        )
    return [_message(turn, f"{where}, turn {i}") for i, turn in enumerate(turns, start=1)]


def _message(turn: Any, where: str) -> Message:
    if isinstance(turn, Mapping):
        for role_key, text_key in _ROLE_KEYS:
            if role_key in turn and text_key in turn:
                role = cell_text(turn, role_key, where)
                return {"role": _ROLES.get(role, role), "content": cell_text(turn, text_key, where)}
    got = f"the keys {', '.join(turn)}" if isinstance(turn, Mapping) else f"a {type(turn).__name__}"
    raise InputError(
        f"{where}: expected the keys role and content (or from and value), got {got}. "
        "Rename the keys."
    )
