"""Examples: the border between prompt and response, the limit, and every refusal."""

import gzip
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from balora_jax.data import examples as examples_module
from balora_jax.data.examples import (
    Example,
    ExampleSettings,
    describe_example,
    encode_prompt,
    encode_rows,
)
from balora_jax.errors import InputError
from tests.data import tiny_tokenizer as tiny

SHARED = Path(__file__).parents[2].parent / "shared"
PLAIN = ExampleSettings("plain", "q", "a", max_length=10_000)
CHAT = ExampleSettings("chat", "q", "a", max_length=10_000)
TURNS = ExampleSettings("chat", messages_column="messages", max_length=10_000)

WITH_BOS = tiny.make()
WITHOUT_BOS = tiny.make(bos=False)
ADDS_BOTH = tiny.make(adds_eos=True)
TOKENIZERS = {"bos": WITH_BOS, "no bos": WITHOUT_BOS, "bos and eos": ADDS_BOTH}

# No "<": the text of a special token is that token, by design (see the module).
texts = st.text(
    st.characters(exclude_characters="<", exclude_categories=["Cs"]), min_size=1, max_size=40
).filter(lambda text: text.strip())


def one(row, tokenizer, settings):
    (example,) = encode_rows([row], tokenizer, settings).examples
    return example


def masked(example, tokenizer, learnt):
    return tokenizer.decode(example.input_ids[example.loss_mask == learnt].tolist())


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", ["plain", "alpaca", "Q: {q}\nA:"])
@settings(max_examples=40, deadline=None)
@given(prompt=texts, response=texts)
def test_the_mask_holds_the_response_and_eos_and_nothing_of_the_prompt(
    name, template, prompt, response
):
    tokenizer = TOKENIZERS[name]
    chosen = ExampleSettings(template, "q", "a", max_length=10_000)
    row = {"q": prompt, "a": response}
    example = one(row, tokenizer, chosen)
    assert masked(example, tokenizer, 1) == response + tiny.EOS
    written = {
        "plain": prompt,
        "Q: {q}\nA:": f"Q: {prompt}\nA:",
        "alpaca": "Below is an instruction that describes a task. Write a response that "
        f"appropriately completes the request.\n\n### Instruction:\n{prompt}\n\n### Response:",
    }[template]
    start = "" if name == "no bos" else tiny.BOS
    assert masked(example, tokenizer, 0) == start + written
    # One block, at the end.
    assert np.all(np.diff(example.loss_mask.astype(int)) >= 0)
    assert (
        encode_prompt(row, tokenizer, chosen) == example.input_ids[example.loss_mask == 0].tolist()
    )


@pytest.fixture
def chat_tokenizer():
    pytest.importorskip("jinja2")
    return tiny.make(eos=tiny.END, chat=tiny.CHAT)


@settings(max_examples=40, deadline=None)
@given(prompt=texts, response=texts)
def test_the_chat_mask_holds_the_response_and_eos_only(prompt, response):
    pytest.importorskip("jinja2")
    tokenizer = tiny.make(eos=tiny.END, chat=tiny.CHAT)
    example = one({"q": prompt, "a": response}, tokenizer, CHAT)
    assert masked(example, tokenizer, 1) == response + tiny.END
    assert masked(example, tokenizer, 0) == f"<|turn|>user\n{prompt}<|end|>\n<|turn|>assistant\n"
    ids = example.input_ids[example.loss_mask == 0].tolist()
    assert encode_prompt({"q": prompt}, tokenizer, CHAT) == ids


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": "unanswered"},
]


def test_every_assistant_turn_of_a_conversation_is_learnt(chat_tokenizer):
    example = one({"messages": CONVERSATION}, chat_tokenizer, TURNS)
    runs = itertools.groupby(
        zip(example.loss_mask, example.input_ids, strict=True), key=lambda pair: pair[0]
    )
    decoded = [
        (int(learnt), chat_tokenizer.decode([int(token) for _, token in run]))
        for learnt, run in runs
    ]
    assert decoded == [
        (0, "<|turn|>system\nBe brief.<|end|>\n<|turn|>user\none<|end|>\n<|turn|>assistant\n"),
        (1, "two<|end|>"),
        (0, "\n<|turn|>user\nthree<|end|>\n<|turn|>assistant\n"),
        (1, "four<|end|>"),
    ]
    prompt = encode_prompt({"messages": CONVERSATION[:5]}, chat_tokenizer, TURNS)
    assert prompt == example.input_ids[: len(prompt)].tolist()
    assert chat_tokenizer.decode(prompt).endswith("three<|end|>\n<|turn|>assistant\n")
    open_end = encode_prompt({"messages": CONVERSATION[:2]}, chat_tokenizer, TURNS)
    assert chat_tokenizer.decode(open_end).endswith("one<|end|>\n<|turn|>assistant\n")


def test_sharegpt_turns_are_read_as_roles(chat_tokenizer):
    other = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    same = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    a, b = (one({"messages": turns}, chat_tokenizer, TURNS) for turns in (other, same))
    assert a.input_ids.tolist() == b.input_ids.tolist()


def test_a_chat_template_without_eos_gets_one_at_the_end():
    pytest.importorskip("jinja2")
    tokenizer = tiny.make(chat=tiny.CHAT_WITHOUT_EOS)
    example = one({"messages": CONVERSATION[1:5]}, tokenizer, TURNS)
    assert masked(example, tokenizer, 1) == "twofour</s>"
    assert example.input_ids.tolist().count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("response", ["yes", "yes</s>", "yes</s></s>"])
def test_eos_ends_the_response_once(response):
    example = one({"q": "x", "a": response}, WITH_BOS, PLAIN)
    assert masked(example, WITH_BOS, 1) == "yes</s>"


@pytest.mark.parametrize("prompt", ["hello", "<s>hello"])
def test_bos_begins_the_prompt_once(prompt):
    ids = encode_prompt({"q": prompt}, WITH_BOS, PLAIN)
    assert ids[0] == WITH_BOS.bos_token_id
    assert ids.count(WITH_BOS.bos_token_id) == 1


def test_numbers_are_written_as_text_and_braces_of_a_template_stay():
    chosen = ExampleSettings("{{{n}}} of {total size}:", response_column="a")
    row = {"n": 3, "total size": 4.5, "a": 42}
    example = one(row, WITH_BOS, chosen)
    assert masked(example, WITH_BOS, 0) == "<s>{3} of 4.5:"
    assert masked(example, WITH_BOS, 1) == "42</s>"


# One token a letter: lengths are counted by hand (BOS + prompt + response + EOS).
LENGTHS = [{"q": "zz", "a": "zzz"}, {"q": "z", "a": "z"}, {"q": "z" * 8, "a": "z"}]


def test_truncation_cuts_the_response_keeps_the_prompt_and_counts():
    chosen = ExampleSettings("plain", "q", "a", max_length=5)
    examples, report, _ = encode_rows(LENGTHS, WITH_BOS, chosen)
    z = WITH_BOS.convert_tokens_to_ids("z")
    assert [e.input_ids.tolist() for e in examples] == [[0, z, z, z, z], [0, z, z, 1]]
    assert [e.loss_mask.tolist() for e in examples] == [[0, 0, 0, 1, 1], [0, 0, 1, 1]]
    assert vars(report) == {
        "rows": 3,
        "kept": 2,
        "truncated": 1,
        "dropped": 0,
        "prompt_too_long": 1,
        "bad": 0,
        "tokens": 9,
        "loss_tokens": 4,
    }
    assert str(report) == (
        "2 examples of 3 rows (1 truncated, 0 dropped as too long, 1 with a prompt too long), "
        "9 tokens, 4 of them in the loss"
    )


def test_dropping_leaves_long_rows_out_and_counts():
    chosen = ExampleSettings("plain", "q", "a", max_length=5, overlong="drop")
    examples, report, _ = encode_rows(LENGTHS, WITH_BOS, chosen)
    assert [len(e.input_ids) for e in examples] == [4]
    assert (report.kept, report.truncated, report.dropped, report.prompt_too_long) == (1, 0, 1, 1)


def test_a_row_of_exactly_the_limit_is_whole():
    chosen = ExampleSettings("plain", "q", "a", max_length=7, overlong="drop")
    assert encode_rows(LENGTHS[:1], WITH_BOS, chosen).report.truncated == 0


def test_a_prompt_of_exactly_the_limit_cannot_train():
    chosen = ExampleSettings("plain", "q", "a", max_length=9)
    assert encode_rows(LENGTHS, WITH_BOS, chosen).report.prompt_too_long == 1


def test_order_is_kept_across_chunks_and_progress_is_shown(monkeypatch, capsys):
    monkeypatch.setattr(examples_module, "_CHUNK", 3)
    rows = [{"q": "n", "a": str(i)} for i in range(8)]
    examples = encode_rows(rows, WITH_BOS, PLAIN).examples
    assert [masked(e, WITH_BOS, 1) for e in examples] == [f"{i}</s>" for i in range(8)]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(examples_module, "_SHOW_PROGRESS_ABOVE", 7)
    encode_rows(rows, WITH_BOS, PLAIN)
    assert "tokenising" in capsys.readouterr().err


def test_describe_example_shows_the_mask():
    text = describe_example(one({"q": "hi", "a": "yes"}, WITH_BOS, PLAIN), WITH_BOS)
    head, body = text.split("\n")
    assert body == "<s>hi⟦yes</s>⟧"
    assert "in the loss" in head


REFUSED = {
    "missing column": (
        [{"q": "x", "a": "y"}, {"q": "x", "anser": "y"}],
        PLAIN,
        "row 2: expected a column 'a', got the columns q, anser.",
    ),
    "did you mean": (
        [{"instructions": "x", "output": "y"}],
        ExampleSettings("plain"),
        "row 1: expected a column 'instruction', got the columns instructions, output. "
        "Did you mean 'instructions'?",
    ),
    "null cell": (
        [{"q": "x", "a": None}],
        PLAIN,
        "row 1: expected text in the column 'a', got an empty cell.",
    ),
    "nan cell": ([{"q": float("nan"), "a": "y"}], PLAIN, "in the column 'q', got an empty cell."),
    "blank cell": ([{"q": " \n", "a": "y"}], PLAIN, "in the column 'q', got an empty cell."),
    "list cell": ([{"q": ["x"], "a": "y"}], PLAIN, "in the column 'q', got a list."),
    "no rows": ([], PLAIN, "data: expected at least one row, got none."),
    "prompts too long": (
        [{"q": "z" * 20, "a": "y"}, {"q": "z" * 12, "a": "y"}],
        ExampleSettings("plain", "q", "a", max_length=8),
        "data: expected prompts shorter than max_length = 8 tokens, got none: the shortest of 2 "
        "has 13 tokens. Raise max_length above that",
    ),
    "rows too long": (
        [{"q": "z", "a": "z" * 20}, {"q": "z", "a": "z" * 9}],
        ExampleSettings("plain", "q", "a", max_length=8, overlong="drop"),
        "data: expected rows of at most max_length = 8 tokens, got 2 longer ones: the shortest has "
        "12 tokens. Raise max_length or set overlong to truncate.",
    ),
    "template column": (
        [{"q": "x", "a": "y"}],
        ExampleSettings("{question}", response_column="a"),
        "row 1: expected a column 'question', got the columns q, a.",
    ),
    "attribute in a template": (
        [{"q": "x", "a": "y"}],
        ExampleSettings("{q.__class__}", response_column="a"),
        "row 1: expected a column 'q.__class__'",
    ),
    "no chat template": (
        [{"q": "x", "a": "y"}],
        CHAT,
        "tokenizer: expected a chat template, got none.",
    ),
    "turns not a list": (
        [{"messages": "hello"}],
        TURNS,
        "row 1: expected a list of turns in the column 'messages', got a str.",
    ),
    "no turns": ([{"messages": []}], TURNS, "in the column 'messages', got an empty one."),
    "turn without text": (
        [{"messages": [{"role": "user", "text": "x"}]}],
        TURNS,
        "row 1, turn 1: expected the keys role and content (or from and value), got the keys "
        "role, text.",
    ),
    "turn not a mapping": ([{"messages": ["x"]}], TURNS, "row 1, turn 1: expected the keys role"),
    "no assistant": (
        [{"messages": CONVERSATION[:2]}],
        TURNS,
        "row 1: expected at least one assistant turn to learn, got none.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_rows_are_refused_in_one_sentence(name):
    rows, chosen, message = REFUSED[name]
    tokenizer = tiny.make(chat=tiny.CHAT) if chosen is TURNS else WITH_BOS
    with pytest.raises(InputError) as error:
        encode_rows(rows, tokenizer, chosen)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"template": "alpacca"}, "got 'alpacca'. Did you mean 'alpaca'?"),
        ({"template": "{q"}, "template: expected a text with {column} places, got unmatched"),
        ({"template": "{q} {output}"}, "got the response column 'output', which would show"),
        ({"messages_column": "m"}, "template: expected 'chat' with messages_column 'm', got"),
        ({"overlong": "cut"}, "overlong: expected one of truncate, drop, split, got 'cut'."),
        (
            {"overlong": "split"},
            "overlong: expected truncate or drop with the template 'alpaca', got",
        ),
        ({"bad_rows": "mend"}, "bad_rows: expected one of stop, skip, got 'mend'."),
        ({"template": "{#a}x"}, "template: expected {/a}, got none. Close each section once."),
        ({"template": "{#a}{b}{/b}"}, "template: expected {/a}, got {/b}. Close"),
        ({"template": "{a}{/b}"}, "template: expected no end of a section, got {/b}. Close"),
        ({"template": "{a!r}"}, "expected the bare name of a column in a place, got 'a' with a"),
        ({"max_length": 1}, "max_length: expected at least 2 tokens, got 1."),
    ],
)
def test_bad_settings_are_refused_when_made(type_checks_off, fields, message):
    with pytest.raises(InputError) as error:
        ExampleSettings(**fields)
    assert message in str(error.value)


def test_a_tokenizer_without_eos_is_refused():
    with pytest.raises(InputError, match="tokenizer: expected an end-of-sequence token, got none"):
        encode_rows([{"q": "x", "a": "y"}], tiny.make(eos=None), PLAIN)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}[model]{% endif %}",
            "row 1: expected the chat template to write message 2 after its prompt, got "
            "'assistant]two' where the prompt has 'model]'. Set data.chat_template_kwargs or",
        ),
        (tiny.CHAT_REFUSING, "got: roles must alternate."),
        ("{{ '' }}", "got '', which has nothing of message"),
    ],
)
def test_chat_templates_that_cannot_be_masked_are_refused(template, message):
    pytest.importorskip("jinja2")
    with pytest.raises(InputError) as error:
        encode_rows([{"messages": CONVERSATION[1:5]}], tiny.make(chat=template), TURNS)
    assert message in str(error.value)


def test_chat_without_jinja2_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(InputError, match="Run: pip install jinja2"):
        encode_rows([{"q": "x", "a": "y"}], tiny.make(chat=tiny.CHAT), CHAT)


@pytest.mark.parametrize(
    ("ids", "mask"), [([1, 2], [0]), ([1, 2], [1, 1]), ([], []), ([[1]], [[0]])]
)
def test_an_example_keeps_its_first_token_out_of_the_loss(ids, mask):
    with pytest.raises(ValueError, match="Example: expected"):
        Example(np.array(ids, np.int32), np.array(mask, np.int8))


@pytest.fixture
def stories():
    folder = SHARED / "models" / "stories260k"
    if not folder.is_dir():
        pytest.skip("the shared folder is not there")
    return PreTrainedTokenizerFast.from_pretrained(folder)


def test_gsm8k_on_a_real_tokenizer(stories):
    file = SHARED / "data" / "math" / "gsm8k_train.jsonl.gz"
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, 200)]
    chosen = ExampleSettings(prompt_column="question", response_column="answer", max_length=512)
    examples, report, _ = encode_rows(rows, stories, chosen)
    assert report.kept + report.prompt_too_long == report.rows == 200
    assert report.truncated > 0
    whole = ExampleSettings("plain", "question", "answer", max_length=2048)
    for row, example in zip(rows, encode_rows(rows, stories, whole).examples, strict=True):
        # Letters that this small vocabulary lacks come back as its unknown token.
        learnt = example.input_ids[example.loss_mask == 1].tolist()
        assert learnt == [*stories.encode(row["answer"], add_special_tokens=False), 2]
        assert example.input_ids[example.loss_mask == 0].tolist() == stories.encode(row["question"])
    assert all(e.input_ids[0] == 1 and (e.input_ids == 1).sum() == 1 for e in examples)
