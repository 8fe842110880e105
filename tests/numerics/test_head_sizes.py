"""The head at the sizes of real models: accuracy over shapes, and memory by the compiler's count."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balora_jax.figures.head_memory import temporaries
from balora_jax.numerics.head import head_loss
from balora_jax.numerics.head_types import Chunks, Rows
from balora_jax.numerics.objective import TermSet
from balora_jax.numerics.terms.consistency import Consistency
from balora_jax.numerics.terms.diversity import Diversity

SCALES = (0.4, 0.9, 0.6)


def float64_loss_and_gradient(rows, head, t, top_k):
    """Closed form in NumPy, from full logits."""
    h_s, h_t, labels, label_mask, term_mask = (np.asarray(part) for part in rows[:5])
    z_s, z_t = np.float64(h_s) @ np.float64(head).T, np.float64(h_t) @ np.float64(head).T

    def softmax(z):
        e = np.exp(z - z.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    p = softmax(z_s)
    ps, pt = softmax(z_s / t), softmax(z_t / t)
    picked = p[np.arange(len(labels)), labels]
    one_hot = np.eye(head.shape[0])[labels]
    order = np.argsort(-z_s, axis=1, kind="stable")
    kept = np.zeros_like(z_s, bool)
    np.put_along_axis(kept, order[:, : top_k or head.shape[0]], True, 1)
    q = np.where(kept, p, 0) / np.where(kept, p, 0).sum(1, keepdims=True)
    log_q = np.log(np.where(kept, q, 1))
    entropy = -(q * log_q).sum(1)
    loss = (
        SCALES[0] * -np.log(picked)[label_mask].sum()
        + SCALES[1] * t**2 * (pt * np.log(pt / ps)).sum(1)[term_mask].sum()
        - SCALES[2] * entropy[term_mask].sum()
    )
    by_logits = SCALES[0] * label_mask[:, None] * (p - one_hot)
    by_logits += SCALES[1] * term_mask[:, None] * t * (ps - pt)
    by_logits += SCALES[2] * term_mask[:, None] * q * (log_q + entropy[:, None])
    return loss, by_logits @ np.float64(head)


@functools.partial(jax.jit, static_argnames=("spec", "chunk"))
def ours(rows, head, spec, chunk):
    def loss(student):
        names = ("task_loss", "consistency", "diversity")
        scales = dict(zip(names, map(jnp.float32, SCALES), strict=True))
        return head_loss(rows._replace(student=student), head, scales, spec, chunk=chunk)[0]

    return jax.value_and_grad(loss)(rows.student)


@settings(max_examples=14, deadline=None)
@given(
    shape=st.sampled_from([(1, 1, 2), (9, 3, 700), (33, 16, 5000), (70, 8, 131)]),
    chunk=st.sampled_from([1, 7, 64]),
    temperature=st.sampled_from([0.7, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 20]),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**31 - 1),
)
def test_values_and_gradients_over_shapes(shape, chunk, temperature, top_k, share, seed):
    n, d, v = shape
    rng = np.random.default_rng(seed)
    spec = TermSet((Consistency(temperature=temperature), Diversity(top_k=min(top_k, v))))
    rows = Rows(
        jnp.asarray(3 * rng.standard_normal((n, d)), jnp.float32),
        jnp.asarray(3 * rng.standard_normal((n, d)), jnp.float32),
        jnp.asarray(rng.integers(0, v, n), jnp.int32),
        jnp.asarray(rng.random(n) < share),
        jnp.asarray(rng.random(n) < share),
    )
    head = jnp.asarray(rng.standard_normal((v, d)) / np.sqrt(d), jnp.float32)
    value, gradient = ours(rows, head, spec, chunk)
    expected, by_hidden = float64_loss_and_gradient(rows, head, temperature, min(top_k, v))
    # Terms of both signs may cancel; the error is of the size of what was added up.
    size = max(abs(expected), n * share * np.log(v), 1e-30)
    assert abs(float(value) - expected) <= 1e-6 * size
    assert np.abs(gradient - by_hidden).max() <= 1e-5 * max(np.abs(by_hidden).max(), 1e-30)


@pytest.mark.parametrize(("used", "chunks"), [(0, 0), (1, 1), (64, 1), (65, 2), (1000, 16)])
def test_rows_that_do_not_count_cost_no_chunk(used, chunks):
    mask = np.zeros(1000, bool)
    mask[np.random.default_rng(0).permutation(1000)[:used]] = True
    plan = Chunks.of(jnp.asarray(mask), 64)
    assert int(plan.count) == chunks
    taken = [np.asarray(plan.rows(jnp.int32(i))) for i in range(chunks)]
    rows = [row for chosen, counted in taken for row in chosen[counted.astype(bool)]]
    assert rows == np.flatnonzero(mask).tolist()


@pytest.mark.parametrize("vocabulary", [32000, 128256, 256000])
def test_memory_of_the_head(vocabulary):
    """N = D = 4096: a fifteenth of the plain form with all terms, less than plain LoRA's."""
    lora = temporaries("plain LoRA", 4096, 4096, vocabulary, 0)
    plain = temporaries("plain BA-LoRA", 4096, 4096, vocabulary, 0)
    fused = temporaries("fused BA-LoRA", 4096, 4096, vocabulary, 128)
    assert fused * 15 <= plain
    assert fused < lora


def test_memory_does_not_grow_with_tokens_beyond_their_hidden_states():
    small, large = (temporaries("fused BA-LoRA", n, 512, 32000, 128) for n in (2048, 8192))
    hidden = 4 * 512 * (8192 - 2048)
    assert large - small <= 4 * hidden
