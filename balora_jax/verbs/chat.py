"""``balora chat``: questions and answers, written as they come."""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from balora_jax.errors import InputError
from balora_jax.verbs.verb import Verb

if TYPE_CHECKING:
    from balora_jax.config import RunConfig


class _Setting(argparse.Action):
    """Option that is another name of a setting of the config."""

    def __init__(self, *names: Any, key: str, **options: Any):
        super().__init__(*names, default=argparse.SUPPRESS, **options)
        self.key = key

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        del parser, option_string
        namespace.set = [*namespace.set, f"{self.key}={values}"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Who answers, what stands first, and how answers are drawn."""
    parser.add_argument("--adapter", help="PEFT folder; the base alone without it")
    parser.add_argument(
        "--compare", action="store_true", help="the base answers too, before the adapter"
    )
    parser.add_argument("--system", metavar="TEXT", help="first message of the conversation")
    for name in ("temperature", "top_p", "max_new_tokens"):
        option = f"--{name.replace('_', '-')}"
        key = f"eval.{name}"
        parser.add_argument(option, action=_Setting, key=key, metavar="N", help=f"as {key}")


def run(config: "RunConfig", options: argparse.Namespace) -> None:
    """Answer every line of standard input; ``/reset`` begins anew, ``/exit`` ends."""
    from balora_jax.io.program_cache import kept
    from balora_jax.tasks.registry import TASKS

    open_chat = TASKS[config.task].chat
    if open_chat is None:
        raise InputError(f"chat: expected task text, got {config.task}. Use balora eval.")
    if options.system is not None and not options.system.strip():
        raise InputError("--system: expected text, got none. Leave it out.")
    with kept(config.training.compilation_cache):
        chat = open_chat(
            config, adapter=options.adapter, compare=options.compare, system=options.system
        )
        terminal = sys.stdin is not None and sys.stdin.isatty()
        names = " and ".join(speaker.name for speaker in chat.speakers)
        if terminal:
            _say(f"{chat.name}, {names}: /reset begins anew, /exit or Ctrl-D ends")
        if chat.stands_alone:
            _say("note: data.template is no conversation: each question is asked alone")
        for question in _questions(terminal):
            if question == "/reset":
                chat.reset()
                continue
            try:
                answers = chat.ask(question)
            except InputError as error:
                if not terminal:
                    raise
                _say(str(error))
                continue
            _write(answers, config.eval.max_new_tokens)


def _write(answers: Sequence[tuple[Any, Iterator[str]]], most: int) -> None:
    """Write each answer as it comes, with the name of who gives it where there are two."""
    for speaker, pieces in answers:
        if len(answers) > 1:
            print(f"{speaker.name}: ", end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print(flush=True)
        if speaker.cut:
            _say(f"note: the answer was cut after {most} tokens (--max-new-tokens)")


def _questions(terminal: bool) -> Iterator[str]:
    """Lines of standard input that hold something, up to its end or ``/exit``.

    Raises:
        InputError: a line that is no UTF-8.
    """
    if terminal:
        with contextlib.suppress(ImportError):  # not on every system
            import readline  # noqa: F401  # input() takes the arrow keys from it
    while sys.stdin is not None:
        try:
            line = input("> " if terminal else "").strip()
            line.encode()
        except EOFError:
            break
        except UnicodeError as error:
            raise InputError(
                "standard input: expected text in UTF-8, got other bytes. Convert it."
            ) from error
        if line == "/exit":
            return
        if line:
            yield line
    if terminal:
        print()  # the shell goes on below the last prompt


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


VERB = Verb("chat", "ask, and read the answers as they come", add_options, run)
