"""Token ids and a loss mask from a row.

The rule of the border: the ids of a prompt are made by one function for training and for
generation alike, so a trained row begins with exactly the ids that generation starts from.

- Text templates: prompt and response are tokenised apart and joined as ids. No token can straddle
  the border, whatever the tokenizer merges.
- The chat template: the conversation is tokenised whole, as servers do it, and the prompt must be
  its prefix, id by id. A template for which it is not is an error, never a shifted mask.

Texts may hold the tokenizer's special tokens as text (a template of your own does); they are
read as those tokens, as in `transformers`.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from balora_jax.data.chat import Renderer
from balora_jax.data.templates import (
    ExampleSettings,
    Message,
    Row,
    messages_of,
    prompt_text,
    response_text,
)
from balora_jax.errors import InputError
from balora_jax.progress import progress_bar

__all__ = [
    "EncodedSet",
    "EncodingReport",
    "Example",
    "ExampleSettings",
    "describe_example",
    "encode_prompt",
    "encode_rows",
]

_CHUNK = 1000
_SHOW_PROGRESS_ABOVE = 2000


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One row as the model trains on it.

    Attributes:
        input_ids: int32 [T], the whole sequence.
        loss_mask: int8 [T], 1 where the token is to be learnt (it is the target of the position
            before it), else 0; the first is 0, as nothing predicts it.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray

    def __post_init__(self) -> None:
        if self.input_ids.shape != self.loss_mask.shape or self.input_ids.ndim != 1:
            raise ValueError(
                f"Example: expected two rows of one length, got the shapes {self.input_ids.shape} "
                f"and {self.loss_mask.shape}."
            )
        if self.loss_mask.size == 0 or self.loss_mask[0] != 0:
            raise ValueError("Example: expected a first token outside the loss.")


@dataclasses.dataclass(frozen=True)
class EncodingReport:
    """Count of what became of the rows: ``rows = kept + dropped + prompt_too_long``.

    Attributes:
        rows: Rows read.
        kept: Examples made.
        truncated: Those of the kept that lost the end of their response.
        dropped: Rows left out for their length, by choice.
        prompt_too_long: Rows left out because their prompt alone fills the limit.
        tokens: Tokens of all examples.
        loss_tokens: Those of them that are learnt.
    """

    rows: int
    kept: int
    truncated: int
    dropped: int
    prompt_too_long: int
    tokens: int
    loss_tokens: int

    def __str__(self) -> str:
        return (
            f"{self.kept} of {self.rows} rows kept ({self.truncated} truncated, {self.dropped} "
            f"dropped as too long, {self.prompt_too_long} with a prompt too long), "
            f"{self.tokens} tokens, {self.loss_tokens} of them in the loss"
        )


class EncodedSet(NamedTuple):
    """The examples, in the order of their rows, and what became of the rows."""

    examples: list[Example]
    report: EncodingReport


class _Sequence(NamedTuple):
    """Token ids before the limit is applied, with the spans [start, end) of the responses."""

    ids: Sequence[int] | np.ndarray
    spans: list[tuple[int, int]]


ShareOut = Callable[[int, Callable[[int, int], np.ndarray]], np.ndarray]


def alone(count: int, work: Callable[[int, int], np.ndarray]) -> np.ndarray:
    """All of the work by this process."""
    return work(0, count)


def encode_rows(
    rows: Any, tokenizer: Any, settings: ExampleSettings, *, share_out: ShareOut = alone
) -> EncodedSet:
    """Tokenise rows into examples whose loss covers the response and its EOS only.

    Args:
        rows: A list-like of rows (mappings from column to cell).
        tokenizer: A `transformers` tokenizer with an EOS token.
        settings: Template, columns, limit.
        share_out: Who does ``work(start, stop)`` for which rows; gives the results joined in order.

    Returns:
        Examples of at most `settings.max_length` tokens, and the report.

    Raises:
        InputError: A row cannot be read as the settings say, the tokenizer has no EOS or no chat
            template, or no row is left.

    **Source:** the paper's loss is on the response and EOS only, after the Alpaca prompt.
    Departure: the official code tokenises prompt and response as one text and counts the prompt's
    tokens; here they are tokenised apart, so that the border is exact.
    """
    if len(rows) == 0:
        raise InputError("data: expected at least one row, got none. Add rows.")
    tally = _Tally(settings)
    work = functools.partial(_tokenised, rows, tokenizer, settings)
    for sequence in _unpacked(share_out(len(rows), work)):
        tally.add(sequence)
    return tally.result()


def _tokenised(
    rows: Any, tokenizer: Any, settings: ExampleSettings, start: int, stop: int
) -> np.ndarray:
    """The sequences of some of the rows, one after another in an int32 array."""
    part = rows if stop - start == len(rows) else (rows[index] for index in range(start, stop))
    numbered = enumerate(part, start=start + 1)
    packed = [np.zeros(0, np.int32)]
    total = stop - start
    with progress_bar(
        total=total, desc="tokenising", unit="row", disable=total <= _SHOW_PROGRESS_ABOVE
    ) as bar:
        while chunk := list(itertools.islice(numbered, _CHUNK)):
            packed += [_packed(sequence) for sequence in _encode_chunk(chunk, tokenizer, settings)]
            bar.update(len(chunk))
    return np.concatenate(packed)


def _packed(sequence: _Sequence) -> np.ndarray:
    """Two counts, the spans and the ids, int32."""
    counts = (len(sequence.ids), len(sequence.spans))
    spans = itertools.chain.from_iterable(sequence.spans)
    return np.fromiter(itertools.chain(counts, spans, sequence.ids), np.int32)


def _unpacked(packed: np.ndarray) -> Iterator[_Sequence]:
    start = 0
    while start < len(packed):
        length, count = packed[start : start + 2].tolist()
        ids = start + 2 + 2 * count
        spans = packed[start + 2 : ids].reshape(count, 2).tolist()
        start = ids + length
        yield _Sequence(packed[ids:start], [(first, last) for first, last in spans])


def encode_prompt(row: Row, tokenizer: Any, settings: ExampleSettings) -> list[int]:
    """The ids that generation starts from: those that the trained example of this row begins with.

    Args:
        row: A row; only the columns of the prompt are read, except in a conversation, whose prompt
            is all that stands before the last assistant turn.
        tokenizer: The tokenizer of the training.
        settings: The settings of the training. The limit is not applied.

    Raises:
        InputError: As `encode_rows`, for this row.
    """
    if settings.template != "chat":
        text = prompt_text(row, settings, "row")
        return _prompt_ids([text], tokenizer)[0]
    if settings.messages_column is None:
        # The turn that is to be generated need not be in the row.
        row = {**row, settings.response_column: "-"}
    messages = messages_of(row, settings, "row")
    answers = _assistant_turns(messages)
    before = messages[: answers[-1]] if answers else messages
    with Renderer(tokenizer).ready() as chat:
        return chat.ids(before, "row", generation=True)


def describe_example(example: Example, tokenizer: Any) -> str:
    """One example as text for a person to check, what is learnt between ⟦ and ⟧.

    Args:
        example: The example.
        tokenizer: The tokenizer that made it.

    Returns:
        A line of counts, then the decoded text, special tokens included.
    """
    runs = itertools.groupby(zip(example.loss_mask, example.input_ids, strict=True), lambda t: t[0])
    texts = []
    for learnt, run in runs:
        ids = [int(token) for _, token in run]
        text = tokenizer.decode(ids, skip_special_tokens=False)
        texts.append(f"⟦{text}⟧" if learnt else text)
    learnt_count = int(example.loss_mask.sum())
    head = f"{len(example.input_ids)} tokens, {learnt_count} in the loss (between ⟦ and ⟧):"
    return f"{head}\n{''.join(texts)}"


class _Tally:
    """Applies the limit to one sequence after another, and counts."""

    def __init__(self, settings: ExampleSettings) -> None:
        self._settings = settings
        self._examples: list[Example] = []
        self._rows = self._truncated = self._dropped = self._prompt_too_long = 0
        self._shortest_prompt: int | None = None
        self._shortest_row: int | None = None

    def add(self, sequence: _Sequence) -> None:
        limit = self._settings.max_length
        length, prompt = len(sequence.ids), sequence.spans[0][0]
        self._rows += 1
        self._shortest_prompt = min(prompt, self._shortest_prompt or prompt)
        self._shortest_row = min(length, self._shortest_row or length)
        mask = _loss_mask(sequence)[:limit]
        if not mask.any():
            self._prompt_too_long += 1
        elif length > limit and self._settings.overlong == "drop":
            self._dropped += 1
        else:
            self._truncated += length > limit
            # A copy, for what is left out need not stay in memory.
            self._examples.append(Example(np.array(sequence.ids[:limit], np.int32), mask))

    def result(self) -> EncodedSet:
        if not self._examples:
            raise InputError(self._nothing_left())
        report = EncodingReport(
            rows=self._rows,
            kept=len(self._examples),
            truncated=self._truncated,
            dropped=self._dropped,
            prompt_too_long=self._prompt_too_long,
            tokens=sum(len(example.input_ids) for example in self._examples),
            loss_tokens=sum(int(example.loss_mask.sum()) for example in self._examples),
        )
        return EncodedSet(self._examples, report)

    def _nothing_left(self) -> str:
        limit = self._settings.max_length
        if self._dropped:
            return (
                f"data: expected rows of at most max_length = {limit} tokens, got {self._rows} "
                f"longer ones: the shortest has {self._shortest_row} tokens. "
                "Raise max_length or set overlong to truncate."
            )
        return (
            f"data: expected prompts shorter than max_length = {limit} tokens, got none: the "
            f"shortest of {self._rows} has {self._shortest_prompt} tokens. Raise max_length above "
            "that or shorten the prompts."
        )


def _loss_mask(sequence: _Sequence) -> np.ndarray:
    mask = np.zeros(len(sequence.ids), np.int8)
    for start, end in sequence.spans:
        mask[start:end] = 1
    return mask


def _encode_chunk(
    chunk: Sequence[tuple[int, Row]], tokenizer: Any, settings: ExampleSettings
) -> Iterator[_Sequence]:
    eos = _eos_id(tokenizer)
    if settings.template == "chat":
        named = [(f"row {number}", row) for number, row in chunk]
        texts = [(_answered(messages_of(row, settings, at), at), at) for at, row in named]
        with Renderer(tokenizer).ready() as chat:
            found = [_encode_chat(messages, chat, eos, where) for messages, where in texts]
        yield from found
        return
    prompts = [prompt_text(row, settings, f"row {number}") for number, row in chunk]
    responses = [response_text(row, settings, f"row {number}") for number, row in chunk]
    prompt_ids = _prompt_ids(prompts, tokenizer)
    response_ids = _plain_ids(responses, tokenizer)
    for (number, _), prompt, response in zip(chunk, prompt_ids, response_ids, strict=True):
        _check_prompt(prompt, f"row {number}")
        ids = prompt + _end_once(response, eos)
        yield _Sequence(ids, [(len(prompt), len(ids))])


def _check_prompt(prompt: Sequence[int], where: str) -> None:
    if not prompt:
        raise InputError(
            f"{where}: expected a prompt of at least one token, got none from the tokenizer. "
            "Use a template with text, or leave the row out."
        )


def _end_once(ids: list[int], eos: int) -> list[int]:
    """The ids with one EOS at the end, however many the text itself ended with.

    >>> _end_once([5, 2, 2], eos=2)
    [5, 2]
    """
    end = len(ids)
    while end and ids[end - 1] == eos:
        end -= 1
    return [*ids[:end], eos]


def _eos_id(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise InputError(
            "tokenizer: expected an end-of-sequence token, got none, so no response could end. "
            "Set eos_token in tokenizer_config.json."
        )
    return tokenizer.eos_token_id


def _plain_ids(texts: list[str], tokenizer: Any) -> list[list[int]]:
    # verbose=False: whether a row is too long is counted here, against our own limit.
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _prompt_ids(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """The ids of prompts: what the tokenizer puts before every text (BOS), once, then the text."""
    probe = tokenizer("a", add_special_tokens=True, return_special_tokens_mask=True)
    leading = itertools.takewhile(
        lambda pair: pair[1], zip(probe["input_ids"], probe["special_tokens_mask"], strict=True)
    )
    start = [token for token, _ in leading]
    return [
        ids if start and ids[: len(start)] == start else start + ids
        for ids in _plain_ids(texts, tokenizer)
    ]


def _assistant_turns(messages: Iterable[Message]) -> list[int]:
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


def _answered(messages: list[Message], where: str) -> list[Message]:
    if not _assistant_turns(messages):
        raise InputError(
            f"{where}: expected at least one assistant turn, got none. "
            "Leave the row out or rename its roles."
        )
    return messages


def _encode_chat(messages: list[Message], chat: Renderer, eos: int, where: str) -> _Sequence:
    """Tokenise a conversation up to its last assistant turn; each assistant turn is a span.

    A turn ends with its EOS, or where the template ends it; what a template writes after the EOS
    (a line break, mostly) is not learnt. The last turn gets an EOS if the template writes none.
    """
    turns = _assistant_turns(messages)
    ids = chat.ids(messages[: turns[-1] + 1], where, generation=False)
    spans = []
    for turn in turns:
        prompt = chat.ids(messages[:turn], where, generation=True)
        whole = chat.ids(messages[: turn + 1], where, generation=False)
        _check_prompt(prompt, where)
        if ids[: len(prompt)] != prompt or ids[: len(whole)] != whole:
            raise InputError(
                f"{where}: expected the chat template to begin a conversation with the very tokens "
                f"of its prompt, got other ones before message {turn + 1}. "
                "Use a text template for this tokenizer."
            )
        if len(whole) <= len(prompt):
            raise InputError(
                f"{where}: expected the chat template to write message {turn + 1} after its "
                "prompt, got nothing of it. Use a text template for this tokenizer."
            )
        spans.append((len(prompt), _turn_end(ids, len(prompt), len(whole), eos)))
    start, end = spans[-1]
    kept = ids[:end]
    if eos not in kept[start:]:
        kept = [*kept, eos]
        spans[-1] = (start, len(kept))
    return _Sequence(kept, spans)


def _turn_end(ids: Sequence[int], start: int, end: int, eos: int) -> int:
    """Where the learnt part of ids[start:end] ends: after its last EOS, if it has one.

    >>> _turn_end([1, 7, 8, 2, 5], start=1, end=5, eos=2)
    4
    """
    marks = [i for i in range(start, end) if ids[i] == eos]
    return marks[-1] + 1 if marks else end
