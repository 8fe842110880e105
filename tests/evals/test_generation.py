"""Decoding with a cache: the text of the full forward, of transformers, and of every padding."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from balora_jax.models import generation
from balora_jax.models.generation import Sampling, generate, make_decoder
from tests.evals.chain import Chain, successors
from tests.models import tiny
from tests.models.tiny_families import FAMILIES, LONGROPE

NEW, WIDTH, ROWS = 12, 16, 3
GREEDY = Sampling(NEW, stop_ids=(), pad_id=0)
PROMPTS = [
    [5, 9, 31, 8, 40, 17, 22, 6, 13, 50, 4, 11, 29],
    [7, 33, 12],
    [45, 3, 28, 19, 36, 10, 14, 2, 21],
]


class Ours:
    """One torch model, its weights here, and its greedy decoder, compiled once."""

    def __init__(self, model):
        self.model = model
        self.skeleton, self.weights = tiny.ours(model)
        self.decoder = make_decoder(self.skeleton.bind, GREEDY)

    def __call__(self, prompts, side="right"):
        ids, mask = padded(prompts, side)
        return np.asarray(self.decoder((self.weights,), ids, mask, jax.random.key(0))).tolist()


def padded(prompts, side="right"):
    ids, mask = np.zeros((ROWS, WIDTH), np.int32), np.zeros((ROWS, WIDTH), np.int32)
    for row, prompt in enumerate(prompts):
        where = slice(0, len(prompt)) if side == "right" else slice(WIDTH - len(prompt), WIDTH)
        ids[row, where], mask[row, where] = prompt, 1
    return ids, mask


@pytest.fixture(scope="module", params=FAMILIES)
def ours(request):
    """Every family; the windows are shorter than the prompts and than the answers.

    Phi-3 stays within its original context: beyond it LongRoPE turns all keys anew, which neither
    cache can follow (transformers drops its own there).
    """
    changes = {}
    if request.param == "phi3":
        changes = {"original_max_position_embeddings": 64}
        changes["rope_parameters"] = {**LONGROPE, "original_max_position_embeddings": 64}
    return Ours(FAMILIES[request.param](**changes))


def transformers_greedy(model, prompt, new):
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return out[0, len(prompt) :].tolist()


def test_greedy_equals_transformers_for_unequal_lengths_in_one_batch(ours):
    got = ours(PROMPTS)
    assert got == [transformers_greedy(ours.model, prompt, NEW) for prompt in PROMPTS]
    assert len({tuple(row) for row in got}) > 1


def test_cached_greedy_equals_the_full_forward(ours):
    """Append the most likely token, run everything again, with no cache at all."""
    forward = jax.jit(lambda weights, ids, mask: ours.skeleton.bind(weights)(ids, mask))
    ids, mask = (np.pad(x, ((0, 0), (0, NEW))) for x in padded(PROMPTS))
    lengths, texts = [len(prompt) for prompt in PROMPTS], [[] for _ in PROMPTS]
    for _ in range(NEW):
        logits = np.asarray(forward(ours.weights, ids, mask))
        for row, text in enumerate(texts):
            text.append(int(logits[row, lengths[row] - 1].argmax()))
            ids[row, lengths[row]], mask[row, lengths[row]] = text[-1], 1
            lengths[row] += 1
    assert ours(PROMPTS) == texts


def test_left_and_right_padding_give_the_same_text(ours):
    assert ours(PROMPTS, "left") == ours(PROMPTS, "right")


def test_a_row_does_not_depend_on_the_others(ours):
    """Alone (the other rows empty), and in another place of the batch."""
    together = ours(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone = ours([prompt])
        assert alone[0] == together[row]
        assert alone[1:] == [[-1] * NEW] * (ROWS - 1)
    assert ours(PROMPTS[::-1]) == together[::-1]


def chain_texts(table, prompts, sampling, key=0, decoder=None):
    return generate(
        decoder or make_decoder(Chain, sampling),
        (jnp.asarray(table),),
        prompts,
        sampling,
        batch_size=len(prompts),
        key=jax.random.key(key),
    )


def test_stop_tokens_end_rows_one_by_one():
    """0 → 1 → 2 → 3 → 4 → 5 → 0, stopping at 3 or at 5; the stop itself is not returned."""
    table = successors([1, 2, 3, 4, 5, 0])
    sampling = Sampling(7, stop_ids=(3, 5), pad_id=0)
    assert chain_texts(table, [[1], [4, 2], [4], [3]], sampling) == [[2], [], [], [4]]
    without = Sampling(7, stop_ids=(), pad_id=9)
    assert chain_texts(table, [[1], [4, 2]], without) == [
        [2, 3, 4, 5, 0, 1, 2],
        [3, 4, 5, 0, 1, 2, 3],
    ]


def test_a_text_may_end_with_the_padding_token():
    """0 → 1 → 2 → 3 → 2 …: after three tokens the text ends with 2, which also fills rows."""
    table = successors([1, 2, 3, 2])
    assert chain_texts(table, [[0], [1]], Sampling(2, (), pad_id=2)) == [[1, 2], [2, 3]]
    assert chain_texts(table, [[0], [1]], Sampling(4, (3,), pad_id=2)) == [[1, 2], [2]]


def test_a_batch_ends_when_every_row_has_stopped():
    table = successors([1, 2, 3, 3])
    sampling = Sampling(50, stop_ids=(3,), pad_id=0)
    calls = []

    class Counted(Chain):
        def extend(self, ids, positions, valid, cache):
            jax.debug.callback(lambda: calls.append(1))
            return super().extend(ids, positions, valid, cache)

    run = jax.jit(lambda ids, mask: generation.decode(
        Counted(table), ids, mask, sampling, jax.random.key(0)))  # fmt: skip
    out = np.asarray(run(np.array([[0], [2]]), np.ones((2, 1), np.int32)))
    jax.effects_barrier()
    assert out[:, :3].tolist() == [[1, 2, -1], [-1, -1, -1]]
    assert len(calls) == 3  # the prompt, and the tokens after 1 and 2


def test_several_batches_of_one_shape():
    table = successors([1, 2, 3, 4, 5, 0])
    sampling = Sampling(2, stop_ids=(), pad_id=9)
    prompts = [[i % 6] * (1 + i % 3) for i in range(5)]
    decoder, done = make_decoder(Chain, sampling), []
    options = {"batch_size": 2, "key": jax.random.key(0), "progress": done.append}
    texts = generate(decoder, (jnp.asarray(table),), prompts, sampling, **options)
    assert texts == [[(i + 1) % 6, (i + 2) % 6] for i in range(5)]
    assert done == [2, 2, 1]
    assert decoder._cache_size() == 1
    assert generate(decoder, (jnp.asarray(table),), [], sampling, **options) == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_prompts_of_like_lengths_go_together_and_texts_are_those_of_their_own_order(temperature):
    """Batch by batch in the order of the prompts, each padded to the longest of all."""
    table = np.random.default_rng(1).standard_normal((8, 8))
    sampling = Sampling(3, stop_ids=(7,), pad_id=0, temperature=temperature)
    prompts = [[1 + i % 5] * n for i, n in enumerate((3, 70, 1, 18, 66, 2, 33))]
    key, parts = jax.random.key(2), (jnp.asarray(table),)
    decoder, expected, widths = make_decoder(Chain, sampling), [], []
    for start in range(0, len(prompts), 2):
        ids, mask = np.zeros((2, 70), np.int32), np.zeros((2, 70), np.int32)
        for row, prompt in enumerate(prompts[start : start + 2]):
            ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
        out = decoder(parts, ids, mask, jax.random.fold_in(key, start))
        expected += [[t for t in row if t >= 0] for row in np.asarray(out).tolist()]

    def watched(parts, ids, mask, keys):
        widths.append(ids.shape[1])
        return decoder(parts, ids, mask, keys)

    found = generate(watched, parts, prompts, sampling, batch_size=2, key=key)
    assert found == expected[: len(prompts)]
    assert widths == sorted(widths, reverse=True)
    assert (widths[0], sum(widths) < 0.6 * 4 * 80) == (80, True)


def test_an_empty_prompt_has_an_empty_text():
    sampling = Sampling(2, stop_ids=(), pad_id=9)
    assert chain_texts(successors([1, 0]), [[], [1]], sampling) == [[], [0, 1]]
    assert chain_texts(successors([1, 0]), [[]], sampling) == [[]]


def numpy_nucleus(logits, top_p):
    """Smallest set of the likeliest tokens whose probability reaches top_p."""
    p = np.exp(logits - logits.max())
    p /= p.sum()
    kept, mass = [], 0.0
    for token in np.argsort(-p, kind="stable"):
        kept.append(token)
        mass += p[token]
        if mass >= top_p:
            break
    return set(kept), np.where(np.isin(np.arange(len(p)), kept), p, 0) / p[kept].sum()


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_nucleus_equals_a_plain_loop(top_p):
    logits = np.float32(np.random.default_rng(0).standard_normal((20, 15)) * 2)
    got = np.asarray(generation.keep_nucleus(jnp.asarray(logits), top_p))
    for row, kept in zip(np.float64(logits), got, strict=True):
        assert set(np.flatnonzero(np.isfinite(kept))) == numpy_nucleus(row, top_p)[0]
        assert np.array_equal(kept[np.isfinite(kept)], np.float32(row)[np.isfinite(kept)])


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.7, 0.8)])
def test_sampled_frequencies(temperature, top_p):
    logits = np.array([2.0, 1.0, 0.5, 0.0, -1.0])
    count = 20000
    sampling = Sampling(1, (), 0, temperature, top_p)
    draw = jax.jit(partial(generation.next_token, sampling=sampling))
    keys = jax.random.split(jax.random.key(0), count)
    tokens = draw(jnp.tile(jnp.asarray(logits, jnp.float32), (count, 1)), keys=keys)
    kept, p = numpy_nucleus(logits / temperature, top_p)
    frequency = np.bincount(np.asarray(tokens), minlength=5) / count
    assert set(np.flatnonzero(frequency)) == kept
    assert np.abs(frequency - p).max() < 4.5 * np.sqrt(0.25 / count)


def test_a_sample_depends_on_its_own_row_only():
    """Another neighbour, another width of the batch: the same draws for the same place and key."""
    table = np.random.default_rng(1).standard_normal((8, 8))
    sampling = Sampling(9, (), pad_id=99, temperature=1.0, top_p=0.95)
    texts = partial(chain_texts, table, sampling=sampling, decoder=make_decoder(Chain, sampling))
    first = texts([[1, 2], [3]])
    assert texts([[1, 2], [6, 5, 4]])[0] == first[0]
    assert texts([[1, 2], list(range(8)) * 3])[0] == first[0]
    assert texts([[1, 2], [3]]) == first
    assert texts([[1, 2], [3]], key=1) != first
    same = texts([[1, 2], [1, 2]])
    assert same[0] != same[1]  # two rows of one batch draw with different keys


def test_temperature_zero_takes_the_first_of_equals():
    logits = jnp.array([[0.0, 3.0, 3.0], [1.0, 0.0, -1.0]])
    keys = jax.random.split(jax.random.key(0), 2)
    token = generation.next_token(logits, Sampling(1, (), 0), keys)
    assert token.tolist() == [1, 0]
    assert token.dtype == jnp.int32


def test_real_weights_tell_the_story_of_transformers():
    folder = Path(__file__).resolve().parents[2].parent / "shared" / "models" / "stories260k"
    if not folder.is_dir():
        pytest.skip("no folder ../shared with real weights")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from balora_jax.pretrained.load import load_pretrained

    prompt = "Once upon a time"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=200, do_sample=False)[0]
    assert len(out) == ids["input_ids"].shape[1] + 200
    want = tokenizer.decode(out[ids["input_ids"].shape[1] :], skip_special_tokens=True)
    [got] = load_pretrained(str(folder)).generate([prompt], max_new_tokens=200)
    assert got == want
    assert len(want.split()) > 60
