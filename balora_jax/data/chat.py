"""A conversation as the tokenizer's own chat template writes it, within bounds of time and memory.

A template is a program that somebody else wrote. ``transformers`` runs it in a sandbox, which keeps
it from files and from Python, but not from running forever or filling the memory.
"""

import contextlib
import ctypes
import functools
import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from balora_jax.data.templates import Message
from balora_jax.errors import InputError
from balora_jax.untyped.native import any_error_refused
from balora_jax.untyped.shown import one_line, shown

SECONDS = 10.0
"""Of one rendering; a common template needs a thousandth."""
MOST_BYTES = 2**30
"""Of address space that a rendering may take beside what is in use."""
_REMEDY = "Fix the row or use a text template."
# One step of Python that may take hours, and that nothing can stop.
_POWERS = (("operator", "**"), ("name", "round"))


class Renderer:
    """The chat template of a tokenizer, checked and ready.

    Attributes:
        tokenizer: a ``transformers`` tokenizer.

    Raises:
        InputError: no template, or one that takes powers.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._limit = _Limit()
        if not tokenizer.chat_template:
            raise InputError(
                "tokenizer: expected a chat template, got none. "
                "Use the template alpaca or plain, or a text of your own."
            )
        with any_error_refused("tokenizer: expected a chat template", "Use a text template."):
            found = _powers(_jinja2(), tokenizer.get_chat_template())
        if found:
            raise InputError(
                f"tokenizer: expected a chat template that writes text, got one that computes "
                f"({', '.join(found)}). Use a text template."
            )

    @contextlib.contextmanager
    def ready(self) -> Iterator["Renderer"]:
        """While somebody looks at the time: renderings happen inside."""
        with self._limit.watched():
            yield self

    def ids(self, messages: Sequence[Message], where: str, *, generation: bool) -> list[int]:
        """The token ids of a conversation.

        Args:
            messages: its turns.
            where: the row, for messages.
            generation: whether the beginning of the next answer is added.

        Raises:
            InputError: the template does not take the conversation, does not end, or writes
                nothing of the last turn.
        """
        text = self._text(messages, where, generation=generation)
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _text(self, messages: Sequence[Message], where: str, *, generation: bool) -> str:
        expected = f"{where}: expected a conversation that the chat template takes"
        try:
            with any_error_refused(expected, _REMEDY), self._limit.one(), _memory_limited():
                text = self.tokenizer.apply_chat_template(
                    list(messages), add_generation_prompt=generation, tokenize=False
                )
        except _EndlessError as error:
            raise InputError(
                f"{where}: expected a chat template that comes to an end, got one that did not in "
                f"{SECONDS:g} s. Use a text template."
            ) from error
        words = messages[-1]["content"].split()
        if words and not any(word in text for word in words):
            raise InputError(
                f"{where}: expected a chat template that writes the conversation, got "
                f"{shown(one_line(text))}, which has nothing of message {len(messages)}. "
                "Use a text template."
            )
        return text


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
