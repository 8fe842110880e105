"""Conversations with a base model, with an adapter on it, or with both side by side."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax

from balora_jax.array_types import PRNGKeyArray
from balora_jax.config import DataConfig, EvalConfig, ModelConfig
from balora_jax.data import chat as templates
from balora_jax.data.chat import Message
from balora_jax.data.examples import encode_prompt, renderer_for
from balora_jax.data.templates import ExampleSettings
from balora_jax.errors import InputError
from balora_jax.models.generation import Streamer
from balora_jax.pretrained.checkpoint import open_base
from balora_jax.pretrained.load import PretrainedModel, sampling_for
from balora_jax.pretrained.streaming import pieces
from balora_jax.tasks.text.score import example_settings, opened_model, question_row

_PROBE = "a"


class Turns:
    """The turns of one conversation, and the token ids that ask for the next answer.

    Args:
        tokenizer: of the training.
        settings: its templates.
        system: first message; None for none.

    Raises:
        InputError: a template that takes no system message, or that cannot ask a question.
    """

    def __init__(self, tokenizer: Any, settings: ExampleSettings, system: str | None):
        self._tokenizer, self._settings = tokenizer, settings
        self._first: list[Message] = []
        self._renderer = renderer_for(tokenizer, settings) if settings.template == "chat" else None
        if system is not None:
            self._first = [{"role": "system", "content": system}]
            self._check_system(system)
        self._turns = list(self._first)
        self.asking(_PROBE)

    def asking(self, question: str) -> list[int]:
        """The token ids before the answer: all turns, as the template of the training has them."""
        if self._renderer is None:
            row = question_row(question, self._settings)
            return encode_prompt(row, self._tokenizer, self._settings, "the question")
        turns = [*self._turns, {"role": "user", "content": question}]
        return self._renderer.ids(self._text(turns, "the conversation"))

    def add(self, question: str, answer: str) -> None:
        """A question that was answered; forgotten where each stands alone."""
        if self._renderer is not None:
            self._turns += [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]

    def reset(self) -> None:
        """Begin anew, with the system message alone."""
        self._turns = list(self._first)

    def _text(self, turns: Sequence[Message], where: str) -> str:
        assert self._renderer is not None
        conversation = templates.Chat(list(turns), None, [False] * len(turns))
        with self._renderer.ready() as ready:
            return ready.text(conversation, where, generation=True)

    def _check_system(self, system: str) -> None:
        if self._renderer is None:
            raise InputError(
                f"--system: expected data.template chat, got {self._settings.template!r}, which "
                "has no place for it. Leave it out."
            )
        asked = {"role": "user", "content": _PROBE}
        if system.strip() not in self._text([*self._first, asked], "--system"):
            raise InputError(
                "--system: expected a chat template that writes a system message, got one that "
                "leaves it out. Leave it out too, or set data.chat_template."
            )


class Speaker:
    """A model that answers, with its own turns.

    Attributes:
        name: ``base`` or ``adapter``.
        cut: whether its last answer ended at ``eval.max_new_tokens``, and not of itself.
    """

    def __init__(
        self, name: str, model: PretrainedModel, tokenizer: Any, turns: Turns, config: EvalConfig
    ):
        self.name, self.cut = name, False
        self._model, self._tokenizer, self._turns = model, tokenizer, turns
        self._new = config.max_new_tokens
        sampling = sampling_for(model.base, tokenizer, self._new, config.temperature, config.top_p)
        self._stream = Streamer(model.bind, sampling, model.config.max_length)

    def asking(self, question: str) -> list[int]:
        """The token ids before the answer.

        Raises:
            InputError: they leave no room for the answer; no turn is dropped.
        """
        ids, positions = self._turns.asking(question), self._model.config.max_length
        if len(ids) + self._new > positions:
            raise InputError(
                f"the conversation: expected it and an answer within the {positions} positions of "
                f"{self._model.base.folder.name}, got {len(ids)} tokens and max_new_tokens "
                f"{self._new}. Begin anew with /reset, or lower --max-new-tokens."
            )
        self._model.base.check_prompts([ids], self._new)
        return ids

    def answer(self, question: str, ids: Sequence[int], key: PRNGKeyArray) -> Iterator[str]:
        """The answer in pieces, as its tokens are written; then it is one of the turns."""
        count, said = 0, []

        def counted() -> Iterator[int]:
            nonlocal count
            for token in self._stream(self._model.parts, ids, key):
                count += 1
                yield token

        for piece in pieces(self._tokenizer, ids, counted()):
            said.append(piece)
            yield piece
        self.cut = count == self._new
        self._turns.add(question, "".join(said))

    def reset(self) -> None:
        """Forget what was said."""
        self._turns.reset()


class Chat:
    """A conversation with one model or with two.

    Attributes:
        name: of the checkpoint.
        stands_alone: whether each question is asked without those before it, as the template of
            the training is no conversation.
        speakers: who answers, in this order.
    """

    def __init__(self, name: str, speakers: Sequence[Speaker], seed: int, *, stands_alone: bool):
        self.name, self.speakers, self.stands_alone = name, tuple(speakers), stands_alone
        self._seed, self._asked = seed, 0

    def ask(self, question: str) -> list[tuple[Speaker, Iterator[str]]]:
        """Who answers a question, each with the pieces of the answer, to be read in this order.

        The first question draws as ``balora generate`` does, each later one anew.

        Raises:
            InputError: the conversation is too long for one of them; none has answered.
        """
        asked = [(speaker, speaker.asking(question)) for speaker in self.speakers]
        key = jax.random.key(self._seed + self._asked)
        self._asked += 1
        return [(speaker, speaker.answer(question, ids, key)) for speaker, ids in asked]

    def reset(self) -> None:
        """Forget what was said."""
        for speaker in self.speakers:
            speaker.reset()


def opened(
    named: ModelConfig,
    data: DataConfig,
    config: EvalConfig,
    *,
    seed: int,
    adapter: str | None,
    compare: bool,
    system: str | None,
) -> Chat:
    """A conversation with a base model, an adapter on it, or both.

    Args:
        named: the base.
        data: the templates of the training.
        config: how answers are drawn.
        seed: of the draws.
        adapter: a PEFT folder; None for the base alone.
        compare: whether the base answers beside the adapter, with the same weights in memory.
        system: the first message of every conversation; None for none.

    Raises:
        InputError: settings that do not fit each other, or whatever ``balora generate`` refuses.
    """
    if compare and adapter is None:
        raise InputError("--compare: expected --adapter DIR with it, got none. Name the adapter.")
    settings = example_settings(data)
    tokenizer = open_base(named.name_or_path, named.revision).tokenizer()
    Turns(tokenizer, settings, system)  # what is wrong is said before a weight is read
    model = opened_model(named, adapter)
    asked = [("base" if adapter is None else "adapter", model)]
    if compare:
        asked.insert(0, ("base", model.plain))
    speakers = [
        Speaker(name, one, tokenizer, Turns(tokenizer, settings, system), config)
        for name, one in asked
    ]
    alone = settings.template != "chat"
    return Chat(model.base.folder.name, speakers, seed, stands_alone=alone)
