"""Patterns of others mean what they mean to `re`, and end."""

import re

import pytest

from balora_jax.errors import InputError
from balora_jax.untyped.patterns import end_match, whole_match

NAMES = (
    *("model.layers.0.self_attn.q_proj", "model.layers.12.mlp.down_proj", "q_proj", "lm_head"),
    *("transformer.h.3.attn.c_attn", "bert.encoder.layer.1.output.dense", "xq_proj", "", "a{,3}"),
)
PATTERNS = (
    *("q_proj", ".*q_proj", r".*\.(q|k|v)_proj", r"layers\.\d+\.mlp\..*", "(?:model|bert).*"),
    *(r".*\.[0-2]\..*", "[^.]+", ".*proj$", "^model.*", r"\w+", ".{3,8}", "a{,3}", "", "x|q_proj"),
    *(r"(?!.*mlp).*proj", r"(.)\1.*", "Q_PROJ", "[.]*", r".*(?<=q_)proj", "lm_head|.*down_proj"),
)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_answers_are_those_of_re(pattern):
    whole, end = whole_match(pattern, "here"), end_match(pattern, "here")
    for name in NAMES:
        assert whole(name) == (re.fullmatch(pattern, name) is not None)
        assert end(name) == (re.match(rf"(.*\.)?({pattern})$", name) is not None)


def test_flags_stand_in_front_as_in_re():
    assert whole_match("(?i)Q_PROJ", "here")("q_proj")
    with pytest.raises(InputError, match="expected a regular expression, got"):
        end_match("(?i)Q_PROJ", "here")  # PEFT's own pattern would not compile


@pytest.mark.parametrize(
    "pattern",
    ["(", "*a", "[z-a]", r"\p{L}", "(?P<x>a)(?P<x>b)", "(?<=a+)b", "a{99999999999999999999}",
     "(" * 3000 + ")" * 3000, "x" * 20_000, "a{e<=1}", "[[a]", r"(?z)a"],
)  # fmt: skip
def test_what_is_none_is_refused(pattern):
    for make in (whole_match, end_match):
        with pytest.raises(InputError) as error:
            make(pattern, "adapter.rank_pattern")
        said = str(error.value)
        assert said.startswith("adapter.rank_pattern: expected a regular expression, got '")
        assert said.endswith("). Correct it.")
        assert len(said) < 400


def test_one_that_does_not_end_is_refused(monkeypatch):
    monkeypatch.setattr("balora_jax.untyped.patterns.SECONDS", 0.2)
    matches = whole_match(r"(.|[a-z]|\w)+[0-9]\1", "adapter.target_modules")
    with pytest.raises(InputError) as error:
        matches(NAMES[0])
    assert str(error.value) == (
        r"adapter.target_modules: expected a regular expression that comes to an end, got "
        r"'(.|[a-z]|\\w)+[0-9]\\1', which did not in 0.2 s of work. Simplify it."
    )
