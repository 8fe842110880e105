"""Texts that templates take from rows, raw text, and rows that are left out."""

import pytest

from balora_jax.data.examples import describe_example, encode_prompt, encode_rows
from balora_jax.data.template_files import read_template, template_of
from balora_jax.data.templates import ExampleSettings, branch_of, prompt_text, unread_columns
from balora_jax.errors import InputError
from tests.data import tiny_tokenizer as tiny

BOTH = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nSum\n\n### Input:\n1, 2\n\n### Response:"
)
ALONE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\nSum\n\n### Response:"
)


@pytest.mark.parametrize(
    ("row", "text", "branch"),
    [
        ({"instruction": "Sum", "input": "1, 2"}, BOTH, "with input"),
        ({"instruction": "Sum", "input": ""}, ALONE, "without input"),
        ({"instruction": "Sum", "input": "  "}, ALONE, "without input"),
        ({"instruction": "Sum", "input": None}, ALONE, "without input"),
        ({"instruction": "Sum", "input": float("nan")}, ALONE, "without input"),
        ({"instruction": "Sum"}, ALONE, "without input"),
    ],
)
def test_alpaca_is_two_prompts(row, text, branch):
    """The input was dropped without a word."""
    assert prompt_text(row, ExampleSettings(), "row 1") == text
    assert branch_of(row, ExampleSettings()) == branch
    other = {"q": row["instruction"], **({"i": row["input"]} if "input" in row else {})}
    chosen = ExampleSettings("alpaca", "q", "a", input_column="i")
    assert prompt_text(other, chosen, "row 1") == text


@pytest.mark.parametrize(
    ("template", "row", "text"),
    [
        ("{q}{h?}!", {"q": "x", "h": "y"}, "xy!"),
        ("{q}{h?}!", {"q": "x", "h": None}, "x!"),
        ("{q}{h?}!", {"q": "x"}, "x!"),
        ("{#s}[{s}] {/s}{q}", {"q": "x", "s": "be brief"}, "[be brief] x"),
        ("{#s}[{s}] {/s}{q}", {"q": "x", "s": ""}, "x"),
        ("{^s}none {/s}{q}", {"q": "x"}, "none x"),
        ("{#s}{#t}{s}{t}{/t}{^t}{s} alone{/t}{/s}{q}", {"q": "x", "s": "S"}, "S alonex"),
        ("{#s}{#t}{s}{t}{/t}{^t}{s} alone{/t}{/s}{q}", {"q": "x", "s": "S", "t": 0}, "S0x"),
        ("{{{q}}}", {"q": "x"}, "{x}"),
    ],
)
def test_places_and_sections(template, row, text):
    assert prompt_text(row, ExampleSettings(template, response_column="a"), "row 1") == text


def test_a_template_may_be_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_bytes(b"\xef\xbb\xbfQ: {q}\r\nA:\n")
    assert template_of("mine.txt") == "Q: {q}\r\nA:"
    assert template_of(str(tmp_path / "mine.txt")) == "Q: {q}\r\nA:"
    assert [template_of(name) for name in ("alpaca", "chat", "{q}", "absent.txt")] == [
        *("alpaca", "chat", "{q}", "absent.txt")
    ]
    for content, message in (
        (b"\xff\xfe", "expected UTF-8 text, got other bytes"),
        (b" \n", "expected a template of up to 1 MiB, got none"),
        (b"x" * (2**20 + 1), "expected a template of up to 1 MiB, got more"),
    ):
        (tmp_path / "bad.txt").write_bytes(content)
        with pytest.raises(InputError, match=message):
            template_of("bad.txt")
    with pytest.raises(InputError, match=r"data.chat_template: expected a file, got none at 'no'"):
        read_template("no", "data.chat_template")


def test_columns_that_nothing_reads_are_named():
    row = {"instruction": "a", "input": "b", "output": "c", "system": "d", "id": 7, "empty": ""}
    assert unread_columns(row, ExampleSettings()) == ["system", "id"]
    assert unread_columns(row, ExampleSettings("plain")) == ["input", "system", "id"]
    assert unread_columns(row, ExampleSettings("{system?}{instruction}")) == ["input", "id"]
    messages = ExampleSettings("chat", messages_column="m")
    assert unread_columns({"m": [1], "tools": [2], "source": "x"}, messages) == ["source"]


@pytest.mark.parametrize("bos", [True, False])
def test_raw_text_is_learnt_whole(bos):
    """The start of text is not: nothing predicts it; nor is the first token where there is none."""
    tokenizer = tiny.make(bos=bos)
    chosen = ExampleSettings("text", response_column="t")
    (example,) = encode_rows([{"t": "zyx"}], tokenizer, chosen).examples
    z, y, x = tokenizer.convert_tokens_to_ids(["z", "y", "x"])
    assert example.input_ids.tolist() == [*([0] if bos else []), z, y, x, 1]
    assert example.loss_mask.tolist() == [0, *([1] if bos else []), 1, 1, 1]
    prompt = ExampleSettings("text", "t", "t")
    assert encode_prompt({"t": "zy"}, tokenizer, prompt) == [*([0] if bos else []), z, y]


def test_long_raw_texts_are_split_cut_or_dropped():
    tokenizer = tiny.make()
    z = tokenizer.convert_tokens_to_ids("z")
    rows = [{"t": "z" * 8}, {"t": "z"}]

    def encoded(overlong, limit=4):
        return encode_rows(
            rows,
            tokenizer,
            ExampleSettings("text", response_column="t", max_length=limit, overlong=overlong),
        )

    split = encoded("split").examples
    assert [e.input_ids.tolist() for e in split] == [[0, z, z, z], [z] * 4, [z, 1], [0, z, 1]]
    assert [e.loss_mask.tolist() for e in split] == [[0, 1, 1, 1]] * 2 + [[0, 1], [0, 1, 1]]
    # A last part of one token has nothing to learn from.
    assert [len(e.input_ids) for e in encoded("split", 3).examples] == [3, 3, 3, 3]
    assert [e.input_ids.tolist() for e in encoded("truncate").examples] == [[0, z, z, z], [0, z, 1]]
    assert [e.input_ids.tolist() for e in encoded("drop").examples] == [[0, z, 1]]


ROWS = [
    {"q": "a", "a": "b"},
    {"q": "a", "a": ""},
    {"q": "a"},
    {"q": ["a"], "a": "b"},
    {"q": "c", "a": "d"},
]


@pytest.mark.parametrize("template", ["plain", "{q}", "text"])
def test_bad_rows_are_counted_and_listed(template):
    tokenizer = tiny.make()
    chosen = ExampleSettings(template, "q", "a", bad_rows="skip")
    found = encode_rows(ROWS, tokenizer, chosen)
    bad = {bad.row: bad.reason for bad in found.bad}
    assert list(bad) == ([2, 3] if template == "text" else [2, 3, 4])
    assert bad[2].startswith("row 2: expected text in the column 'a', got an empty cell.")
    assert bad[3].startswith("row 3: expected a column 'a'")
    assert (found.report.rows, found.report.bad) == (5, len(bad))
    assert found.report.kept == len(found.examples) == 5 - len(bad)
    assert f"({len(bad)} that cannot be read, 0 truncated" in str(found.report)
    good = [row for number, row in enumerate(ROWS, 1) if number not in bad]
    alone = encode_rows(good, tokenizer, ExampleSettings(template, "q", "a"))
    for one, other in zip(found.examples, alone.examples, strict=True):
        assert describe_example(one, tokenizer) == describe_example(other, tokenizer)
    with pytest.raises(InputError, match="row 2: expected text in the column 'a'"):
        encode_rows(ROWS, tokenizer, ExampleSettings(template, "q", "a"))


def test_no_row_that_can_be_read():
    chosen = ExampleSettings("plain", "q", "a", bad_rows="skip")
    with pytest.raises(InputError) as error:
        encode_rows(ROWS[1:3], tiny.make(), chosen)
    assert str(error.value).startswith(
        "data: expected rows that can be read, got none of 2. The first says: row 2: expected".replace(
            "row 2", "row 1"
        )
    )


def test_bad_conversations_are_left_out():
    good = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    rows = [{"m": good}, {"m": good[:1]}, {"m": []}, {"m": good}]
    chosen = ExampleSettings("chat", messages_column="m", bad_rows="skip")
    found = encode_rows(rows, tiny.make(eos=tiny.END, chat=tiny.CHAT), chosen)
    assert ([bad.row for bad in found.bad], found.report.kept) == ([2, 3], 2)
