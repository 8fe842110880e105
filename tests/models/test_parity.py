"""The decoders against transformers, in float32, with every config field off its default."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from balora_jax.models.structure import structure
from tests.models import tiny

TOLERANCE = 1e-4


def ids_of(model, batch=2, length=29, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(3, model.config.vocab_size, (batch, length))


def torch_logits(model, ids, mask=None):
    with torch.no_grad():
        attention = None if mask is None else torch.tensor(mask)
        return model(torch.tensor(ids), attention_mask=attention).logits.numpy()


@pytest.mark.parametrize("rope", tiny.ROPES)
def test_llama_logits_equal_transformers(rope):
    model = tiny.llama(rope)
    skeleton, weights = tiny.ours(model)
    ids = ids_of(model, length=45 if rope == "dynamic" else 29)
    got = tiny.logits(skeleton, weights, ids)
    assert got.dtype == jnp.float32
    assert tiny.relative_error(got, torch_logits(model, ids)) < TOLERANCE


def test_llama_tied_head_and_single_group():
    model = tiny.llama("default", tie_word_embeddings=True, num_key_value_heads=1)
    skeleton, weights = tiny.ours(model)
    assert "lm_head.embedding" not in weights
    ids = ids_of(model)
    got = tiny.logits(skeleton, weights, ids)
    assert tiny.relative_error(got, torch_logits(model, ids)) < TOLERANCE


@pytest.mark.parametrize("window", [5, None])
def test_mistral_logits_equal_transformers(window):
    model = tiny.mistral(sliding_window=window)
    skeleton, weights = tiny.ours(model)
    ids = ids_of(model)
    got = tiny.logits(skeleton, weights, ids)
    assert tiny.relative_error(got, torch_logits(model, ids)) < TOLERANCE


def test_window_changes_the_logits():
    """Else the parity with a window would also hold for code that ignores it."""
    model = tiny.mistral(sliding_window=5)
    wide = tiny.mistral(sliding_window=None)
    ids = ids_of(model)
    assert tiny.relative_error(torch_logits(model, ids), torch_logits(wide, ids)) > 1e-2


@pytest.mark.parametrize("family", [tiny.llama, tiny.mistral])
def test_padding_mask_equals_transformers(family):
    """One row padded on the left, one on the right, one not at all."""
    model = family()
    skeleton, weights = tiny.ours(model)
    ids = ids_of(model, batch=3)
    mask = np.ones_like(ids)
    mask[0, :6], mask[1, -6:] = 0, 0
    ids[mask == 0] = 0
    want = torch_logits(model, ids, mask)
    got = np.asarray(tiny.logits(skeleton, weights, ids, mask))
    assert np.isfinite(got).all()
    assert tiny.relative_error(got[mask == 1], want[mask == 1]) < TOLERANCE


@pytest.mark.parametrize("family", [tiny.llama, tiny.mistral])
def test_packed_segments_equal_separate_rows(family):
    model = family()
    skeleton, weights = tiny.ours(model)
    ids = ids_of(model, batch=1, length=20)
    lengths = (7, 9, 4)
    segments = np.repeat([1, 2, 3], lengths)[None]
    positions = np.concatenate([np.arange(n) for n in lengths])[None]

    @jax.jit
    def forward(weights, *arrays):
        module = skeleton.bind(weights)
        return module.logits(module.hidden(*arrays))

    got = np.asarray(forward(weights, ids, positions, segments))[0]
    start = 0
    for n in lengths:
        want = torch_logits(model, ids[:, start : start + n])[0]
        assert tiny.relative_error(got[start : start + n], want) < TOLERANCE
        start += n


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_input_gradient_equals_torch_under_every_remat_policy(remat):
    model = tiny.llama()
    skeleton, weights = tiny.ours(model, remat=remat)
    ids = ids_of(model, batch=1, length=11)

    def loss(table):
        logits = skeleton.bind({**weights, "embed_tokens.embedding": table})(jnp.asarray(ids))
        return jnp.sum(jnp.tanh(logits))

    got = jax.jit(jax.grad(loss))(weights["embed_tokens.embedding"])
    torch.tanh(model(torch.tensor(ids)).logits).sum().backward()
    want = model.model.embed_tokens.weight.grad.numpy()
    assert np.abs(got - want).max() < TOLERANCE * np.abs(want).max()


def test_bfloat16_structure_keeps_its_dtype():
    skeleton, weights = tiny.ours(tiny.llama())
    low = structure(skeleton.bind(weights).config, dtype="bfloat16")
    assert {leaf.dtype for leaf in low.frozen.values()} == {jnp.dtype(jnp.bfloat16)}
    cast = {path: value.astype(jnp.bfloat16) for path, value in weights.items()}

    def forward(weights, ids):
        module = low.bind(weights)
        hidden = module.hidden(ids, ids * 0, ids * 0 + 1)
        return hidden, module(ids)

    hidden, logits = jax.eval_shape(forward, cast, jnp.zeros((2, 5), jnp.int32))
    assert hidden.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
