import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balora_jax.numerics import top_k


def by_sorting(row, k):
    """Columns of the k largest entries; of equal ones the lower column first."""
    return sorted(range(len(row)), key=lambda column: (-row[column], column))[:k]


@functools.partial(jax.jit, static_argnums=1)
def search(logits, k):
    found = top_k.largest(logits, k)
    return found, top_k.chosen(logits, found)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([(1, 1), (7, 7), (1000, 3), (1000, 20), (4099, 20), (700, 5)]),
    st.sampled_from([0, 1, 2]),
    st.integers(0, 2**31 - 1),
)
def test_equals_sorting_with_ties(shape, decimals, seed):
    vocabulary, k = shape
    # Rounded to few values, so that ties stand inside blocks, across them and at the edge.
    logits = np.random.default_rng(seed).standard_normal((3, vocabulary)).round(decimals)
    logits = logits.astype(np.float32) + 0.0  # lax.top_k puts -0.0 below 0.0
    found, chosen = search(jnp.asarray(logits), k)
    for row, values, columns, picked in zip(logits, *found, chosen, strict=True):
        expected = by_sorting(row, k)
        assert columns.tolist() == expected
        assert values.tolist() == row[expected].tolist()
        assert np.flatnonzero(picked).tolist() == sorted(expected)


def test_all_equal_and_very_negative_rows():
    logits = jnp.stack([jnp.zeros(3000), jnp.full(3000, -1e30)])
    found, chosen = search(logits, 20)
    assert (np.asarray(found.columns) == np.arange(20)).all()
    assert np.asarray(chosen).sum(1).tolist() == [20, 20]


@pytest.mark.parametrize("vocabulary", [32000, 128256])
def test_no_row_is_sorted_or_searched_whole(vocabulary):
    text = jax.jit(lambda z: top_k.largest(z, 20)).lower(jnp.zeros((2, vocabulary))).as_text()
    searched = [line for line in text.splitlines() if "top_k" in line]
    assert searched
    assert not any(f"tensor<2x{vocabulary}xf32>" in line for line in searched)
