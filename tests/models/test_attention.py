"""Attention by blocks against NumPy in float64, forward and gradient, and its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balora_jax.models import attention
from balora_jax.models.blockwise import Form, attend_by_blocks
from balora_jax.models.decoder_config import DecoderConfig
from balora_jax.models.rotary import RopeConfig
from balora_jax.models.structure import structure

HEADS, GROUPS, WIDTH = 4, 2, 4
SCALE = 0.4


def packed(*rows, tokens):
    """Positions and segments of rows with these lengths of their segments, padded."""
    positions, segments = np.zeros((2, len(rows), tokens), np.int32)
    for row, lengths in enumerate(rows):
        starts = np.cumsum((0, *lengths))
        for i, (start, length) in enumerate(zip(starts, lengths, strict=False)):
            positions[row, start : start + length] = np.arange(length)
            segments[row, start : start + length] = i + 1
    return positions, segments


def by_hand(q, k, v, pull, places, window, cap):
    """Outputs and gradients, one query of one head at a time, in float64; 0 for padding."""
    q, k, v, pull = (np.asarray(x, np.float64) for x in (q, k, v, pull))
    positions, segments = places
    out, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    for b, t, h in np.ndindex(q.shape[:3]):
        if segments[b, t] == 0:
            continue
        behind = positions[b, t] - positions[b]
        read = np.flatnonzero(
            (segments[b] == segments[b, t]) & (behind >= 0) & (behind < (window or 1000))
        )
        g = h // (HEADS // GROUPS)
        raw = k[b, read, g] @ q[b, t, h] * SCALE
        bent = cap * np.tanh(raw / cap) if cap else raw
        weights = np.exp(bent - bent.max())
        weights /= weights.sum()
        out[b, t, h] = weights @ v[b, read, g]
        slopes = weights * ((v[b, read, g] - out[b, t, h]) @ pull[b, t, h])
        slopes = slopes * SCALE * (1 / np.cosh(raw / cap) ** 2 if cap else 1)
        dq[b, t, h] = slopes @ k[b, read, g]
        np.add.at(dk[b, :, g], read, slopes[:, None] * q[b, t, h])
        np.add.at(dv[b, :, g], read, weights[:, None] * pull[b, t, h])
    return out, dq, dk, dv


def inputs(batch, tokens, dtype=np.float32):
    rng = np.random.default_rng(batch + tokens)
    heads = (HEADS, GROUPS, GROUPS, HEADS)
    return [rng.normal(size=(batch, tokens, n, WIDTH)).astype(dtype) for n in heads]


@pytest.mark.parametrize(
    ("block", "window", "cap"),
    [(8, None, None), (8, 3, 1.5), (16, 9, None), (64, None, 1.5)],
)
def test_blocks_equal_attention_by_hand(block, window, cap):
    """Packed rows, padding, a last block that is not full, a window within and across blocks."""
    places = packed((5, 14, 11), (30, 7), tokens=37)
    q, k, v, pull = inputs(2, 37)
    real = (places[1] > 0)[..., None, None]
    reach = attention.reach(jnp.asarray(places[0]), jnp.asarray(places[1]), window)

    @jax.jit
    def both(q, k, v, pull):
        form = Form(SCALE, cap, block)
        out, back = jax.vjp(lambda q, k, v: attend_by_blocks(q, k, v, reach, form), q, k, v)
        return out, *back(pull)

    got = both(q, k, v, pull * real)
    want = by_hand(q, k, v, pull, places, window, cap)
    np.testing.assert_allclose(got[0] * real, want[0], atol=3e-6)
    for ours, theirs in zip(got[1:], want[1:], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_blocks_of_padding_alone_give_numbers():
    q, k, v, _ = inputs(1, 24)
    reach = attention.reach(jnp.zeros((1, 24), jnp.int32), jnp.zeros((1, 24), jnp.int32), None)
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    got = jax.jit(lambda: attend_by_blocks(q, k, v, reach, Form(SCALE, None, 8)))()
    np.testing.assert_allclose(got, np.repeat(v, HEADS // GROUPS, axis=2), atol=1e-6)


def temporaries(tokens):
    """Bytes that the compiler sets aside for attention and its gradient."""
    shapes = [jax.ShapeDtypeStruct((1, tokens, n, 16), jnp.float32) for n in (2, 1, 1)]
    places = jnp.zeros((1, tokens), jnp.int32), jnp.ones((1, tokens), jnp.int32)

    def total(q, k, v):
        mask = attention.reach(*places, None)
        return attention.attend(q, k, v, mask, "blocks").sum()

    compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(*shapes).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def test_memory_grows_with_the_tokens():
    small, middle, large = map(temporaries, (512, 1024, 4096))
    assert large - middle <= 6.6 * (middle - small)


def gemma():
    """Windows in every other layer, soft caps, grouped queries."""
    return DecoderConfig(
        model_type="gemma2",
        vocab_size=17,
        hidden_size=8,
        intermediate_size=12,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        norm_eps=1e-6,
        activation="silu",
        rope=RopeConfig(theta=100.0),
        max_length=512,
        tie_word_embeddings=True,
        sliding_window=70,
        sliding_layers=(True, False),
        attention_soft_cap=2.0,
        query_scale=0.9,
    )


def losses(steps=3):
    """Of a few steps on packed rows of 300 tokens."""
    made = structure(gemma(), kernel="blocks", remat="full")
    rng = np.random.default_rng(0)
    weights = {
        path: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
        for path, leaf in sorted(made.frozen.items())
    }
    ids = jnp.asarray(rng.integers(0, 17, (2, 300)), jnp.int32)
    positions, segments = map(jnp.asarray, packed((170, 100), (299,), tokens=300))

    @jax.jit
    def step(weights):
        def loss(weights):
            model = made.bind(weights)
            logits = jax.nn.log_softmax(model.logits(model.hidden(ids, positions, segments)))
            each = jnp.take_along_axis(logits[:, :-1], ids[:, 1:, None], axis=-1)[..., 0]
            return -jnp.mean(jnp.where(segments[:, 1:] > 0, each, 0))

        value, slopes = jax.value_and_grad(loss)(weights)
        return value, jax.tree.map(lambda x, d: x - 0.1 * d, weights, slopes)

    found = []
    for _ in range(steps):
        value, weights = step(weights)
        found.append(float(value))
    return found


def test_steps_of_windows_that_alternate_are_those_of_the_plain_form(monkeypatch):
    got = losses()
    monkeypatch.setattr(attention, "WHOLE", 300)
    want = losses()
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert want[-1] < want[0]
