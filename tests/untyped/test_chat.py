"""Chat templates that fail, never end, fill the memory or ignore the conversation."""

import os
import resource
import threading
import time

import pytest

from balora_jax.data import chat
from balora_jax.data.examples import ExampleSettings, encode_prompt, encode_rows
from balora_jax.errors import InputError
from tests.data import tiny_tokenizer as tiny

SETTINGS = ExampleSettings("chat", "q", "a", max_length=10_000)
ROW = {"q": "how many apples?", "a": "forty-two"}

FAILS = {
    "zero": ("{{ 1 // 0 }}", "integer division or modulo by zero"),
    "recursion": ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "recursion depth"),
    "import": ("{% import 'os' as os %}{{ os }}", "no loader for this environment"),
    "include": ("{% include '/etc/passwd' %}", "no loader for this environment"),
    "type": ("{{ 'a' + 1 }}", "can only concatenate str"),
    "index": ("{{ messages[99].content }}", "has no element 99"),
    "call": ("{{ gone() }}", "'gone' is undefined"),
    "class": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "raises": ("{{ raise_exception('no\\n\x1b[2J') }}", r"got: no \x1b[2J. Fix the row"),
    "long": ("{{ raise_exception('x' * 100000) }}", "xxx…xxx"),
    "range": ("{{ range(10 ** 1) | list }}", "that writes text, got one that computes (**)"),
    "power": ("{{ 9 ** 9 ** 9 }}", "that writes text, got one that computes (**)"),
    "round": ("{{ 1.5 | round(999999999, 'ceil') }}", "got one that computes (round)"),
    "terabyte": ("{{ 'x' * 1000000000000 }}", "got: MemoryError"),
    "memory": ("{% set n = namespace(x='x' * 99999) %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}"
               "{% endfor %}{{ n.x }}", "got: MemoryError"),
    "wide": ("{{ 'a' | center(99999999999) }}", "got: MemoryError"),
    "constant": ("always the same", "got 'always the same', which has nothing of message"),
    "no answer": ("{{ messages[0].content }}", "which has nothing of message 2"),
    "syntax": ("{% if %}", "Expected an expression"),
    "operator": ("{{ 1 ? 2 }}", "unexpected char '?'"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILS)
def test_what_fails_is_refused_in_a_sentence(name, monkeypatch):
    monkeypatch.setattr(chat, "MOST_BYTES", 2**28)  # so that filling it takes no time
    template, message = FAILS[name]
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(InputError) as error:
        encode_rows([ROW], tiny.make(chat=template), SETTINGS)
    said = str(error.value)
    assert message in said
    assert said.startswith(("row 1: expected", "tokenizer: expected"))
    assert said.isprintable()
    assert len(said) < 500
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def never_ending(monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 0.3)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    return tiny.make(chat="{{ messages[0].content }}" + loops)


def test_one_that_never_ends(monkeypatch):
    tokenizer = never_ending(monkeypatch)
    begin = time.monotonic()
    with pytest.raises(InputError) as error:
        encode_prompt({"q": "how many?"}, tokenizer, SETTINGS)
    assert time.monotonic() - begin < 30
    assert str(error.value) == (
        "row: expected a chat template that comes to an end, got one that did not in 0.3 s. Use "
        "a text template."
    )
    assert "chat" not in {thread.name for thread in threading.enumerate()}


def test_one_that_never_ends_outside_of_the_main_thread(monkeypatch):
    tokenizer, found = never_ending(monkeypatch), []

    def work():
        with pytest.raises(InputError, match="that comes to an end"):
            encode_rows([ROW], tokenizer, SETTINGS)
        found.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert found


def test_the_limit_is_of_one_rendering(monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 0.3)
    limit = chat._Limit()
    with limit.watched():
        for _ in range(4):
            with limit.one():
                time.sleep(0.15)
        time.sleep(0.7)  # between two, nothing is limited


def test_templates_by_name():
    two = [{"name": "a", "template": "x"}, {"name": "b", "template": "y"}]
    with pytest.raises(InputError, match="multiple chat templates with no default"):
        encode_rows([ROW], tiny.make(chat=two), SETTINGS)
    named = tiny.make(chat={"default": tiny.CHAT, "tool_use": "{{ 9 ** 9 }}"})
    plain = tiny.make(chat=tiny.CHAT)
    ids = [encode_prompt(ROW, one, SETTINGS) for one in (named, plain)]
    assert ids[0] == ids[1]
    assert os.path.exists("/proc/self/statm")  # else the cases of memory show nothing
