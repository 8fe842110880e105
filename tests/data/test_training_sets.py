"""Several sets: shares, order, resume, and what is said of them."""

from collections import Counter

import numpy as np
import pytest

from balora_jax.data.batches import TextBatches
from balora_jax.data.examples import Example
from balora_jax.data.templates import ExampleSettings
from balora_jax.data.training_sets import TrainingSet, encode_sets, load_sets
from balora_jax.errors import InputError
from tests.data import tiny_tokenizer as tiny
from tests.tiny_run import write_rows

CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
COUNTS, WEIGHTS = (6, 30, 12), (2.0, 1.0, 1.0)


def examples():
    """Each of one token of its own, after a start."""
    mask = np.array([0, 1], np.int8)
    return [Example(np.array([1, 10 + i], np.int32), mask) for i in range(sum(COUNTS))]


def batches(weighted=tuple(zip(COUNTS, WEIGHTS, strict=True)), mode="padding", seed=5):
    return TextBatches(
        examples(), batch_size=4, accumulation=2, length=4, mode=mode, seed=seed, pad_id=0,
        weighted=weighted, numbered=False,
    )  # fmt: skip


def drawn(iterator, count):
    """Numbers of the examples in the order in which they come."""
    rows = np.concatenate([next(iterator)["input_ids"].ravel() for _ in range(count)])
    return [int(token) - 10 for token in rows if token >= 10]


@pytest.mark.parametrize("mode", ["padding", "packing"])
def test_sets_are_drawn_by_weight_each_in_rounds_of_its_own(mode):
    found = drawn(batches(mode=mode), 60)
    ends = np.cumsum(COUNTS)
    sets = np.searchsorted(ends, found, side="right")
    share = np.bincount(sets) / len(found)
    np.testing.assert_allclose(share, [0.5, 0.25, 0.25], atol=0.02)
    for number, count in enumerate(COUNTS):
        own = [one for one, of in zip(found, sets, strict=True) if of == number]
        if mode == "padding":
            rounds = [own[i : i + count] for i in range(0, len(own) - count, count)]
            assert all(len(set(one)) == count for one in rounds)
            assert len({tuple(one) for one in rounds}) == len(rounds)
        counted = Counter(own).values()
        assert max(counted) - min(counted) <= (1 if mode == "padding" else 2)


@pytest.mark.parametrize("mode", ["padding", "packing"])
def test_a_saved_position_goes_on_exactly(mode):
    whole = batches(mode=mode)
    for _ in range(7):
        next(whole)
    state = whole.get_state()
    rest = [next(whole) for _ in range(9)]
    other = batches(mode=mode)
    other.set_state(state)
    for one in rest:
        again = next(other)
        for key, value in one.items():
            np.testing.assert_array_equal(again[key], value)
    assert drawn(batches(mode=mode), 5) == drawn(batches(mode=mode), 5)
    assert drawn(batches(mode=mode), 5) != drawn(batches(mode=mode, seed=6), 5)


def test_other_weights_are_other_data():
    state = batches().get_state()
    changed = batches(weighted=tuple(zip(COUNTS, (1.0, 1.0, 1.0), strict=True)))
    with pytest.raises(InputError, match="weighted"):
        changed.set_state(state)
    with pytest.raises(InputError):
        batches(weighted=()).set_state(state)


def test_an_epoch_has_as_many_examples_as_there_are():
    assert batches().batches_per_epoch() == 48 // 8
    assert batches(mode="packing").batches_per_epoch() == 48 // 2 // 8


def sets(tmp_path, *, weights=(None, None), **settings):
    first = write_rows(tmp_path / "a.jsonl", [{"q": "a", "a": "b"}, {"q": "c", "a": "d", "s": "x"}])
    second = write_rows(tmp_path / "b.jsonl", [{"p": "e", "r": "f"}, {"p": "g", "r": ""}])
    return [
        TrainingSet(str(first), "train", None, ExampleSettings("plain", "q", "a"), weights[0]),
        TrainingSet(
            str(second), "train", None, ExampleSettings("{p}:", response_column="r", **settings),
            weights[1],
        ),
    ]  # fmt: skip


def test_each_set_has_its_own_template_and_is_told_apart(tmp_path):
    found = encode_sets(load_sets(sets(tmp_path, bad_rows="skip", weights=(1.0, 3.0))), tiny.make())
    assert (found.report.rows, found.report.kept, found.report.bad) == (4, 3, 1)
    assert found.weighted == [(2, 1.0), (1, 3.0)]
    ((name, bad),) = found.bad
    assert (name, bad.row) == (str(tmp_path / "b.jsonl"), 2)
    assert any(note.startswith(f"set {name}: 1 examples of 2 rows") for note in found.notes)
    assert f"note: {tmp_path / 'a.jsonl'}: columns that are not used: s." in found.notes
    assert [(name, text.split("\n")[1]) for name, text in found.others] == [
        (f"of {tmp_path / 'b.jsonl'}", "<s>e:⟦f</s>⟧")
    ]


def test_keys_of_turns_that_the_template_does_not_write_are_named_once(tmp_path):
    rows = [
        {"messages": [
            {"role": "user", "content": "a", "id": 7, "lang": ""},
            {"role": "assistant", "content": "b", "weight": 1, "time": f"{i}:00"},
        ]}
        for i in range(3)
    ]  # fmt: skip
    file = write_rows(tmp_path / "chat.jsonl", rows)
    settings = ExampleSettings("chat", messages_column="messages", chat_template=CHAT)
    found = encode_sets(
        load_sets([TrainingSet(str(file), "train", None, settings, None)]), tiny.make()
    )
    assert found.notes == [f"note: {file}: keys of turns that are not used: id, time."]


def test_a_fault_names_its_set(tmp_path):
    with pytest.raises(InputError, match=r"b\.jsonl: row 2: expected text in the column 'r'"):
        encode_sets(load_sets(sets(tmp_path)), tiny.make())
    with pytest.raises(InputError, match=r"data\.train: expected a weight for each set or for non"):
        load_sets(sets(tmp_path, weights=(1.0, None)))


def test_one_example_of_each_branch_is_shown(tmp_path):
    rows = [{"instruction": "a", "output": "b"}] * 3
    rows += [{"instruction": "a", "input": "c", "output": "b"}] * 2
    file = write_rows(tmp_path / "a.jsonl", rows)
    one = TrainingSet(str(file), "train", None, ExampleSettings(), None)
    ((name, text),) = encode_sets(load_sets([one]), tiny.make()).others
    assert name == "with input"
    assert "### Input:\nc" in text
