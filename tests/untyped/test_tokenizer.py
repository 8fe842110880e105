"""Files of a tokenizer that are broken in every way: one sentence, nothing beside it."""

import json
import shutil

import pytest

from balora_jax.errors import InputError
from balora_jax.models.families.base import read_config
from balora_jax.pretrained.checkpoint import Base
from balora_jax.pretrained.tokenizer import open_tokenizer
from tests.data import tiny_tokenizer as tiny

CORE, SETTINGS, SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.make().save_pretrained(folder)
    return folder


def put(*path, value):
    def change(found):
        for part in path[:-1]:
            found = found[part]
        found[path[-1]] = value

    return change


def with_id(value):
    def change(found):
        vocab = found["model"]["vocab"]
        vocab[next(reversed(vocab))] = value

    return change


BAD_POST = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<gone>", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}
CHANGES = {
    "model": (CORE, put("model", value={"type": "Nope"})),
    "model of no kind": (CORE, put("model", value=7)),
    "negative id": (CORE, with_id(-1)),
    "id beyond int32": (CORE, with_id(2**31)),
    "id of text": (CORE, with_id("x")),
    "expression": (CORE, put("pre_tokenizer", value={
        "type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False})),
    "post processor": (CORE, put("post_processor", value=BAD_POST)),
    "added id": (CORE, put("added_tokens", 0, "id", value=-5)),
    "class": (SETTINGS, put("tokenizer_class", value=7)),
    "class list": (SETTINGS, put("tokenizer_class", value=["a"])),
    "eos": (SETTINGS, put("eos_token", value=7)),
    "length": (SETTINGS, put("model_max_length", value="x")),
    "extra": (SETTINGS, put("extra_special_tokens", value=7)),
    "added": (SETTINGS, put("added_tokens_decoder", value={"x": {"content": "<s>"}, "1": 7})),
}  # fmt: skip
TEXTS = {
    "core list": (CORE, "[]"),
    "core empty": (CORE, ""),
    "core no JSON": (CORE, "{"),
    "settings list": (SETTINGS, "[]"),
    "settings deep": (SETTINGS, "[" * 100_000 + "]" * 100_000),
}


def refused(folder, capfd):
    capfd.readouterr()
    with pytest.raises(InputError) as error:
        open_tokenizer(folder)
    said = str(error.value)
    assert said.startswith(f"{folder}: expected ")
    assert said.endswith("Save the tokenizer beside the weights.")
    assert said.isprintable()
    assert len(said) < len(str(folder)) + 350
    written = capfd.readouterr()
    assert (written.out, written.err) == ("", "")


@pytest.mark.parametrize("name", CHANGES)
def test_a_broken_part(tmp_path, whole, name, capfd):
    file, change = CHANGES[name]
    shutil.copytree(whole, tmp_path / "t")
    found = json.loads((tmp_path / "t" / file).read_text())
    change(found)
    (tmp_path / "t" / file).write_text(json.dumps(found))
    refused(tmp_path / "t", capfd)


@pytest.mark.parametrize("name", TEXTS)
def test_a_broken_file(tmp_path, whole, name, capfd):
    file, text = TEXTS[name]
    shutil.copytree(whole, tmp_path / "t")
    (tmp_path / "t" / file).write_text(text)
    refused(tmp_path / "t", capfd)


def test_no_file_of_a_tokenizer_and_one_of_noise(tmp_path, capfd):
    refused(tmp_path, capfd)
    (tmp_path / "tokenizer.model").write_bytes(b"\0garbage\xff" * 9)
    refused(tmp_path, capfd)


def test_a_good_one_is_opened_and_what_it_says_is_shown(whole, capfd, monkeypatch):
    import os

    from transformers import AutoTokenizer

    load = AutoTokenizer.from_pretrained

    def speaking(*arguments, **options):
        os.write(2, b"a word of native code\n")
        return load(*arguments, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", speaking)
    tokenizer = open_tokenizer(whole)
    assert tokenizer("a b")["input_ids"] == tiny.make()("a b")["input_ids"]
    assert capfd.readouterr().err == "a word of native code\n"


LLAMA = {
    "model_type": "llama", "vocab_size": 50, "hidden_size": 8, "intermediate_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16,
}  # fmt: skip


def opened(folder):
    return Base(folder, read_config(LLAMA, "config.json"))


@pytest.mark.parametrize(
    "value", ["abc", {"a": 1}, ["a"], [{"a": 1}], 1.5, -1, [-1], 10**30, True, [None], [[2]], 50]
)
def test_stop_tokens_that_are_none(tmp_path, value):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(InputError) as error:
        opened(tmp_path).stop_ids()
    assert str(error.value) == (
        f"{tmp_path}/generation_config.json: expected eos_token_id to be whole numbers from 0 to "
        f"49, got {value!r}. Use the generation_config.json that was saved with the weights."
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [("{}", ()), ('{"eos_token_id": null}', ()), ('{"eos_token_id": 2}', (2,)),
     ('{"eos_token_id": [2, 49]}', (2, 49))],
)  # fmt: skip
def test_stop_tokens(tmp_path, text, expected):
    assert opened(tmp_path).stop_ids() == ()
    (tmp_path / "generation_config.json").write_text(text)
    assert opened(tmp_path).stop_ids() == expected
