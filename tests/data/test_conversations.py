"""Conversations under the chat templates of twelve families, against texts worked out apart.

The reference renders with Jinja itself, and finds what is learnt by characters: the text of a
conversation that ends with an answer, less the text of its prompt. Offsets of the tokenizer tell
which tokens lie in it.
"""

import datetime
import json

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from balora_jax.data.examples import ExampleSettings, encode_prompt, encode_rows
from balora_jax.errors import InputError
from tests.data.chat_templates import FAMILIES

jinja2 = pytest.importorskip("jinja2")

DAY = datetime.date(2026, 1, 31)
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "How many apples?"},
    {"role": "assistant", "content": "Two apples."},
    {"role": "user", "content": "And pears?"},
    {"role": "assistant", "content": "Three pears,\nand a fig."},
    {"role": "user", "content": "In all?"},
    {"role": "assistant", "content": "Six."},
]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALLED = [
    TURNS[0],
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "5", "name": "add"},
    {"role": "assistant", "content": "Five."},
]
APART = {"qwen 3", "phi 3", "phi 3.5"}
"""Families that write earlier answers otherwise than last ones."""


# How Llama 3 and Qwen cut a text: line breaks stay together, whatever follows.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_tokenizer(family, *, words=WORDS):
    """Byte-level tokens that merge across blanks and line breaks; special ones stay whole."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if words is not None:
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(words), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    core.decoder = decoders.ByteLevel()
    special = list(dict.fromkeys((*family.special, family.eos)))
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    core.train_from_iterator([turn["content"] for turn in TURNS] + ["\n\n", "assistant\n"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=family.eos, chat_template=family.template,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def rendered(family, messages, *, generation, tools=None, **variables):
    """The template by Jinja alone."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )

    def raise_exception(message):
        raise ValueError(message)

    return environment.from_string(family.template).render(
        messages=messages, tools=tools, add_generation_prompt=generation,
        strftime_now=DAY.strftime, raise_exception=raise_exception, **variables,
    )  # fmt: skip


def reference(family, tokenizer, messages, turns, **more):
    """Ids and mask of one example that ends with the last of the turns."""
    whole = rendered(family, messages[: turns[-1] + 1], generation=False, **more)
    spans = []
    for turn in turns:
        start = len(rendered(family, messages[:turn], generation=True, **more))
        text = rendered(family, messages[: turn + 1], generation=False, **more)
        assert whole.startswith(text)
        learnt = text[start:]
        if family.eos in learnt:
            learnt = learnt[: learnt.rindex(family.eos) + len(family.eos)]
        spans.append((start, start + len(learnt)))
    found = tokenizer(whole[: spans[-1][1]], add_special_tokens=False, return_offsets_mapping=True)
    ids, mask = list(found["input_ids"]), []
    for first, last in found["offset_mapping"]:
        inside = [start <= first and last <= end for start, end in spans]
        assert any(inside) or all(last <= start or first >= end for start, end in spans)
        mask.append(int(any(inside)))
    if tokenizer.eos_token_id not in [one for one, m in zip(ids, mask, strict=True) if m][-1:]:
        ids, mask = [*ids, tokenizer.eos_token_id], [*mask, 1]
    return ids, mask


def encoded(row, tokenizer, **settings):
    chosen = ExampleSettings(
        "chat", messages_column="messages", max_length=10_000, today=DAY, **settings
    )
    return [
        (example.input_ids.tolist(), example.loss_mask.tolist())
        for example in encode_rows([row], tokenizer, chosen).examples
    ], chosen


@pytest.mark.parametrize("system", [False, True], ids=["", "system"])
@pytest.mark.parametrize("count", [1, 3], ids=["one", "three"])
@pytest.mark.parametrize("name", FAMILIES)
def test_ids_and_masks_are_those_of_the_texts(name, count, system):
    family = FAMILIES[name]
    tokenizer = make_tokenizer(family)
    messages = [*([SYSTEM] if system else []), *TURNS[: 2 * count]]
    row = {"messages": messages}
    if system and not family.system:
        if name == "phi 3":
            pytest.skip("this template leaves a system turn out without a word")
        with pytest.raises(InputError, match="roles must alternate"):
            encoded(row, tokenizer)
        return
    found, chosen = encoded(row, tokenizer)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    # A system text that moves with the last question is another text in every turn.
    apart = name in APART or (name == "mistral v0.3" and system)
    groups = [[turn] for turn in answers] if apart else [answers]
    assert found == [reference(family, tokenizer, messages, turns) for turns in groups]
    # Generation begins with the very ids that stand before the last answer.
    prompt = encode_prompt(row, tokenizer, chosen)
    ids, mask = found[-1]
    end = len(mask) - 1 - mask[::-1].index(1)
    start = end - next((i for i, m in enumerate(mask[end::-1]) if m == 0), end) + 1
    assert ids[:start] == prompt
    text = rendered(family, messages[: answers[-1]], generation=True)
    assert prompt == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.tools])
def test_tools_and_their_calls_reach_the_template(name):
    family = FAMILIES[name]
    tokenizer = make_tokenizer(family)
    for tools in (TOOLS, json.dumps(TOOLS)):
        found, _ = encoded({"messages": CALLED, "tools": tools}, tokenizer)
        try:
            expected = [reference(family, tokenizer, CALLED, [1, 3], tools=TOOLS)]
        except AssertionError:  # the last answer has a block of thoughts
            expected = [
                reference(family, tokenizer, CALLED, [turn], tools=TOOLS) for turn in (1, 3)
            ]
        assert found == expected
    learnt = [one for one, m in zip(*found[0], strict=True) if m]
    assert '"add"' in tokenizer.decode(learnt)


@pytest.mark.parametrize("name", ["llama 3", "gemma 3", "phi 3.5", "chatml"])
def test_tools_that_a_template_does_not_write_are_refused(name):
    tokenizer = make_tokenizer(FAMILIES[name])
    with pytest.raises(InputError, match="row 1: expected a chat template that takes tools"):
        encoded({"messages": TURNS, "tools": TOOLS}, tokenizer)
    with pytest.raises(InputError, match=r"turn 2: expected a chat template that takes tool_calls"):
        encoded({"messages": CALLED}, tokenizer)


def test_thoughts_are_learnt_where_the_template_writes_them():
    family = FAMILIES["qwen 3"]
    tokenizer = make_tokenizer(family)
    messages = [TURNS[0], {**TURNS[1], "reasoning_content": "Count."}]
    (found,), _ = encoded({"messages": messages}, tokenizer)
    assert found == reference(family, tokenizer, messages, [1])
    learnt = tokenizer.decode([one for one, m in zip(*found, strict=True) if m])
    assert learnt == "<think>\nCount.\n</think>\n\nTwo apples.<|im_end|>"
    with pytest.raises(InputError, match="expected a chat template that takes reasoning_content"):
        encoded({"messages": messages}, make_tokenizer(FAMILIES["chatml"]))


def test_thoughts_within_the_text():
    """Qwen3 takes them out of the text, and out of all answers but the last: one example each."""
    family = FAMILIES["qwen 3"]
    tokenizer = make_tokenizer(family)
    messages = [
        turn | ({"content": f"<think>\nWell.\n</think>\n\n{turn['content']}"} if i % 2 else {})
        for i, turn in enumerate(TURNS[:4])
    ]
    found, _ = encoded({"messages": messages}, tokenizer)
    assert found == [
        reference(family, tokenizer, messages[:2], [1]), reference(family, tokenizer, messages, [3])
    ]  # fmt: skip
    learnt = [
        tokenizer.decode([one for one, m in zip(*example, strict=True) if m]) for example in found
    ]
    assert learnt == [
        "<think>\nWell.\n</think>\n\nTwo apples.<|im_end|>",
        "<think>\nWell.\n</think>\n\nThree pears,\nand a fig.<|im_end|>",
    ]
    assert "Well." not in tokenizer.decode(found[1][0][: found[1][1].index(1)])


def test_variables_and_another_template():
    family = FAMILIES["qwen 3"]
    tokenizer = make_tokenizer(family)
    off = {"enable_thinking": False}
    (found,), chosen = encoded({"messages": TURNS[:2]}, tokenizer, chat_template_kwargs=off)
    assert found == reference(family, tokenizer, TURNS[:2], [1], **off)
    assert tokenizer.decode([one for one, m in zip(*found, strict=True) if m]) == (
        "Two apples.<|im_end|>"
    )
    prompt = encode_prompt({"messages": TURNS[:1]}, tokenizer, chosen)
    assert tokenizer.decode(prompt).endswith("<think>\n\n</think>\n\n")
    other = FAMILIES["chatml"]
    found, _ = encoded({"messages": TURNS}, tokenizer, chat_template=other.template)
    assert found == [reference(other, tokenizer, TURNS, [1, 3, 5])]


def test_a_token_that_would_straddle_the_border():
    """GPT-2's words: line breaks before a word are cut, at the end of a prompt they are one token.

    The ids of the prompt are those that generation starts from, and the answer's its own.
    """
    family = FAMILIES["llama 3"]
    tokenizer = make_tokenizer(family, words=None)
    found, chosen = encoded({"messages": TURNS}, tokenizer)
    for (ids, mask), turn in zip(found, (1, 3, 5), strict=True):
        prompt = encode_prompt({"messages": TURNS[:turn]}, tokenizer, chosen)
        text = rendered(family, TURNS[:turn], generation=True)
        assert prompt == tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = tokenizer(TURNS[turn]["content"] + "<|eot_id|>", add_special_tokens=False)
        assert ids == prompt + answer["input_ids"]
        assert mask == [0] * len(prompt) + [1] * len(answer["input_ids"])
    whole = tokenizer(rendered(family, TURNS, generation=False), add_special_tokens=False)
    assert whole["input_ids"][: len(prompt)] != prompt


def test_whole_or_turn_by_turn():
    family = FAMILIES["chatml"]
    tokenizer = make_tokenizer(family)
    row = {"messages": TURNS}
    found, _ = encoded(row, tokenizer, conversation="turns")
    assert found == [reference(family, tokenizer, TURNS, [turn]) for turn in (1, 3, 5)]
    found, _ = encoded(row, tokenizer, assistant_turns="last")
    assert found == [reference(family, tokenizer, TURNS, [5])]
    with pytest.raises(InputError, match="row 1: expected the chat template to write the beginnin"):
        encoded(row, make_tokenizer(FAMILIES["qwen 3"]), conversation="whole")


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}])
def test_turns_that_are_not_to_be_learnt(mark):
    family = FAMILIES["chatml"]
    tokenizer = make_tokenizer(family)
    turns = [*TURNS[:3], {**TURNS[3], **mark}, *TURNS[4:]]
    found, _ = encoded({"messages": turns}, tokenizer)
    assert found == [reference(family, tokenizer, TURNS, [1, 5])]
    found, _ = encoded({"messages": turns[:4]}, tokenizer)
    assert found == [reference(family, tokenizer, TURNS, [1])]
    none = [TURNS[0], {**TURNS[1], **mark}]
    with pytest.raises(InputError, match="at least one assistant turn to learn, got none"):
        encoded({"messages": none}, tokenizer)
    for wrong in (0.5, "0", 2, [0]):
        with pytest.raises(InputError, match="row 1, turn 2: expected weight to be 0 or 1, got"):
            encoded({"messages": [TURNS[0], {**TURNS[1], "weight": wrong}]}, tokenizer)


def test_other_spellings_of_the_same_conversation():
    family = FAMILIES["qwen 2.5"]
    tokenizer = make_tokenizer(family)
    expected, _ = encoded({"messages": [SYSTEM, *TURNS[:2]]}, tokenizer)
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    sharegpt = [
        {"from": names[turn["role"]], "value": turn["content"]} for turn in [SYSTEM, *TURNS[:2]]
    ]
    parts = [
        {**turn, "content": [{"type": "text", "text": turn["content"][:3]},
                             {"type": "text", "text": turn["content"][3:]}]}
        for turn in [SYSTEM, *TURNS[:2]]
    ]  # fmt: skip
    for turns in (sharegpt, parts):
        assert encoded({"messages": turns}, tokenizer)[0] == expected
    for row in (
        {"q": [SYSTEM, TURNS[0]], "a": [TURNS[1]]},
        {"q": [SYSTEM, TURNS[0]], "a": TURNS[1]["content"]},
    ):
        chosen = ExampleSettings("chat", "q", "a", max_length=10_000)
        (example,) = encode_rows([row], tokenizer, chosen).examples
        assert (example.input_ids.tolist(), example.loss_mask.tolist()) == expected[0]
    calls = [
        {"from": "human", "value": "How many apples?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2, "b": 3}}'},
        {"from": "observation", "value": "5"},
        {"from": "gpt", "value": "Five."},
    ]
    assert encoded({"messages": calls}, tokenizer)[0] == encoded({"messages": CALLED}, tokenizer)[0]


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (
            {"role": "critic", "content": "x"},
            "expected a role that is one of user, assistant, tool",
        ),
        (
            {"role": "user", "content": [{"type": "image_url", "url": "u"}]},
            "expected parts of text",
        ),
        ({"role": "user", "content": [{"type": "text", "text": " "}]}, "expected text, got none"),
        ({"role": "user", "content": None}, "expected text in the column 'content', got an empty"),
        ({"from": "function_call", "value": "add(2, 3)"}, "expected the JSON of a call with name"),
    ],
)
def test_what_is_no_turn(turn, message):
    tokenizer = make_tokenizer(FAMILIES["qwen 2.5"])
    with pytest.raises(InputError, match="row 1, turn 1: " + message):
        encoded({"messages": [turn, TURNS[1]]}, tokenizer)


@pytest.mark.parametrize("tools", ["[1]", "{", {"a": 1}, 5, "[" * 5000])
def test_what_is_no_list_of_tools(tools):
    with pytest.raises(InputError, match="row 1: expected a list of objects in the column 'tools'"):
        encoded({"messages": CALLED, "tools": tools}, make_tokenizer(FAMILIES["qwen 2.5"]))


def test_the_day_is_the_one_that_is_given(monkeypatch):
    """The template of Llama 3.2 asks for the date."""
    family = FAMILIES["llama 3.2"]
    tokenizer = make_tokenizer(family)
    (found,), _ = encoded({"messages": TURNS[:2]}, tokenizer)
    assert "Today Date: 31 Jan 2026\n" in tokenizer.decode(found[0])
    for asked in ("strftime_now('%H:%M')", "strftime_now(messages[0].content)", "strftime_now()"):
        with pytest.raises(
            InputError, match="expected a chat template that asks for the day alone"
        ):
            encoded({"messages": TURNS[:2]}, tokenizer, chat_template="{{ " + asked + " }}")


def test_a_template_that_writes_without_end_is_refused():
    endless = "{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}"
    with pytest.raises(
        InputError, match="expected a chat template that writes the conversation, g"
    ):
        encoded({"messages": TURNS[:2]}, make_tokenizer(FAMILIES["chatml"]), chat_template=endless)
