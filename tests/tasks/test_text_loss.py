"""Positions that count in the loss of a model on text, by hand and by a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balora_jax.tasks.text.loss import counts_of, targets_of
from tests.training import tiny_loss


def row(ids, segments, marked):
    arrays = {"input_ids": ids, "segment_ids": segments, "loss_mask": marked}
    return {name: jnp.array([value]) for name, value in arrays.items()}


def test_one_example_by_hand():
    """Prompt 5 6, response 7 8, EOS 2, one padding token."""
    batch = row([5, 6, 7, 8, 2, 0], [1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0])
    shifted, official = (targets_of(batch, alignment) for alignment in ("shifted", "official"))
    for found in (shifted, official):
        assert found.labels[:5].tolist() == [6, 7, 8, 2, 0]
        assert found.task_mask.tolist() == [False, True, True, True, False, False]
    assert shifted.term_mask.tolist() == shifted.task_mask.tolist()
    # Theirs: the position that predicts 7 is out, the one that sees EOS is in.
    assert official.term_mask.tolist() == [False, False, True, True, True, False]


def test_packed_row_by_hand():
    """The first token of the second segment is marked, yet nothing may predict it."""
    batch = row([5, 6, 7, 9, 8, 4], [1, 1, 1, 2, 2, 2], [0, 1, 1, 1, 0, 1])
    found = targets_of(batch, "shifted")
    assert found.task_mask.tolist() == [True, True, False, False, True, False]
    assert found.labels[jnp.array([0, 1, 4])].tolist() == [6, 7, 4]
    assert targets_of(batch, "official").term_mask.tolist() == [
        False,
        True,
        True,
        True,
        False,
        True,
    ]


def test_the_row_does_not_wrap_around():
    """One segment everywhere and the first token marked: the last position predicts nothing."""
    batch = row([5, 6, 7], [1, 1, 1], [1, 0, 0])
    assert not targets_of(batch, "shifted").task_mask.any()


@pytest.mark.parametrize("seed", range(5))
def test_random_packings_equal_a_plain_loop(seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, 50, (2, 3, 12))
    segments = np.sort(rng.integers(1, 4, ids.shape), axis=-1)
    segments[:, :, 10:] = 0
    marked = rng.integers(0, 2, ids.shape) * (segments > 0)
    batch = {"input_ids": ids, "segment_ids": segments, "loss_mask": marked}
    batch = {name: jnp.asarray(value) for name, value in batch.items()}
    expected = []
    for i, j in np.ndindex(2, 3):
        for t in range(11):
            if marked[i, j, t + 1] and segments[i, j, t] == segments[i, j, t + 1]:
                expected.append(((i * 3 + j) * 12 + t, ids[i, j, t + 1]))
    found = targets_of(batch, "shifted")
    where = np.flatnonzero(found.task_mask)
    assert list(zip(where, np.asarray(found.labels)[where], strict=True)) == expected
    counts = counts_of(batch, "official")
    assert (int(counts.task), int(counts.term)) == (len(expected), int(marked.sum()))
    assert counts.micro_batches == 2
    counts = counts_of(batch, "shifted")
    assert int(counts.term) == len(expected)


def test_counts_do_not_depend_on_the_split():
    batches = [jax.tree.map(jnp.asarray, tiny_loss.batch(n)) for n in (1, 2, 4)]
    found = [counts_of(batch, "shifted") for batch in batches]
    assert [int(c.task) for c in found] == [13, 13, 13]
    assert [c.micro_batches for c in found] == [1, 2, 4]
