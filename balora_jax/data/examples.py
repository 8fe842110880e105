"""Token ids and a loss mask from a row.

The rule of the border: the ids of a prompt are made by one function for training and for
generation alike, so a trained row begins with exactly the ids that generation starts from.

- Text templates: prompt and response are tokenised apart and joined as ids. No token can straddle
  the border, whatever the tokenizer merges.
- The chat template: the conversation is tokenised whole, as servers do it, where the prompt is its
  prefix, id by id; else each answer on its own, after the ids of its prompt.

Texts may hold the tokenizer's special tokens as text (a template of your own does); they are
read as those tokens, as in `transformers`.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from balora_jax.data.chat import Renderer
from balora_jax.data.conversations import encode_conversation, prompt_of
from balora_jax.data.sequences import BadRow, Found, Tokens, or_bad, packed, unpacked
from balora_jax.data.templates import (
    ExampleSettings,
    Row,
    branch_of,
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
_LOOKED_AT = 1000
"""Rows that are looked at for what a person is shown."""


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
    """Count of what became of the rows.

    Attributes:
        rows: Rows read.
        kept: Examples made; a conversation may give several.
        truncated: Those of the kept that lost the end of their response.
        dropped: Examples left out for their length, by choice.
        prompt_too_long: Examples left out because their prompt alone fills the limit.
        bad: Rows left out because they cannot be read, by choice.
        tokens: Tokens of all examples.
        loss_tokens: Those of them that are learnt.
    """

    rows: int
    kept: int
    truncated: int
    dropped: int
    prompt_too_long: int
    bad: int
    tokens: int
    loss_tokens: int

    def __str__(self) -> str:
        bad = f"{self.bad} that cannot be read, " if self.bad else ""
        return (
            f"{self.kept} examples of {self.rows} rows ({bad}{self.truncated} truncated, "
            f"{self.dropped} dropped as too long, {self.prompt_too_long} with a prompt too long), "
            f"{self.tokens} tokens, {self.loss_tokens} of them in the loss"
        )

    def __add__(self, other: "EncodingReport") -> "EncodingReport":
        """The counts of both."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return EncodingReport(*(mine + theirs for mine, theirs in pairs))


class EncodedSet(NamedTuple):
    """What became of rows.

    Attributes:
        examples: in the order of their rows.
        report: counts.
        bad: rows that were left out, and why.
    """

    examples: list[Example]
    report: EncodingReport
    bad: list[BadRow]


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
    tally = _Tally(settings, len(rows))
    work = functools.partial(_tokenised, rows, tokenizer, settings)
    for found in unpacked(share_out(len(rows), work)):
        tally.add(found)
    return tally.result()


def _tokenised(
    rows: Any, tokenizer: Any, settings: ExampleSettings, start: int, stop: int
) -> np.ndarray:
    """What some of the rows give, in an int32 array."""
    part = rows if stop - start == len(rows) else (rows[index] for index in range(start, stop))
    numbered = enumerate(part, start=start + 1)
    parts = [np.zeros(0, np.int32)]
    total = stop - start
    with progress_bar(
        total=total, desc="tokenising", unit="row", disable=total <= _SHOW_PROGRESS_ABOVE
    ) as bar:
        while chunk := list(itertools.islice(numbered, _CHUNK)):
            parts.append(packed(_encode_chunk(chunk, tokenizer, settings)))
            bar.update(len(chunk))
    return np.concatenate(parts)


def renderer_for(tokenizer: Any, settings: ExampleSettings) -> Renderer:
    """The chat template that the settings ask for. Raises InputError where there is none."""
    return Renderer(
        tokenizer,
        settings.chat_template,
        settings.chat_template_kwargs,
        settings.today,
    )


def encode_prompt(
    row: Row, tokenizer: Any, settings: ExampleSettings, where: str = "row"
) -> list[int]:
    """The ids that generation starts from: those that the trained example of this row begins with.

    Args:
        row: A row; only the columns of the prompt are read, except in a conversation, whose prompt
            is all that stands before the last assistant turn.
        tokenizer: The tokenizer of the training.
        settings: The settings of the training. The limit is not applied.
        where: What to call the row in an error.

    Raises:
        InputError: As `encode_rows`, for this row.
    """
    if settings.template != "chat":
        return text_ids([prompt_text(row, settings, where)], tokenizer)[0]
    with renderer_for(tokenizer, settings).ready() as chat:
        return chat.ids(chat.text(prompt_of(row, settings, chat, where), where, generation=True))


def first_of_each_branch(rows: Any, settings: ExampleSettings) -> dict[str, int]:
    """Place of the first row of each branch of the template, by its name."""
    found: dict[str, int] = {}
    for index, row in enumerate(itertools.islice(rows, _LOOKED_AT)):
        found.setdefault(branch_of(row, settings), index)
    return found


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

    def __init__(self, settings: ExampleSettings, rows: int) -> None:
        self._settings = settings
        self._examples: list[Example] = []
        self._bad: list[BadRow] = []
        self._rows = rows
        self._truncated = self._dropped = self._prompt_too_long = 0
        self._shortest_prompt: int | None = None
        self._shortest_row: int | None = None

    def add(self, found: Found) -> None:
        if isinstance(found, BadRow):
            self._bad.append(found)
            return
        limit = self._settings.max_length
        length, prompt = len(found.ids), found.spans[0][0]
        self._shortest_prompt = min(prompt, self._shortest_prompt or prompt)
        self._shortest_row = min(length, self._shortest_row or length)
        whole = _loss_mask(found)
        if self._settings.overlong == "split":
            self._split(found, whole)
        elif not (mask := whole[:limit]).any():
            self._prompt_too_long += 1
        elif length > limit and self._settings.overlong == "drop":
            self._dropped += 1
        else:
            self._truncated += length > limit
            # A copy, for what is left out need not stay in memory.
            self._examples.append(Example(np.array(found.ids[:limit], np.int32), mask))

    def _split(self, found: Tokens, whole: np.ndarray) -> None:
        """Examples of all parts; the first token of a part has nothing before it to learn from."""
        for start in range(0, len(found.ids), self._settings.max_length):
            part = slice(start, start + self._settings.max_length)
            mask = np.concatenate([np.zeros(1, np.int8), whole[part][1:]])
            if mask.any():
                self._examples.append(Example(np.array(found.ids[part], np.int32), mask))

    def result(self) -> EncodedSet:
        if not self._examples:
            raise InputError(self._nothing_left())
        report = EncodingReport(
            rows=self._rows,
            kept=len(self._examples),
            truncated=self._truncated,
            dropped=self._dropped,
            prompt_too_long=self._prompt_too_long,
            bad=len(self._bad),
            tokens=sum(len(example.input_ids) for example in self._examples),
            loss_tokens=sum(int(example.loss_mask.sum()) for example in self._examples),
        )
        return EncodedSet(self._examples, report, self._bad)

    def _nothing_left(self) -> str:
        limit = self._settings.max_length
        if self._dropped:
            return (
                f"data: expected rows of at most max_length = {limit} tokens, got {self._rows} "
                f"longer ones: the shortest has {self._shortest_row} tokens. "
                "Raise max_length or set overlong to truncate."
            )
        if not self._prompt_too_long:
            return (
                f"data: expected rows that can be read, got none of {self._rows}. The first says: "
                f"{self._bad[0].reason}"
            )
        return (
            f"data: expected prompts shorter than max_length = {limit} tokens, got none: the "
            f"shortest of {self._rows} has {self._shortest_prompt} tokens. Raise max_length above "
            "that or shorten the prompts."
        )


def _loss_mask(sequence: Tokens) -> np.ndarray:
    mask = np.zeros(len(sequence.ids), np.int8)
    for start, end in sequence.spans:
        mask[start:end] = 1
    return mask


def _encode_chunk(
    chunk: Sequence[tuple[int, Row]], tokenizer: Any, settings: ExampleSettings
) -> Iterator[Found]:
    eos, skip = _eos_id(tokenizer), settings.bad_rows == "skip"
    if settings.template == "chat":
        with renderer_for(tokenizer, settings).ready() as chat:
            for number, row in chunk:
                encode = functools.partial(
                    encode_conversation, row, settings, chat, eos, f"row {number}"
                )
                yield from or_bad(number, encode, skip=skip)
        return
    encoded = _encoded_texts(chunk, tokenizer, settings, eos)
    for number, _ in chunk:
        encode = functools.partial(next, encoded[number])
        yield from or_bad(number, encode, skip=skip)


def _encoded_texts(
    chunk: Sequence[tuple[int, Row]], tokenizer: Any, settings: ExampleSettings, eos: int
) -> Mapping[int, Iterator[list[Tokens]]]:
    """What each row gives when it is asked for; all texts are tokenised at once."""
    texts: dict[int, tuple[str, str]] = {}
    errors: dict[int, InputError] = {}
    for number, row in chunk:
        try:
            texts[number] = _texts(row, settings, f"row {number}")
        except InputError as error:
            errors[number] = error
    ids = dict(zip(texts, _both_ids(list(texts.values()), tokenizer, settings), strict=True))

    def give(number: int) -> Iterator[list[Tokens]]:
        if number in errors:
            raise errors[number]
        prompt, response = ids[number]
        if settings.template == "text":
            whole = prompt + _end_once(response, eos)
            yield [Tokens(whole, [(max(len(prompt), 1), len(whole))])]
            return
        _check_prompt(prompt, f"row {number}")
        whole = prompt + _end_once(response, eos)
        yield [Tokens(whole, [(len(prompt), len(whole))])]

    return {number: give(number) for number, _ in chunk}


def _texts(row: Row, settings: ExampleSettings, where: str) -> tuple[str, str]:
    """Prompt and response; a raw text has no prompt."""
    prompt = "" if settings.template == "text" else prompt_text(row, settings, where)
    return prompt, response_text(row, settings, where)


def _both_ids(
    texts: Sequence[tuple[str, str]], tokenizer: Any, settings: ExampleSettings
) -> Iterator[tuple[list[int], list[int]]]:
    if not texts:
        return iter(())
    prompts, responses = (list(column) for column in zip(*texts, strict=True))
    return zip(text_ids(prompts, tokenizer), _plain_ids(responses, tokenizer), strict=True)


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


def text_ids(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """The ids of prompts: what the tokenizer puts before every text (BOS), once, then the text.

    What it puts behind (EOS) is left out: the text goes on.
    """
    probe = tokenizer("a", add_special_tokens=True, return_special_tokens_mask=True)
    leading = itertools.takewhile(
        lambda pair: pair[1], zip(probe["input_ids"], probe["special_tokens_mask"], strict=True)
    )
    start = [token for token, _ in leading]
    return [
        ids if start and ids[: len(start)] == start else start + ids
        for ids in _plain_ids(texts, tokenizer)
    ]
