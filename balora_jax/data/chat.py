"""A conversation as the tokenizer's own chat template writes it, within bounds of time and memory.

A template is a program that somebody else wrote. ``transformers`` runs it in a sandbox, which keeps
it from files and from Python, but not from running forever or filling the memory.
"""

import ast
import contextlib
import ctypes
import datetime
import functools
import math
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from balora_jax.errors import InputError
from balora_jax.untyped.native import any_error_refused
from balora_jax.untyped.shown import one_line, shown

SECONDS = 10.0
"""Of one rendering; a common template needs a thousandth."""
MOST_BYTES = 2**30
"""Of address space that a rendering may take beside what is in use."""
MOST_CHARACTERS = 2**20
"""Of a rendering, beside ten times those of the conversation: more is no writing of it."""
_REMEDY = "Fix the row or use a text template."
# One step of Python that may take hours, and that nothing can stop.
_POWERS = (("operator", "**"), ("name", "round"))

Message = dict[str, Any]


class Chat(NamedTuple):
    """Conversation as a chat template takes it.

    Attributes:
        messages: ``role``, ``content`` and what else a turn has.
        tools: descriptions of functions; None for none.
        learnt: of each message, whether it may be learnt.
    """

    messages: list[Message]
    tools: list[Any] | None
    learnt: list[bool]

    def upto(self, count: int) -> "Chat":
        """Its first messages."""
        return self._replace(messages=self.messages[:count], learnt=self.learnt[:count])


class Renderer:
    """A chat template, checked and ready.

    Attributes:
        tokenizer: a ``transformers`` tokenizer.
        template: text of the template in use.

    Args:
        tokenizer: whose template it is, unless ``template`` is given.
        template: a text instead of the tokenizer's own.
        options: variables that the template is given.
        today: the day that a template is told which asks for one.

    Raises:
        InputError: no template, one that takes powers, or one that asks for the time of day.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str | None = None,
        options: Mapping[str, Any] | None = None,
        today: datetime.date | None = None,
    ):
        self.tokenizer = tokenizer
        self._limit = _Limit()
        self._options = dict(options or {})
        if not (template or tokenizer.chat_template):
            raise InputError(
                "tokenizer: expected a chat template, got none. "
                "Use the template alpaca or plain, or a text of your own."
            )
        with any_error_refused("tokenizer: expected a chat template", "Use a text template."):
            self.template: str = template or tokenizer.get_chat_template()
            found = _powers(_jinja2(), self.template)
            clock = _clock(_jinja2(), self.template, today or datetime.date.today())
        if found:
            raise InputError(
                f"tokenizer: expected a chat template that writes text, got one that computes "
                f"({', '.join(found)}). Use a text template."
            )
        self._given = clock + self.template if template or clock else None

    @contextlib.contextmanager
    def ready(self) -> Iterator["Renderer"]:
        """While somebody looks at the time: renderings happen inside."""
        with self._limit.watched():
            yield self

    def ids(self, text: str) -> list[int]:
        """The token ids of what was rendered."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def text(self, chat: Chat, where: str, *, generation: bool) -> str:
        """A conversation as the template writes it.

        Args:
            chat: its turns.
            where: the row, for messages.
            generation: whether the beginning of the next answer is added.

        Raises:
            InputError: the template does not take the conversation, does not end, writes far more
                than it holds, or nothing of the last turn.
        """
        expected = f"{where}: expected a conversation that the chat template takes"
        try:
            with any_error_refused(expected, _REMEDY), self._limit.one(), _memory_limited():
                text = self.tokenizer.apply_chat_template(
                    list(chat.messages),
                    tools=chat.tools,
                    chat_template=self._given,
                    add_generation_prompt=generation,
                    tokenize=False,
                    **self._options,
                )
        except _EndlessError as error:
            raise InputError(
                f"{where}: expected a chat template that comes to an end, got one that did not in "
                f"{SECONDS:g} s. Use a text template."
            ) from error
        if len(text) > MOST_CHARACTERS and len(text) > 10 * len(repr(chat)) + MOST_CHARACTERS:
            raise InputError(
                f"{where}: expected a chat template that writes the conversation, got "
                f"{len(text):,} characters of one of {len(repr(chat)):,}. Use a text template."
            )
        words = content_text(chat.messages[-1].get("content")).split()
        if words and not any(word in text for word in words):
            raise InputError(
                f"{where}: expected a chat template that writes the conversation, got "
                f"{shown(one_line(text))}, which has nothing of message {len(chat.messages)}. "
                "Use a text template."
            )
        return text

    def mentions(self, name: str) -> bool:
        """Whether the template has a word in it, as it must to read what has that name."""
        return re.search(rf"\b{re.escape(name)}\b", self.template) is not None


def content_text(content: Any) -> str:
    """The text of a message's content: of a list of parts, all of them joined."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content or ())


def _jinja2() -> Any:
    try:
        # Only chat templates need it, and transformers does not bring it along.
        import jinja2
    except ImportError as error:
        raise InputError(
            "tokenizer: expected the package jinja2, which renders chat templates, got none. "
            "Run: pip install jinja2"
        ) from error
    return jinja2


@functools.lru_cache(maxsize=8)
def _powers(jinja2: Any, template: str) -> tuple[str, ...]:
    """Operators and filters of a template that one number can make endless."""
    tokens = {(kind, text) for _, kind, text in jinja2.Environment().lex(template)}
    return tuple(sorted(text for _, text in tokens.intersection(_POWERS)))


@functools.lru_cache(maxsize=8)
def _clock(jinja2: Any, template: str, today: datetime.date) -> str:
    """What defines ``strftime_now`` before a template that calls it: the day, whatever the clock.

    ``transformers`` gives a template the time of now, so that a text would change from day to day.
    """
    tokens = [(kind, text) for _, kind, text in jinja2.Environment().lex(template)]
    tokens = [(kind, text) for kind, text in tokens if kind != "whitespace"]
    formats = set()
    for i, token in enumerate(tokens):
        # "strftime_now is defined" asks only.
        if token == ("name", "strftime_now") and tokens[i + 1 : i + 2] == [("operator", "(")]:
            formats.add(tokens[i + 2] if i + 2 < len(tokens) else ("", ""))
    if not formats:
        return ""
    day = datetime.datetime.combine(today, datetime.time())
    cases = []
    for kind, quoted in sorted(formats):
        if kind != "string" or re.search("%[^-#]?[HIMSfpXcsT+]", quoted):
            raise InputError(
                "tokenizer: expected a chat template that asks for the day alone, got "
                f"strftime_now({shown(one_line(quoted))}). Give data.chat_template one without it."
            )
        form = ast.literal_eval(quoted)
        cases.append(f"{{%- if f == {quoted} -%}}{{{{ {day.strftime(form)!r} }}}}{{%- endif -%}}")
    # After an expression, unlike a block, the line break that a template begins with stays.
    return f"{{%- macro strftime_now(f) -%}}{''.join(cases)}{{%- endmacro -%}}{{{{ '' }}}}"


class _EndlessError(InputError):
    """Raised in the thread that renders, by the one that looks at the time."""


class _Limit:
    """A limit of time on what a thread does in Python, whichever thread it is.

    A signal reaches the main thread only, and a child process would have to load ``transformers``
    for every run; an exception that another thread sets is raised between two instructions of
    Python, and a template is nothing but these.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread = 0
        self._deadline = math.inf

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """While a thread looks at the time."""
        stop = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(stop,), name="chat", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            stop.set()
            watcher.join()

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """One piece of work of the calling thread."""
        with self._lock:
            self._thread, self._deadline = threading.get_ident(), time.monotonic() + SECONDS
        try:
            yield
        finally:
            with self._lock:
                self._deadline = math.inf

    def _watch(self, stop: threading.Event) -> None:
        while not stop.wait(0.2):
            with self._lock:
                if time.monotonic() > self._deadline:
                    self._deadline = math.inf
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(
                        ctypes.c_ulong(self._thread), ctypes.py_object(_EndlessError)
                    )


@contextlib.contextmanager
def _memory_limited() -> Iterator[None]:
    """While this process may take little more memory: a text of a gigabyte is a MemoryError."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):  # not on Linux
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MOST_BYTES
    others = [one for one in (soft, hard) if one != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([limit, *others]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
