"""``balora chat``: the texts of ``balora generate``, over several turns, from a pipe."""

import io
import json
import sys

import jax
import pytest
from transformers import AutoTokenizer

from balora_jax import load_pretrained
from balora_jax.models.generation import Sampling, generate, make_decoder
from balora_jax.pretrained.checkpoint import Checkpoint
from tests.run.conftest import invoke

pytest.importorskip("jinja2")

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ {'system': '.', 'user': '*', 'assistant': '='}[m.role] }}{{ m.content }}"
    "{{ eos_token if m.role == 'assistant' else '' }}{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)
NEW = 4


class Terminal(io.StringIO):
    """Standard input where somebody sits."""

    def isatty(self):
        return True


class Broken(io.StringIO):
    """Standard input with bytes that are no text."""

    def readline(self, *_):
        return b"\xff".decode()


@pytest.fixture
def chat(finished_plain, monkeypatch):
    """The command with lines on its standard input; its lines of output."""

    def run(*lines, adapter=True, code=0, more=(), stdin=io.StringIO):
        monkeypatch.setattr(sys, "stdin", stdin("".join(f"{line}\n" for line in lines)))
        folder = ["--adapter", finished_plain.workdir / "adapter"] if adapter else []
        outcome = invoke("chat", finished_plain.config, *folder, *more)
        assert outcome.code == code, outcome.err
        return outcome

    return run


@pytest.fixture
def template(tmp_path):
    """``--set`` arguments that make every prompt a conversation."""
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    return ["--set", "data.template=chat", f"data.chat_template={tmp_path / 'chat.jinja'}"]


def generated(finished, prompts, *more):
    asked = [part for prompt in prompts for part in ("--prompt", prompt)]
    file = finished.workdir.parent / "texts.json"
    outcome = invoke("generate", finished.config, *asked, *more, "--json", file)
    assert outcome.code == 0, outcome.err
    return [entry["text"] for entry in json.loads(file.read_text())]


def test_questions_that_stand_alone_are_answered_as_generate_does(finished_plain, chat):
    prompts = ["1+1", "20+3", "1+1"]
    adapter = ("--adapter", finished_plain.workdir / "adapter")
    outcome = chat(prompts[0], "", *prompts[1:])
    assert outcome.out.splitlines() == generated(finished_plain, prompts, *adapter)
    assert outcome.err.count("each question is asked alone") == 1
    cut = outcome.err.count("note: the answer was cut after 4 tokens")
    assert cut == sum(len(text) == NEW for text in outcome.out.splitlines())


def test_both_side_by_side_from_one_loading(finished_plain, chat, monkeypatch):
    loaded, load = [], Checkpoint.load_for

    def counted(self, *arguments):
        loaded.append(self.folder)
        return load(self, *arguments)

    monkeypatch.setattr(Checkpoint, "load_for", counted)
    asked = ["3+4", "50+5", "1+1", "20+3"]
    lines = chat(*asked, more=["--compare"]).out.splitlines()
    assert len(loaded) == 1
    adapter = ("--adapter", finished_plain.workdir / "adapter")
    base, trained = (generated(finished_plain, asked, *who) for who in ((), adapter))
    assert base != trained
    pairs = zip(base, trained, strict=True)
    assert lines == [line for b, a in pairs for line in (f"base: {b}", f"adapter: {a}")]


def reference(folder, adapter, turns):
    """The answer after turns: ids of transformers' own template, decoded by our loop."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load_pretrained(str(folder), adapter=adapter)
    ids = tokenizer.apply_chat_template(
        turns, chat_template=TEMPLATE, add_generation_prompt=True, return_dict=False
    )
    sampling = Sampling(NEW, (2,), 2)
    decoder = make_decoder(model.bind, sampling)
    [tokens] = generate(decoder, model.parts, [ids], sampling, batch_size=1, key=jax.random.key(0))
    return tokenizer.decode(tokens, skip_special_tokens=True)


def test_several_turns_are_those_of_the_chat_template(inputs, finished_plain, chat, template):
    asked = ["1+1", "so 2", "b", "/reset", "1+1", "/exit", "not asked"]
    lines = chat(*asked, more=[*template, "--system", "sum"]).out.splitlines()
    assert len(lines) == 4
    adapter = str(finished_plain.workdir / "adapter")
    turns = [{"role": "system", "content": "sum"}]
    for question, answer in zip(asked[:3], lines, strict=False):
        turns.append({"role": "user", "content": question})
        assert answer == reference(inputs / "model", adapter, turns), turns
        turns.append({"role": "assistant", "content": answer})
    assert lines[3] == lines[0]


def test_a_conversation_that_is_too_long_is_refused_and_keeps_its_turns(
    chat, template, monkeypatch
):
    long = "1+2+" * 14
    whole = chat("1+1", "so 2", more=template).out.splitlines()
    outcome = chat("1+1", long, "never", more=template, code=2)
    assert outcome.out.splitlines() == whole[:1]
    said = "the conversation: expected it and an answer within the 64 positions of model, got "
    assert said in outcome.err
    assert "Begin anew with /reset, or lower --max-new-tokens." in outcome.err
    # At a terminal it goes on, with the turns that it had.
    asked, lines = [], iter(["1+1", long, "so 2", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: asked.append(prompt) or next(lines))
    seen = chat(more=template, stdin=Terminal)
    assert asked == ["> "] * 4
    assert said in seen.err
    assert "model, adapter: /reset begins anew, /exit or Ctrl-D ends" in seen.err
    assert seen.out.splitlines() == whole


def test_draws_are_those_of_the_seed_and_of_the_question(finished_plain, chat):
    drawn = ["--temperature", "2.0", "--top-p", "0.9", "--max-new-tokens", "8"]
    first = chat("1+1", "1+1", more=drawn).out.splitlines()
    assert chat("1+1", "1+1", more=drawn).out.splitlines() == first
    adapter = ("--adapter", finished_plain.workdir / "adapter")
    settings = ("--set", "eval.temperature=2.0", "eval.top_p=0.9", "eval.max_new_tokens=8")
    assert first[:1] == generated(finished_plain, ["1+1"], *adapter, *settings)
    assert first[0] != first[1]


LEAVES_OUT = TEMPLATE.replace(
    "{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"
)


@pytest.mark.parametrize(
    ("more", "adapter", "said"),
    [
        (["--compare"], False, "--compare: expected --adapter DIR with it, got none."),
        (["--system", "x"], True, "--system: expected data.template chat, got '{question}='"),
        (["--system", " "], True, "--system: expected text, got none."),
        (["--temperature", "hot"], True, "eval.temperature: expected"),
        (["--max-new-tokens", "0"], True, "eval.max_new_tokens: expected"),
        (["--set", "data.template='{other}='"], True, "expected a column 'other'"),
        (["--set", "data.template=chat"], True, "expected a chat template, got none"),
        (["--set", "data.template=chat", "data.chat_template={file}", "--system", "x"], True,
         "--system: expected a chat template that writes a system message, got one that leaves"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_a_weight_is_read(
    chat, monkeypatch, tmp_path, more, adapter, said
):
    monkeypatch.setattr(Checkpoint, "load_for", lambda *_: pytest.fail("a weight is read"))
    (tmp_path / "chat.jinja").write_text(LEAVES_OUT)
    more = [part.replace("{file}", str(tmp_path / "chat.jinja")) for part in more]
    outcome = chat("1+1", more=more, adapter=adapter, code=2)
    assert said in outcome.err
    assert outcome.out == ""


def test_bytes_that_are_no_text(chat):
    assert chat(code=0).out == ""
    outcome = chat(code=2, stdin=Broken)
    assert "standard input: expected text in UTF-8, got other bytes." in outcome.err
