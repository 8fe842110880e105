"""What a message shows of a value: one line, bounded, escaped."""

import time

import pytest

from balora_jax.untyped.shown import one_line, shown


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("eight", "'eight'"),
        (8, "8"),
        (None, "None"),
        ([1, "a", None, 2.5], "[1, 'a', None, 2.5]"),
        ((1, 2), "(1, 2)"),
        ({"r": {"q": True}}, "{'r': {'q': True}}"),
        ("a\nb\r\tc", r"'a\nb\r\tc'"),
        ("\x1b[31mred\x07", r"'\x1b[31mred\x07'"),
        ("admin\u202etxt", r"'admin\u202etxt'"),
        ("line\u2028break\x85", r"'line\u2028break\x85'"),
        ("half \ud800", r"'half \ud800'"),
        ("Zürich 東京", "'Zürich 東京'"),
        (b"\xff", r"b'\xff'"),
        (float("nan"), "nan"),
    ],
)
def test_a_value_stands_as_python_writes_it(value, expected):
    assert shown(value) == expected


def test_of_a_number_of_many_digits_the_size():
    assert shown([10**6000]) == "[a whole number of 19932 bits]"


def holding_itself():
    value = []
    value.append({"me": value})
    return value


def a_bomb():
    value = ["lol"] * 10
    for _ in range(60):
        value = [value] * 10
    return value


def deep():
    value = []
    for _ in range(100_000):
        value = [value]
    return value


@pytest.mark.parametrize(
    "make",
    [
        lambda: "x" * 10**7,
        lambda: ["x" * 50] * 10**6,
        lambda: {"k" * 10**6: 1},
        a_bomb,
        holding_itself,
        deep,
    ],
    ids=["text", "list", "key", "bomb", "circle", "deep"],
)
def test_a_large_value_is_cut_in_no_time(make):
    value = make()
    begin = time.perf_counter()
    text = shown(value)
    assert time.perf_counter() - begin < 1
    assert len(text) <= 100
    assert "…" in text


def test_an_object_that_writes_much_is_cut():
    class Long:
        def __repr__(self):
            return "a\n" * 10**5

    assert shown(Long()) == r"a\n" * 33 + "…"


def test_a_sentence_is_one_line():
    assert one_line("a: expected b,\ngot \x1b]0;title\x07. Do c.") == (
        r"a: expected b,\ngot \x1b]0;title\x07. Do c."
    )
    assert one_line("Zürich: „fünf“ ≤ 5 → 6") == "Zürich: „fünf“ ≤ 5 → 6"


@pytest.mark.parametrize("character", ["\n", "\x00", "\u2028", "é"])
def test_a_long_sentence_keeps_both_ends(character):
    line = one_line("config.yaml: got " + character * 10**6 + ". Correct it.", most=200)
    assert len(line) == 200
    assert line.startswith("config.yaml: got ")
    assert line.endswith(". Correct it.")
    assert line.count("…") == 1
    assert line.isprintable()
