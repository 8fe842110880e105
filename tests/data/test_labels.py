"""Batches of labels: the tokenizer's own ids, what each epoch sees, exact resume, every refusal."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, processors

from balora_jax.data import labels as labels_module
from balora_jax.data.glue import GLUE, custom_task
from balora_jax.data.labels import (
    LabelsBatches,
    LabelsExample,
    describe_labels,
    encode_labels,
    labels_epoch,
    padded_length,
)
from balora_jax.data.sources import load_rows
from balora_jax.errors import InputError
from tests.data import tiny_tokenizer as tiny

PAD = 999
KEYS = {"input_ids", "token_type_ids", "attention_mask", "labels", "row"}
SST2, MRPC, STSB = GLUE["sst2"], GLUE["mrpc"], GLUE["stsb"]


def encoder_tokenizer(*, types=True):
    """As BERT joins texts: <s> a </s> b </s>, the second text and its end of type 1."""
    tokenizer = tiny.make()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", 0), ("</s>", 1)],
    )
    tokenizer.pad_token = "<|end|>"
    extra = ["token_type_ids"] if types else []
    tokenizer.model_input_names = ["input_ids", "attention_mask", *extra]
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return encoder_tokenizer()


def pair(a, b, label=1):
    return {"sentence1": a, "sentence2": b, "label": label}


def letters(tokenizer, text):
    """The ids of a text whose letters do not merge."""
    return [tokenizer.convert_tokens_to_ids(letter) for letter in text]


def test_a_single_text(tokenizer):
    rows = [{"sentence": "xyz", "label": "positive"}, {"sentence": "z", "label": 0}]
    examples, report, _ = encode_labels(rows, tokenizer, SST2, 16)
    assert examples[0].input_ids.tolist() == [0, *letters(tokenizer, "xyz"), 1]
    assert examples[0].token_type_ids.tolist() == [0] * 5
    assert [example.label for example in examples] == [1, 0]
    for example in examples:
        assert example.input_ids.dtype == example.token_type_ids.dtype == np.int32
        assert type(example.label) is int
    assert str(report) == "2 of 2 rows kept (0 truncated), 8 tokens"


def test_a_pair_loses_the_end_of_its_longer_text(tokenizer):
    rows = [pair("xyzqjkvwxyz", "QJK"), pair("x", "Y"), pair("XYZQ", "xyz")]
    examples, report, _ = encode_labels(rows, tokenizer, MRPC, 10)
    first, second, third = examples
    ids = [0, *letters(tokenizer, "xyzq"), 1, *letters(tokenizer, "QJK"), 1]
    assert first.input_ids.tolist() == ids
    assert first.token_type_ids.tolist() == [0] * 6 + [1] * 4
    assert second.input_ids.tolist() == [
        0,
        *letters(tokenizer, "x"),
        1,
        *letters(tokenizer, "Y"),
        1,
    ]
    assert second.token_type_ids.tolist() == [0, 0, 0, 1, 1]
    assert len(third.input_ids) == 10  # fits exactly, and is not counted
    assert (report.rows, report.kept, report.truncated) == (3, 3, 1)
    assert report.tokens == 25


def test_no_token_types_are_zeros():
    (example,), _, _ = encode_labels([pair("x", "y")], encoder_tokenizer(types=False), MRPC, 16)
    assert example.token_type_ids.tolist() == [0] * 5
    assert example.token_type_ids.dtype == np.int32


def test_regression_labels_are_float32(tokenizer):
    rows = [{"sentence1": "x", "sentence2": "y", "score": 3.8}]
    (example,), _, _ = encode_labels(rows, tokenizer, STSB, 16)
    assert type(example.label) is np.float32
    assert example.label == np.float32(3.8)


@pytest.mark.parametrize("chunk", [1, 2, 1000])
def test_chunks_change_nothing(tokenizer, monkeypatch, chunk):
    rows = [pair("how many apples " * i, "x" * i, i % 2) for i in range(1, 6)]
    expected = [tokenizer(r["sentence1"], r["sentence2"])["input_ids"][:] for r in rows]
    monkeypatch.setattr(labels_module, "_CHUNK", chunk)
    examples, report, _ = encode_labels(rows, tokenizer, MRPC, 999)
    assert [example.input_ids.tolist() for example in examples] == expected
    assert [example.label for example in examples] == [1, 0, 1, 0, 1]
    assert report.tokens == sum(map(len, expected))
    truncated = encode_labels(rows, tokenizer, MRPC, 20).report.truncated
    assert truncated == sum(len(ids) > 20 for ids in expected)
    assert 0 < truncated < 5


@pytest.mark.parametrize(("rows", "shown"), [(2000, False), (2001, True)])
def test_a_bar_for_many_rows(tokenizer, capfd, rows, shown):
    encode_labels([{"sentence": "x", "label": 1}] * rows, tokenizer, SST2, 8)
    assert ("tokenising" in capfd.readouterr().err) == shown


@pytest.mark.parametrize(("cell", "got"), [(-1, "-1"), ("", "an empty cell"), (None, "an empty")])
def test_rows_without_label_are_refused(tokenizer, cell, got):
    rows = [{"sentence": "x", "label": 1}, {"sentence": "x", "label": cell}]
    with pytest.raises(InputError) as error:
        encode_labels(rows, tokenizer, SST2, 16)
    assert str(error.value).startswith(f"row 2: expected a label, got {got}")
    assert "the labels of GLUE's test sets are not public (they read -1)" in str(error.value)


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_rows_that_cannot_be_read_may_be_left_out(tokenizer, monkeypatch, chunk):
    monkeypatch.setattr(labels_module, "_CHUNK", chunk)
    good = [{"sentence": "xyz", "label": 1}, {"sentence": "xy", "label": "negative"}]
    rows = [{"sentence": "x"}, good[0], {"sentence": "", "label": 0}, good[1],
            {"sentence": "x", "label": -1}]  # fmt: skip
    examples, report, bad = encode_labels(rows, tokenizer, SST2, 16, bad_rows="skip")
    plain, whole, none = encode_labels(good, tokenizer, SST2, 16, bad_rows="skip")
    assert [(e.input_ids.tolist(), e.label) for e in examples] == [
        (e.input_ids.tolist(), e.label) for e in plain
    ]
    assert (report.rows, report.kept, report.bad, report.tokens) == (5, 2, 3, whole.tokens)
    assert [one.row for one in bad] == [1, 3, 5]
    assert none == []
    assert "got an empty cell" in bad[1].reason
    assert "2 of 5 rows kept (3 cannot be read, 0 truncated)" in str(report)
    with pytest.raises(InputError, match="expected rows that can be read, got none of 1"):
        encode_labels(rows[:1], tokenizer, SST2, 16, bad_rows="skip")
    with pytest.raises(InputError, match="row 1: expected a column"):
        encode_labels(rows, tokenizer, SST2, 16)


def test_the_row_is_named_in_later_chunks_too(tokenizer, monkeypatch):
    monkeypatch.setattr(labels_module, "_CHUNK", 2)
    rows = [{"sentence": "x", "label": 1}] * 4
    for bad, message in [
        ({"sentence": "x", "label": 5}, "row 5: expected a label of sst2 .*, got 5"),
        ({"sentence": "", "label": 1}, "row 5: expected text in 'sentence', got an empty cell"),
        ({"sentence": "x", "target": 1}, "row 5: expected a column 'label' with the label, got"),
    ]:
        with pytest.raises(InputError, match=message):
            encode_labels([*rows, bad], tokenizer, SST2, 16)


@pytest.mark.parametrize("chunk", [1, 1000])
def test_a_text_without_tokens_is_refused(monkeypatch, chunk):
    monkeypatch.setattr(labels_module, "_CHUNK", chunk)
    bare = tiny.make(bos=False)
    bare.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    with pytest.raises(InputError) as error:
        encode_labels([{"sentence": t, "label": 1} for t in ("xy", "xx")], bare, SST2, 16)
    assert str(error.value) == (
        "row 2: expected at least one token, got none from the tokenizer. Leave the row out."
    )


@pytest.mark.parametrize(
    ("rows", "task", "options", "message"),
    [
        ([], SST2, {}, "data: expected at least one row, got none. Add rows."),
        (
            [{}],
            SST2,
            {"max_length": 2},
            "max_length: expected at least 3 (2 special tokens and one of each text), got 2. ",
        ),
        (
            [{}],
            MRPC,
            {"max_length": 4},
            "max_length: expected at least 5 (3 special tokens and one of each text), got 4. ",
        ),
    ],
)
def test_bad_encodings_are_refused(type_checks_off, tokenizer, rows, task, options, message):
    with pytest.raises(InputError) as error:
        encode_labels(rows, tokenizer, task, **({"max_length": 16} | options))
    assert message in str(error.value)


def test_the_least_max_length_leaves_a_token_of_each_text(tokenizer):
    (example,), _, _ = encode_labels([pair("xyz", "qjk")], tokenizer, MRPC, 5)
    assert example.input_ids.tolist() == [
        *(0, *letters(tokenizer, "x"), 1, *letters(tokenizer, "q"), 1)
    ]


def test_description(tokenizer):
    (one,), _, _ = encode_labels([pair("x\ny", "z", 0)], tokenizer, MRPC, 16)
    assert describe_labels(one, tokenizer, MRPC) == (
        "7 tokens, label 0 (not_equivalent): <s>x y</s>z</s>"
    )
    (two,), _, _ = encode_labels([pair("x", "z", "4.75")], tokenizer, STSB, 16)
    assert describe_labels(two, tokenizer, STSB) == "5 tokens, score 4.75: <s>x</s>z</s>"


def make_examples(count=11, longest=12, *, seed=0, scores=False):
    """Example i holds the tokens 100·i + 1, 100·i + 2, …: each token tells where it is from."""
    rng = np.random.default_rng(seed)
    made = []
    for i, length in enumerate(rng.integers(2, longest + 1, count)):
        ids = (100 * (i + 10) + 1 + np.arange(length)).astype(np.int32)
        types = (np.arange(length) >= length // 2).astype(np.int32)
        label = np.float32(i / 3) if scores else int(rng.integers(0, 3))
        made.append(LabelsExample(ids, types, label))
    return made


def make(examples, **changes):
    options = {"batch_size": 2, "accumulation": 3, "length": 16, "seed": 5, "pad_id": PAD}
    return LabelsBatches(examples, **(options | changes))


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def rows_of(batch):
    """Rows of a batch of any leading shape, as dicts."""
    lead = batch["row"].ndim
    flat = {key: value.reshape(-1, *value.shape[lead:]) for key, value in batch.items()}
    return [{key: value[r] for key, value in flat.items()} for r in range(len(flat["row"]))]


def check_row(row, examples):
    example = examples[int(row["row"])]
    used = len(example.input_ids)
    assert row["input_ids"].tolist() == example.input_ids.tolist() + [PAD] * (16 - used)
    assert row["token_type_ids"].tolist() == example.token_type_ids.tolist() + [0] * (16 - used)
    assert row["attention_mask"].tolist() == [1] * used + [0] * (16 - used)
    assert row["labels"] == example.label


def same(a, b):
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) for k in x)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("scores", [False, True])
def test_shapes_dtypes_and_contents(scores):
    examples = make_examples(scores=scores)
    for batch in take(make(examples), 5):
        assert batch.keys() == KEYS
        for key in ("input_ids", "token_type_ids", "attention_mask"):
            assert (batch[key].shape, batch[key].dtype) == ((3, 2, 16), np.int32)
        assert (batch["row"].shape, batch["row"].dtype) == ((3, 2), np.int32)
        assert batch["labels"].shape == (3, 2)
        assert batch["labels"].dtype == (np.float32 if scores else np.int32)
        for row in rows_of(batch):
            check_row(row, examples)


def test_every_epoch_sees_every_example_once():
    iterator = make(make_examples())
    seen = [int(row["row"]) for batch in take(iterator, 12) for row in rows_of(batch)]
    epochs = [seen[i : i + 11] for i in range(0, 66, 11)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_the_order_follows_the_seed():
    examples = make_examples()
    assert same(take(make(examples), 4), take(make(examples), 4))
    assert not same(take(make(examples), 4), take(make(examples, seed=6), 4))


@pytest.mark.parametrize(("count", "batches"), [(1, 1), (6, 1), (7, 2), (12, 2), (13, 3)], ids=str)
def test_batches_per_epoch(count, batches):
    assert make(make_examples(count)).batches_per_epoch() == batches


@settings(max_examples=15, deadline=None)
@given(
    stop=st.integers(0, 9),
    count=st.integers(1, 13),
    batch_size=st.integers(1, 2),
    accumulation=st.integers(1, 2),
    seed=st.integers(0, 2**32 - 1),
    scores=st.booleans(),
)
def test_resume_is_bit_exact(stop, count, batch_size, accumulation, seed, scores):
    changes = {"batch_size": batch_size, "accumulation": accumulation, "seed": seed}
    expected = take(make(make_examples(count, scores=scores), **changes), stop + 6)[stop:]
    first = make(make_examples(count, scores=scores), **changes)
    take(first, stop)
    state = json.loads(json.dumps(first.get_state()))
    again = make(make_examples(count, scores=scores), **changes)
    take(again, 3)  # a position of its own is forgotten
    again.set_state(state)
    assert again.get_state() == state
    assert same(take(again, 6), expected)


@pytest.mark.parametrize(
    "changes", [{"batch_size": 3}, {"accumulation": 1}, {"length": 24}, {"seed": 6}]
)
def test_a_state_of_other_settings_is_refused(changes):
    examples = make_examples()
    state = make(examples).get_state()
    with pytest.raises(InputError, match=f"data position: expected {next(iter(changes))} = "):
        make(examples, **changes).set_state(state)


def test_a_state_of_other_examples_is_refused():
    examples = make_examples()
    state = make(examples).get_state()
    first = examples[0]
    relabelled = LabelsExample(first.input_ids, first.token_type_ids, first.label + 1)
    retyped = LabelsExample(first.input_ids, 1 - first.token_type_ids, first.label)
    for others in (
        examples[::-1],
        examples[:-1],
        [relabelled, *examples[1:]],
        [retyped, *examples[1:]],
    ):
        with pytest.raises(InputError, match="data position: expected examples = "):
            make(others).set_state(state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0."),
        ({"accumulation": 0}, "accumulation: expected at least 1, got 0."),
        ({"length": 3}, "data: expected examples of at most 3 tokens, got one of"),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    with pytest.raises(InputError) as error:
        make(make_examples(), **changes)
    assert message in str(error.value)


def test_no_examples_are_refused():
    nothing = "data: expected at least one example, got none. Add rows."
    with pytest.raises(InputError, match=nothing):
        make([])
    with pytest.raises(InputError, match=nothing):
        next(labels_epoch([], 2, 16, PAD))
    with pytest.raises(InputError, match="batch_size: expected at least 1, got 0"):
        next(labels_epoch(make_examples(), 0, 16, PAD))
    with pytest.raises(InputError, match="data: expected examples of at most 3 tokens, got one of"):
        next(labels_epoch(make_examples(), 2, 3, PAD))


@pytest.mark.parametrize("scores", [False, True])
@pytest.mark.parametrize("count", [1, 4, 5])
def test_an_epoch_for_evaluation(count, scores):
    examples = make_examples(count, scores=scores)
    batches = list(labels_epoch(examples, 2, 16, PAD))
    dtypes = dict.fromkeys(KEYS, np.int32) | {"labels": np.float32 if scores else np.int32}
    for batch in batches:
        assert {key: value.dtype for key, value in batch.items()} == dtypes
        assert {key: value.shape for key, value in batch.items()} == {
            **dict.fromkeys(("input_ids", "token_type_ids", "attention_mask"), (2, 16)),
            **dict.fromkeys(("labels", "row"), (2,)),
        }
    rows = [row for batch in batches for row in rows_of(batch)]
    assert [int(row["row"]) for row in rows] == [*range(count), *([-1] * (count % 2))]
    for row in rows:
        if row["row"] >= 0:
            check_row(row, examples)
        else:
            assert row["input_ids"].tolist() == [PAD] * 16
            assert row["attention_mask"].tolist() == [1] + [0] * 15
            assert row["labels"] == 0


@pytest.mark.parametrize(("longest", "limit", "expected"), [(8, 512, 8), (9, 512, 16), (9, 12, 12)])
def test_padded_length(longest, limit, expected):
    zeros = [np.zeros(n, np.int32) for n in (2, longest)]
    assert padded_length([LabelsExample(z, z, 0) for z in zeros], limit) == expected


FILES = [
    *("cola_train", "cola_dev", "sst2_train", "sst2_dev", "mrpc_train", "mrpc_dev", "rte_train"),
    *("rte_dev", "stsb_train", "stsb_dev", "qnli_train_sample", "qnli_dev"),
    *("mnli_train_sample", "mnli_dev_sample"),
]


def test_every_real_file_is_named_here(shared):
    found = {path.name for path in (shared / "data" / "glue").iterdir()}
    assert found == {f"{name}.jsonl.gz" for name in FILES}


@pytest.mark.parametrize("name", FILES)
def test_real_files_give_what_the_tokenizer_itself_gives(shared, tokenizer, name):
    task = GLUE[name.split("_")[0]]
    rows = load_rows(str(shared / "data" / "glue" / f"{name}.jsonl.gz"), limit=250)
    examples, report, _ = encode_labels(rows, tokenizer, task, 128)
    assert (report.rows, report.kept, len(examples)) == (250, 250, 250)
    length = padded_length(examples, 128)
    made = list(labels_epoch(examples, 50, length, tokenizer.pad_token_id))
    texts = [[row[column] for row in rows] for column in task.text_columns]
    theirs = tokenizer(
        *texts, truncation=True, max_length=128, padding="max_length", return_tensors="np"
    )
    for key in ("input_ids", "token_type_ids", "attention_mask"):
        ours = np.concatenate([batch[key] for batch in made])
        np.testing.assert_array_equal(ours, theirs[key][:, :length])
        assert key != "attention_mask" or not theirs[key][:, length:].any()
    whole = [len(ids) for ids in tokenizer(*texts)["input_ids"]]
    assert report.truncated == sum(n > 128 for n in whole)


def test_a_file_of_ones_own(shared, tokenizer):
    path = shared / "data" / "robust" / "snli_counterfactual_dev.jsonl.gz"
    classes = ["entailment", "neutral", "contradiction"]
    task = custom_task(("sentence1", "sentence2"), "gold_label", classes)
    rows = load_rows(str(path), limit=100)
    examples, _, _ = encode_labels(rows, tokenizer, task, 96)
    assert [classes[example.label] for example in examples] == [row["gold_label"] for row in rows]
    assert len({example.label for example in examples}) == 3
