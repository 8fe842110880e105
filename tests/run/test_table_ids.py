"""Ids and positions: whatever has no row in a table of the model is seen before a weight is read."""

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from balora_jax import load_pretrained
from balora_jax.errors import InputError
from balora_jax.pretrained.load import PretrainedModel
from tests.run.conftest import invoke
from tests.tiny_run import (
    EOS,
    PLAIN,
    POSITIONS,
    UNKNOWN,
    VOCAB_SIZE,
    adapter_bytes,
    metrics_of,
    sums,
    write_config,
    write_inputs,
    write_rows,
)

SCORED = {"task": "exact_match", "marker": "#"}


def with_padding(folder, text):
    """Name the padding token in the tokenizer's files; one that it lacks gets the next id."""
    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    while core.token_to_id(text) is None:
        count = core.get_vocab_size()
        # The tokenizer knows fewer tokens than the table has rows: fill up to its end.
        name = text if count == VOCAB_SIZE else f"<filler {count}>"
        core.add_special_tokens([AddedToken(name, special=True)])
    core.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": text}))
    return core.token_to_id(text)


@pytest.mark.parametrize(("text", "number"), [("<pad>", VOCAB_SIZE), (UNKNOWN, 0), (EOS, 2)])
def test_padding_is_any_row_of_the_table(tmp_path, text, number):
    """As many added pad tokens lie one past the table: the loss was NaN at every step."""
    found = []
    for name, padding in (("plain", None), ("padded", text)):
        inputs = write_inputs(tmp_path / name)
        if padding is not None:
            assert with_padding(inputs / "model", padding) == number
        config = write_config(tmp_path / f"{name}.yaml", inputs, **PLAIN, eval=SCORED)
        outcome = invoke("train", config, "--workdir", tmp_path / name / "run")
        assert outcome.code == 0, outcome.err
        summary = json.loads((tmp_path / name / "run" / "summary.json").read_text())
        found.append((metrics_of(tmp_path / name / "run"), summary["after"]))
        found.append(adapter_bytes(tmp_path / name / "run"))
        said = invoke("generate", config, "--prompt", "1+1")
        assert said.code == 0, said.err
        found.append(said.out)
    assert found[:3] == found[3:]
    assert all(np.isfinite(row["loss"]) for row in found[0][0])


@pytest.mark.parametrize("verb", ["train", "eval"])
@pytest.mark.parametrize(
    ("question", "answer_tokens", "phrase"),
    [
        ("<far>", 4, f"prompt 2: expected token ids below vocab_size {VOCAB_SIZE}, got "),
        (
            "1" * 50,
            POSITIONS - 51,
            f"prompt 2: expected prompt and answer within the {POSITIONS} positions of model, got "
            f"52 tokens and max_new_tokens {POSITIONS - 51}. Shorten the prompt or lower",
        ),
    ],
)
def test_a_question_beyond_the_model(tmp_path, verb, question, answer_tokens, phrase):
    inputs = write_inputs(tmp_path / "in")
    with_padding(inputs / "model", "<far>")
    rows = sums(3, 1)
    rows[1]["question"] = question
    write_rows(inputs / "validation.jsonl", rows)
    evaluation = {**SCORED, "max_new_tokens": answer_tokens}
    config = write_config(tmp_path / "config.yaml", inputs, **PLAIN, eval=evaluation)
    where = ["--workdir", tmp_path / "run"] if verb == "train" else []
    code, _, err = invoke(verb, config, *where)
    assert (code, err.count("\n")) == (2, 1), err
    assert phrase in err
    assert not (tmp_path / "run").exists()
    said = invoke(
        "generate", config, "--prompt", question, "--set", f"eval.max_new_tokens={answer_tokens}"
    )
    assert (said.code, said.out) == (2, "")
    assert phrase.replace("prompt 2", "prompt 1") in said.err


def test_the_library_refuses_what_has_no_row(tmp_path):
    """Out of bounds, a lookup gives NaN; for the last position of a model there is none."""
    write_inputs(tmp_path)
    model = load_pretrained(str(tmp_path / "model"))
    assert isinstance(model, PretrainedModel)
    assert np.isfinite(model(np.full((1, POSITIONS), VOCAB_SIZE - 1))).all()
    with pytest.raises(InputError, match=f"input_ids: expected ids from 0 to {VOCAB_SIZE - 1}"):
        model(np.array([[1, VOCAB_SIZE]]))
    with pytest.raises(InputError, match="got -1"):
        model(np.array([[1, -1]]))
    with pytest.raises(InputError, match=f"rows of at most {POSITIONS} tokens, got 65"):
        model(np.ones((1, POSITIONS + 1), np.int32))
    with pytest.raises(InputError, match=f"within the {POSITIONS} positions"):
        model.generate(["1+1="], max_new_tokens=POSITIONS)
