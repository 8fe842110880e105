"""The settings of an example, and the texts that they take from a row."""

import dataclasses
import datetime
import difflib
import functools
import math
import string
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from balora_jax.errors import InputError

Row = Mapping[str, Any]

Overlong = Literal["truncate", "drop", "split"]
BadRows = Literal["stop", "skip"]

ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
"""The Alpaca prompt for rows without an input, the one that PiSSA and BA-LoRA train with."""
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
"""The Alpaca prompt for rows with one."""

NAMES = ("alpaca", "plain", "text", "chat")
"""Templates that are no text of one's own."""


@dataclasses.dataclass(frozen=True)
class ExampleSettings:
    """Recipe by which rows become examples.

    Attributes:
        template: ``alpaca`` (with or without an input, by the row), ``plain`` (the prompt column
            and nothing else), ``text`` (no prompt: all of the response column is learnt), ``chat``
            (the tokenizer's own chat template), or a text with places for the prompt: ``{column}``,
            ``{column?}`` for one that may be empty, ``{#column}…{/column}`` for what stands only
            where the column holds something, ``{^column}…{/column}`` where it does not; ``{{`` and
            ``}}`` are braces.
        prompt_column: The column of the instruction; a text template names its own columns.
        response_column: The column of the text to learn.
        input_column: The column of ``alpaca``'s input, which rows need not have.
        messages_column: A column of whole conversations (``role``/``content`` or
            ``from``/``value`` turns) instead of the two; needs ``chat``.
        max_length: Most tokens of an example, the EOS included.
        overlong: ``truncate`` cuts the end of the response (and with it the EOS), ``drop`` leaves
            the row out, ``split`` (template ``text``) makes examples of all its parts.
        bad_rows: ``stop`` at a row that cannot be read, or ``skip`` and count it.
        tools_column: The column of the functions that a conversation may call.
        assistant_turns: ``all`` that a row does not exclude are learnt, or the ``last``.
        conversation: ``whole`` (one example), ``turns`` (one for each learnt turn), or ``auto``:
            whole where the chat template allows it.
        chat_template: Text of a template instead of the tokenizer's.
        chat_template_kwargs: Variables that it is given.
        today: The day that it is told; that of the clock where not given.
    """

    template: str = "alpaca"
    prompt_column: str = "instruction"
    response_column: str = "output"
    input_column: str = "input"
    messages_column: str | None = None
    max_length: int = 512
    overlong: Overlong = "truncate"
    bad_rows: BadRows = "stop"
    tools_column: str = "tools"
    assistant_turns: Literal["all", "last"] = "all"
    conversation: Literal["auto", "whole", "turns"] = "auto"
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    today: datetime.date | None = None

    def __post_init__(self) -> None:
        _check_choice("overlong", self.overlong, get_args(Overlong))
        _check_choice("bad_rows", self.bad_rows, get_args(BadRows))
        if self.max_length < 2:
            raise InputError(
                f"max_length: expected at least 2 tokens, got {self.max_length}. Raise it."
            )
        if self.response_column in prompt_columns(self) and self.template not in NAMES:
            raise InputError(
                f"template: expected columns of the prompt, got the response column "
                f"{self.response_column!r}, which would show the answer. Take it out."
            )
        if self.messages_column is not None and self.template != "chat":
            raise InputError(
                f"template: expected 'chat' with messages_column {self.messages_column!r}, got "
                f"{self.template!r}. Set template to 'chat' or leave messages_column out."
            )
        if self.overlong == "split" and self.template != "text":
            raise InputError(
                f"overlong: expected truncate or drop with the template {self.template!r}, got "
                "split: a part would lack its prompt. Choose one of the two."
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


class _Part(NamedTuple):
    """Piece of a template: a literal, then perhaps a cell.

    Attributes:
        literal: text as it stands.
        column: of the cell after it; None for none.
        optional: the cell may be empty.
        within: columns of the sections around it, and whether each is to hold something.
    """

    literal: str
    column: str | None
    optional: bool
    within: tuple[tuple[str, bool], ...]


@functools.lru_cache(maxsize=64)
def _parts(template: str) -> tuple[_Part, ...]:
    """Split a text template; no attribute, format or conversion is ever applied.

    >>> [(part.literal, part.column) for part in _parts("Q: {q}{#hint} ({hint}){/hint}")]
    [('Q: ', 'q'), ('', None), (' (', 'hint'), (')', None)]
    """
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(
            f"template: expected a text with {{column}} places, got unmatched braces ({error}). "
            "Write a brace that is part of the text twice."
        ) from error
    if all(field is None for _, field, *_ in pieces):
        raise InputError(
            f"template: expected {', '.join(NAMES)}, a file, or a text with a {{column}} place, "
            f"got {template!r}.{_did_you_mean(template, NAMES)} Choose one of these."
        )
    parts, within = [], ()
    for literal, field, form, conversion in pieces:
        if form or conversion:
            raise InputError(
                f"template: expected the bare name of a column in a place, got {field!r} with a "
                "format. Take what stands after the name out."
            )
        mark = (field or "")[:1]
        column = None if field is None or mark in ("#", "^", "/") else field
        optional = column is not None and column.endswith("?")
        parts.append(
            _Part(literal, column[:-1] if column and optional else column, optional, within)
        )
        if field is not None and mark in ("#", "^"):
            within = (*within, (field[1:], mark == "#"))
        elif field is not None and mark == "/":
            within = _closed(within, field[1:])
    if within:
        _closed(within, "")
    return tuple(parts)


def _closed(within: tuple[tuple[str, bool], ...], name: str) -> tuple[tuple[str, bool], ...]:
    """The sections around what follows the end of one."""
    if not within or within[-1][0] != name:
        wanted = f"{{/{within[-1][0]}}}" if within else "no end of a section"
        got = f"{{/{name}}}" if name else "none"
        raise InputError(f"template: expected {wanted}, got {got}. Close each section once.")
    return within[:-1]


_ALPACA = f"{{^input}}{ALPACA}{{/input}}{{#input}}{ALPACA_WITH_INPUT}{{/input}}"


def _template(settings: ExampleSettings) -> tuple[_Part, ...]:
    """The parts of a text template; Alpaca's under the columns of the settings."""
    if settings.template in ("plain", "text"):
        return (_Part("", settings.prompt_column, False, ()),)
    if settings.template != "alpaca":
        return _parts(settings.template)
    names = {"instruction": settings.prompt_column, "input": settings.input_column}
    return tuple(
        part._replace(
            column=names.get(part.column or ""),
            within=tuple((names[column], wanted) for column, wanted in part.within),
        )
        for part in _parts(_ALPACA)
    )


def prompt_columns(settings: ExampleSettings) -> set[str]:
    """Columns that the prompt may read, those of conditions too; none for ``chat``."""
    if settings.template == "chat":
        return set()
    parts = _template(settings)
    asked = {column for part in parts for column, _ in part.within}
    return asked | {part.column for part in parts if part.column is not None}


def unread_columns(row: Row, settings: ExampleSettings) -> list[str]:
    """Columns of a row that hold something and that no example gets.

    >>> unread_columns({"instruction": "a", "output": "b", "system": "c"}, ExampleSettings())
    ['system']
    """
    read: set[str | None] = {settings.response_column, settings.messages_column}
    read |= prompt_columns(settings)
    if settings.template == "text":
        read = {settings.response_column}
    if settings.template == "chat":
        read |= {settings.prompt_column, settings.tools_column}
    return [name for name in row if name not in read and _filled(row, name)]


def prompt_text(row: Row, settings: ExampleSettings, where: str) -> str:
    """The text of the prompt, for every template but ``chat``.

    Args:
        row: The row; its response column need not exist.
        settings: Which template and which column.
        where: What to call the row in an error, such as ``row 3``.

    Raises:
        InputError: A column is missing, empty or not text.

    >>> prompt_text({"q": "1+1?"}, ExampleSettings("Q: {q}{h?} A:", response_column="a"), "row 1")
    'Q: 1+1? A:'
    """
    texts = []
    for part in _template(settings):
        if any(_filled(row, column) is not wanted for column, wanted in part.within):
            continue
        texts.append(part.literal)
        if part.column is not None and (not part.optional or _filled(row, part.column)):
            texts.append(cell_text(row, part.column, where))
    return "".join(texts)


def branch_of(row: Row, settings: ExampleSettings) -> str:
    """Which sections of the template a row takes, in words; empty where there are none.

    >>> branch_of({"instruction": "a", "input": "b"}, ExampleSettings())
    'with input'
    """
    if settings.template == "chat":
        return ""
    asked = dict.fromkeys(column for part in _template(settings) for column, _ in part.within)
    return ", ".join(f"{'with' if _filled(row, name) else 'without'} {name}" for name in asked)


def response_text(row: Row, settings: ExampleSettings, where: str) -> str:
    """The text to learn. Raises InputError as `prompt_text` does."""
    return cell_text(row, settings.response_column, where)


def _filled(row: Row, column: str) -> bool:
    """Whether a row has something in a column."""
    cell = row.get(column)
    if isinstance(cell, float) and math.isnan(cell):
        return False
    return bool(cell.strip()) if isinstance(cell, str) else cell is not None and cell != []


def cell_text(row: Row, column: str, where: str) -> str:
    """The text of one cell; a number is written as `str` writes it, true and false as JSON does.

    Raises:
        InputError: The column is missing, or its cell is empty or neither text nor number.

    >>> cell_text({"answer": 42}, "answer", "row 1")
    '42'
    """
    cell = cell_of(row, column, where)
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        got = "an empty cell"
    elif isinstance(cell, str):
        if cell.strip():
            return cell
        got = "an empty cell"
    elif isinstance(cell, bool):
        return str(cell).lower()
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


def cell_of(row: Row, column: str, where: str) -> Any:
    """A cell as it stands. Raises InputError where the row has no such column."""
    if column not in row:
        raise InputError(
            f"{where}: expected a column {column!r}, got the columns {', '.join(row)}."
            f"{_did_you_mean(column, list(row))} Name the column of your data in the settings."
        )
    return row[column]
