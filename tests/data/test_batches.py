"""Batches: shapes, what each epoch sees, borders between packed examples, exact resume."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balora_jax.data.batches import TextBatches, common_length
from balora_jax.data.examples import Example
from balora_jax.errors import InputError

KEYS = {"input_ids", "loss_mask", "segment_ids", "positions"}
PAD = 999


def make_examples(count=11, longest=12, seed=0):
    """Example i holds the tokens 100·i + 1, 100·i + 2, …: each token tells where it is from."""
    rng = np.random.default_rng(seed)
    made = []
    for i, length in enumerate(rng.integers(2, longest + 1, count)):
        ids = 100 * (i + 10) + 1 + np.arange(length)
        mask = (np.arange(length) >= rng.integers(1, length)).astype(np.int8)
        made.append(Example(ids.astype(np.int32), mask))
    return made


def make(examples, mode, **changes):
    options = {
        "batch_size": 2,
        "accumulation": 3,
        "length": 16,
        "mode": mode,
        "seed": 5,
        "pad_id": PAD,
        "numbered": False,
    }
    return TextBatches(examples, **(options | changes))


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def segments(batch):
    """The (ids, mask, positions) of every segment of a batch, row by row."""
    rows = {key: value.reshape(-1, value.shape[-1]) for key, value in batch.items()}
    for r in range(len(rows["input_ids"])):
        for s in range(1, rows["segment_ids"][r].max(initial=0) + 1):
            here = rows["segment_ids"][r] == s
            yield tuple(rows[k][r][here].tolist() for k in ("input_ids", "loss_mask", "positions"))


def same(a, b):
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) for k in x)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("mode", ["padding", "packing"])
def test_shapes_dtypes_and_padding(mode):
    for batch in take(make(make_examples(), mode), 5):
        assert batch.keys() == KEYS
        assert all(v.shape == (3, 2, 16) and v.dtype == np.int32 for v in batch.values())
        empty = batch["segment_ids"] == 0
        assert empty.any()
        assert np.all(batch["input_ids"][empty] == PAD)
        assert not batch["loss_mask"][empty].any()
        assert not batch["positions"][empty].any()


@pytest.mark.parametrize("mode", ["padding", "packing"])
def test_every_epoch_sees_every_example_once_whole(mode):
    examples = make_examples()
    seen = [s for batch in take(make(examples, mode), 12) for s in segments(batch)]
    known = {
        e.input_ids[0]: (e.input_ids.tolist(), e.loss_mask.tolist(), list(range(len(e.input_ids))))
        for e in examples
    }
    assert all(segment == known[segment[0][0]] for segment in seen)
    orders = [[s[0][0] for s in seen[i : i + 11]] for i in range(0, len(seen) - 10, 11)]
    assert len(orders) >= 3
    if mode == "padding":
        assert all(sorted(order) == sorted(known) for order in orders)
        assert orders[0] != orders[1]
    else:  # rows leave the packer out of order, so whole epochs are seen as equal counts
        counts = np.unique([s[0][0] for s in seen], return_counts=True)[1]
        assert len(counts) == 11
        assert counts.max() - counts.min() <= 2


def test_packing_takes_each_example_once_an_epoch():
    # Equal lengths and one epoch a group of bins: the groups are the epochs.
    examples = [
        Example(np.full(8, 100 + i, np.int32), np.array([0] + [1] * 7, np.int8)) for i in range(8)
    ]
    batches = take(make(examples, "packing", batch_size=4, accumulation=1), 6)
    for batch in batches:
        assert sorted(s[0][0] for s in segments(batch)) == list(range(100, 108))


def test_no_prediction_crosses_a_border_of_packed_examples():
    packed_rows = 0
    for batch in take(make(make_examples(longest=7), "packing"), 6):
        ids, mask = batch["segment_ids"].reshape(-1, 16), batch["loss_mask"].reshape(-1, 16)
        packed_rows += (ids.max(axis=1) > 1).sum()
        # The target at t is predicted from t − 1: both must lie in one segment.
        targets = mask[:, 1:] == 1
        assert np.all(ids[:, 1:][targets] == ids[:, :-1][targets])
        assert not mask[:, 0].any()
    assert packed_rows > 10


@pytest.mark.parametrize("mode", ["padding", "batch", "packing"])
@settings(max_examples=10, deadline=None)  # grain shuffles small sets slowly: 5 ms an example
@given(
    stop=st.integers(0, 9),
    count=st.integers(1, 13),
    batch_size=st.integers(1, 2),
    accumulation=st.integers(1, 2),
    seed=st.integers(0, 2**32 - 1),
)
def test_resume_is_bit_exact(mode, stop, count, batch_size, accumulation, seed):
    examples = make_examples(count)
    changes = {"batch_size": batch_size, "accumulation": accumulation, "seed": seed}
    straight = make(examples, mode, **changes)
    expected = take(straight, stop + 6)[stop:]
    first = make(examples, mode, **changes)
    take(first, stop)
    state = json.loads(json.dumps(first.get_state()))
    again = make(make_examples(count), mode, **changes)
    take(again, 3)  # a position of its own is forgotten
    again.set_state(state)
    assert again.get_state() == state
    assert same(take(again, 6), expected)


@pytest.mark.parametrize("mode", ["padding", "batch", "packing"])
def test_resume_after_every_batch_and_twice(mode):
    examples = make_examples(30, longest=9)
    expected = take(make(examples, mode), 25)
    resumed, state = [], make(examples, mode).get_state()
    for _ in range(25):
        iterator = make(examples, mode)
        iterator.set_state(state)
        resumed.append(next(iterator))
        state = iterator.get_state()
    assert same(resumed, expected)


@pytest.mark.parametrize("mode", ["padding", "batch", "packing"])
def test_the_order_follows_the_seed(mode):
    examples = make_examples()
    assert same(take(make(examples, mode), 4), take(make(examples, mode), 4))
    assert not same(take(make(examples, mode), 4), take(make(examples, mode, seed=6), 4))


@pytest.mark.parametrize("mode", ["padding", "batch", "packing"])
def test_fewer_examples_than_a_batch(mode):
    (batch,) = take(make(make_examples(2), mode), 1)
    assert len({s[0][0] for s in segments(batch)}) == 2


def test_batches_per_epoch():
    examples = make_examples(13)
    assert make(examples, "padding").batches_per_epoch() == 3  # 13 rows, 6 a batch
    packed = make(examples, "packing")
    before = take(packed, 2)
    tokens = sum(len(e.input_ids) for e in examples)
    assert tokens / 16 / 6 <= packed.batches_per_epoch() <= 3
    after = take(packed, 1)
    assert same(before + after, take(make(examples, "packing"), 3))  # counting moves nothing
    halves = [Example(np.arange(8, dtype=np.int32), np.zeros(8, np.int8))] * 26
    assert make(halves, "packing").batches_per_epoch() == 3  # 13 full rows


@pytest.mark.parametrize(("longest", "limit", "expected"), [(8, 512, 8), (9, 512, 16), (9, 12, 12)])
def test_common_length(longest, limit, expected):
    zeros = [np.zeros(n, np.int32) for n in (2, longest)]
    assert common_length([Example(z, z) for z in zeros], limit) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0."),
        ({"accumulation": 0}, "accumulation: expected at least 1, got 0."),
        ({"mode": "packed"}, "mode: expected one of padding, batch, packing, got 'packed'."),
        ({"length": 3}, "data: expected examples of at most 3 tokens, got one of"),
    ],
)
def test_bad_arguments_are_refused(type_checks_off, changes, message):
    with pytest.raises(InputError) as error:
        make(make_examples(), changes.pop("mode", "padding"), **changes)
    assert message in str(error.value)


def test_no_examples_are_refused():
    with pytest.raises(InputError, match="data: expected at least one example, got none"):
        make([], "padding")


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("batch_size", {"batch_size": 3}),
        ("accumulation", {"accumulation": 1}),
        ("length", {"length": 24}),
        ("seed", {"seed": 6}),
    ],
)
def test_a_state_of_other_settings_is_refused(key, changes):
    examples = make_examples()
    state = make(examples, "padding").get_state()
    with pytest.raises(InputError, match=f"data position: expected {key} = "):
        make(examples, "padding", **changes).set_state(state)


def test_a_state_of_other_examples_or_mode_is_refused():
    examples = make_examples()
    state = make(examples, "padding").get_state()
    for others in (examples[::-1], examples[:-1], make_examples(seed=1)):
        with pytest.raises(InputError, match="data position: expected examples = "):
            make(others, "padding").set_state(state)
    with pytest.raises(InputError, match="data position: expected mode = packing, got padding"):
        make(examples, "packing").set_state(state)
