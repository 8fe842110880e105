"""A conversation as token ids: its turns, and which of them are learnt."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from balora_jax.data.chat import Chat, Message, Renderer, content_text
from balora_jax.data.sequences import Tokens
from balora_jax.data.templates import ExampleSettings, Row, cell_of, cell_text
from balora_jax.errors import InputError
from balora_jax.untyped.shown import one_line, shown

_ROLE_KEYS = (("role", "content"), ("from", "value"))
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "model", "bot", "chatgpt", "assistant"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "tool_response"), "tool"),
    "system": "system",
    "developer": "developer",
}
"""ShareGPT's names, and the roles that templates know."""
_CALL = "function_call"
_LEARN = ("weight", "train")
"""Keys of a turn by which it may be left out of the loss."""
_NEEDED = ("tool_calls", "tools", "reasoning_content")
"""What a template must not leave out without a word."""


def conversation_of(row: Row, settings: ExampleSettings, chat: Renderer, where: str) -> Chat:
    """The turns of a row as the chat template takes them.

    From the messages column; or from a prompt and a response, each a text or a list of turns.

    Raises:
        InputError: a column is missing, a turn has no role or no text, or something that the
            template does not read.
    """
    if settings.messages_column is not None:
        turns = _turns(
            cell_of(row, settings.messages_column, where), settings.messages_column, where
        )
    else:
        turns = [
            *_turns_or_text(row, settings.prompt_column, "user", where),
            *_turns_or_text(row, settings.response_column, "assistant", where),
        ]
    found = [_message(turn, chat, f"{where}, turn {i}") for i, turn in enumerate(turns, start=1)]
    tools = _tools(row, settings.tools_column, where)
    if tools and not chat.mentions("tools"):
        raise InputError(_unread(f"{where}: expected a chat template that takes tools", "tools"))
    messages, learnt = [message for message, _ in found], [learn for _, learn in found]
    return Chat(messages, tools or None, learnt)


def prompt_of(row: Row, settings: ExampleSettings, chat: Renderer, where: str) -> Chat:
    """What stands before the answer at the end: all of it where the last turn is no answer."""
    if settings.messages_column is None:
        # The turn that is to be generated need not be in the row.
        row = {**row, settings.response_column: "-"}
    whole = conversation_of(row, settings, chat, where)
    last = len(whole.messages) - 1
    return whole.upto(last) if whole.messages[last]["role"] == "assistant" else whole


def answered(row: Row, settings: ExampleSettings, gold: str, where: str) -> Row:
    """A row whose messages end with their last answer, and that has its text in a column.

    Args:
        row: a row with messages.
        settings: names their column.
        gold: the column that gets the text.
        where: what to call the row in an error.

    Raises:
        InputError: there is no answer, or it has no text.
    """
    assert settings.messages_column is not None
    column = settings.messages_column
    turns = _turns(cell_of(row, column, where), column, where)
    for last in range(len(turns) - 1, -1, -1):
        role, content = (turns[last][key] for key in _role_keys(turns[last], where))
        if _ROLES.get(str(role)) == "assistant" and isinstance(content, str | list):
            if content_text(content).strip():
                return {**row, column: turns[: last + 1], gold: content_text(content)}
            break
    raise InputError(
        f"{where}: expected an assistant turn with text at the end, which is the right answer, got "
        "none. Leave the row out."
    )


def last_turn(turns: Sequence[Mapping[str, Any]], role: str) -> str:
    """The text of the last turn of a role; empty where there is none.

    >>> turns = [{"role": "user", "content": "Hi"}, {"from": "gpt", "value": "Hello"}]
    >>> last_turn(turns, "user"), last_turn(turns, "assistant")
    ('Hi', 'Hello')
    """
    for turn in reversed(turns):
        said, content = (turn.get(key) for key in _role_keys(turn, "row"))
        if _ROLES.get(str(said)) == role:
            return content_text(content)
    return ""


def unread_keys(row: Row, settings: ExampleSettings, chat: Renderer) -> list[str]:
    """Keys of a row's turns that hold something and that the chat template never mentions."""
    turns = row.get(settings.messages_column or "")
    read = {key for pair in _ROLE_KEYS for key in pair} | set(_LEARN)
    keys = [
        key
        for turn in (turns if isinstance(turns, list) else ())
        if isinstance(turn, Mapping)
        for key, value in turn.items()
        if value not in (None, "", [], {}) and key not in read and not chat.mentions(key)
    ]
    return list(dict.fromkeys(keys))


def assistant_turns(chat: Chat) -> list[int]:
    """The places of the assistant's messages."""
    return [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]


def _turns_or_text(row: Row, column: str, role: str, where: str) -> list[Any]:
    cell = cell_of(row, column, where)
    if isinstance(cell, Sequence) and not isinstance(cell, str):
        return _turns(cell, column, where)
    return [{"role": role, "content": cell_text(row, column, where)}]


def _turns(turns: Any, column: str, where: str) -> list[Any]:
    if not isinstance(turns, Sequence) or isinstance(turns, str) or len(turns) == 0:
        raise InputError(
            f"{where}: expected a list of turns in the column {column!r}, got "
            f"{'an empty one' if turns is None or turns == [] else f'a {type(turns).__name__}'}. "
            "Fix the row or leave it out."
        )
    return list(turns)


def _tools(row: Row, column: str, where: str) -> list[Any]:
    """Descriptions of functions: a list, or the JSON of one."""
    cell = row.get(column)
    if isinstance(cell, str) and cell.strip():
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError):
            cell = 0
    if cell is None or cell == "":
        return []
    if not isinstance(cell, list) or not all(isinstance(tool, dict) for tool in cell):
        raise InputError(
            f"{where}: expected a list of objects in the column {column!r}, or its JSON, got "
            "something else. Fix the row, or name another data.tools_column."
        )
    return cell


def _role_keys(turn: Any, where: str) -> tuple[str, str]:
    if isinstance(turn, Mapping):
        for role_key, text_key in _ROLE_KEYS:
            if role_key in turn and (text_key in turn or turn.get("tool_calls")):
                return role_key, text_key
    got = f"the keys {', '.join(turn)}" if isinstance(turn, Mapping) else f"a {type(turn).__name__}"
    raise InputError(
        f"{where}: expected the keys role and content (or from and value), got {got}. "
        "Rename the keys."
    )


def _message(turn: Any, chat: Renderer, where: str) -> tuple[Message, bool]:
    """A turn as the template takes it, and whether it may be learnt."""
    role_key, text_key = _role_keys(turn, where)
    said = cell_text(turn, role_key, where)
    # Keys that are null are not there, as transformers has it.
    more = {
        key: value
        for key, value in turn.items()
        if key not in (role_key, text_key, *_LEARN) and value is not None
    }
    if said == _CALL:
        more["tool_calls"] = [_call(turn, text_key, where)]
        return {"role": "assistant", "content": "", **_read(more, chat, where)}, _learnt(
            turn, where
        )
    role = _ROLES.get(said, said if chat.mentions(said) else None)
    if role is None:
        raise InputError(
            f"{where}: expected a role that is one of {', '.join(dict.fromkeys(_ROLES.values()))} "
            f"or that the chat template names, got {shown(one_line(said))}. Rename the role."
        )
    content = _content(turn, text_key, chat, where, empty=bool(more.get("tool_calls")))
    return {"role": role, "content": content, **_read(more, chat, where)}, _learnt(turn, where)


def _read(more: dict[str, Any], chat: Renderer, where: str) -> dict[str, Any]:
    """Other keys of a turn. Raises InputError for one that matters and that nobody reads."""
    for key in more:
        if key in _NEEDED and not chat.mentions(key):
            raise InputError(_unread(f"{where}: expected a chat template that takes {key}", key))
    return more


def _unread(expected: str, key: str) -> str:
    return (
        f"{expected}, got one without the word. Take {key} out of the rows, or give "
        "data.chat_template a template that writes it."
    )


def _call(turn: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """ShareGPT's call of a function: JSON with ``name`` and ``arguments``."""
    try:
        found = json.loads(cell_text(turn, key, where))
        return {
            "type": "function",
            "function": {"name": found["name"], "arguments": found["arguments"]},
        }
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{where}: expected the JSON of a call with name and arguments, got something else. "
            "Fix the row or leave it out."
        ) from error


def _content(
    turn: Mapping[str, Any], key: str, chat: Renderer, where: str, *, empty: bool
) -> str | list[Any]:
    """The text of a turn; parts go to a template that reads parts, and are joined for others."""
    parts = turn.get(key)
    if empty and (parts is None or parts == "" or parts == []):
        return ""
    if not isinstance(parts, list):
        return cell_text(turn, key, where)
    for part in parts:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            raise InputError(
                f"{where}: expected parts of text, each with a key text, got something else. "
                "Only text is learnt: take other parts out."
            )
    if not content_text(parts).strip():
        raise InputError(f"{where}: expected text, got none. Fill the turn or leave the row out.")
    return [dict(part) for part in parts] if chat.mentions("text") else content_text(parts)


def _learnt(turn: Mapping[str, Any], where: str) -> bool:
    """Whether a turn may be learnt, by its keys ``weight`` and ``train``."""
    for key in _LEARN:
        value = turn.get(key, 1)
        if value is not None and (not isinstance(value, int | float) or value not in (0, 1)):
            raise InputError(
                f"{where}: expected {key} to be 0 or 1, got {shown(value)}. Correct it."
            )
    return all(turn.get(key, 1) in (1, None) for key in _LEARN)


def encode_conversation(
    row: Row, settings: ExampleSettings, chat: Renderer, eos: int, where: str
) -> list[Tokens]:
    """Examples of a conversation, up to its last assistant turn that is learnt.

    One, if the template writes the beginning of the conversation alike however it goes on: each
    learnt turn is a span in it. Else one for each turn that is learnt, written as it is when the
    conversation ends there; ``settings.conversation`` asks for one of the two.

    A turn ends with its EOS, or where the template ends it; what a template writes after the EOS
    (a line break, mostly) is not learnt. The last turn gets an EOS if the template writes none.

    Raises:
        InputError: no turn to learn, or a template under which an answer has no beginning.
    """
    whole = conversation_of(row, settings, chat, where)
    turns = [i for i in assistant_turns(whole) if whole.learnt[i]]
    if not turns:
        raise InputError(
            f"{where}: expected at least one assistant turn to learn, got none. "
            "Leave the row out or rename its roles."
        )
    if settings.assistant_turns == "last":
        turns = turns[-1:]
    if settings.conversation != "turns" and len(turns) > 1:
        found = _together(whole, turns, chat, eos, where)
        if found is not None:
            return [found]
        if settings.conversation == "whole":
            raise InputError(
                f"{where}: expected the chat template to write the beginning of a conversation "
                "alike however it goes on, got other words. Set data.conversation to auto or turns."
            )
    return [_one_turn(whole, turn, chat, eos, where) for turn in turns]


def _together(
    whole: Chat, turns: Sequence[int], chat: Renderer, eos: int, where: str
) -> Tokens | None:
    """One example with all turns; None where the template or the tokenizer lets there be none."""
    ids = chat.ids(chat.text(whole.upto(turns[-1] + 1), where, generation=False))
    spans = []
    for turn in turns:
        prompt = chat.ids(chat.text(whole.upto(turn), where, generation=True))
        upto = chat.ids(chat.text(whole.upto(turn + 1), where, generation=False))
        _check_prompt(prompt, where)
        if ids[: len(prompt)] != prompt or ids[: len(upto)] != upto or len(upto) <= len(prompt):
            return None
        spans.append((len(prompt), _turn_end(ids, len(prompt), len(upto), eos)))
    return _ended(ids, spans, eos)


def _one_turn(whole: Chat, turn: int, chat: Renderer, eos: int, where: str) -> Tokens:
    """One answer after its prompt: the very ids of the prompt that generation starts from."""
    before = chat.text(whole.upto(turn), where, generation=True)
    upto = chat.text(whole.upto(turn + 1), where, generation=False)
    if not upto.startswith(before) or len(upto) == len(before):
        raise InputError(
            f"{where}: expected the chat template to write message {turn + 1} after its prompt, "
            f"got {shown(one_line(upto[_common(before, upto) :]))} where the prompt has "
            f"{shown(one_line(before[_common(before, upto) :]))}. Set data.chat_template_kwargs or "
            "data.chat_template, or use a text template."
        )
    prompt, ids = chat.ids(before), chat.ids(upto)
    _check_prompt(prompt, where)
    if ids[: len(prompt)] != prompt or len(ids) <= len(prompt):
        # A token would straddle the border: the answer's ids are those of its own text.
        ids = prompt + chat.ids(upto[len(before) :])
    return _ended(ids, [(len(prompt), _turn_end(ids, len(prompt), len(ids), eos))], eos)


def _common(left: str, right: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))


def _check_prompt(prompt: Sequence[int], where: str) -> None:
    if not prompt:
        raise InputError(
            f"{where}: expected a prompt of at least one token, got none from the chat template. "
            "Use another template, or leave the row out."
        )


def _ended(ids: list[int], spans: list[tuple[int, int]], eos: int) -> Tokens:
    """The ids up to the end of the last span, which gets an EOS if it has none."""
    start, end = spans[-1]
    kept = ids[:end]
    if eos not in kept[start:]:
        kept = [*kept, eos]
        spans[-1] = (start, len(kept))
    return Tokens(kept, spans)


def _turn_end(ids: Sequence[int], start: int, end: int, eos: int) -> int:
    """Where the learnt part of ids[start:end] ends: after its last EOS, if it has one.

    >>> _turn_end([1, 7, 8, 2, 5], start=1, end=5, eos=2)
    4
    """
    marks = [i for i in range(start, end) if ids[i] == eos]
    return marks[-1] + 1 if marks else end
