"""Answers as they are written: the tokens of the batched decoder, and text without half letters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import balora_jax
from balora_jax.models.generation import Sampling, Streamer, generate, make_decoder
from balora_jax.pretrained.load import continuations
from balora_jax.pretrained.streaming import pieces
from tests.evals.chain import Chain, successors

QUICKSTART = f"{balora_jax.__path__[0]}/quickstart/model"
TEXTS = [
    "Ann has 3 pears.\n\n  So what?",
    "naïve café, 日本語 🙂🙂",
    "\ufffd stays \ufffd",
    " don't 'm . , ! it 's",
    "",
]


def streamed(tokenizer, prompt, ids):
    return list(pieces(tokenizer, prompt, iter(ids)))


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_text_and_no_letter_is_broken(text):
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART)
    prompt = tokenizer("Q: ")["input_ids"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = streamed(tokenizer, prompt, ids)
    assert "".join(found) == continuations(tokenizer, [prompt], [ids])[0] == text
    assert all(found)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in found)
    assert text == "" or len(found) > len(ids) / 4  # as they come, not at the end


def test_an_answer_that_ends_within_a_letter():
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART)
    ids = tokenizer("a🙂", add_special_tokens=False)["input_ids"]
    assert len(ids) > 3
    prompt = tokenizer("Q: ")["input_ids"]
    assert streamed(tokenizer, prompt, ids[:-1]) == ["a", "\ufffd"]
    # A prompt that ends there: what follows completes it.
    found = streamed(tokenizer, [*prompt, *ids[:3]], ids[3:])
    assert "".join(found) == continuations(tokenizer, [[*prompt, *ids[:3]]], [ids[3:]])[0]


def test_blanks_that_are_taken_out_before_marks():
    words = ["so", "it", "is", "ca", "n't", ".", "a"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.WordPiece(cleanup=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, clean_up_tokenization_spaces=True, unk_token="a"
    )
    ids = [words.index(word) for word in ("so", "it", "is", ".", "it", "ca", "n't", ".")]
    found = streamed(tokenizer, [0], ids)
    assert "".join(found) == continuations(tokenizer, [[0]], [ids])[0]
    assert len(found) > 3


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(7, stop_ids=(5,), pad_id=0),
        Sampling(7, stop_ids=(), pad_id=0),
        Sampling(9, stop_ids=(5,), pad_id=9, temperature=1.0, top_p=0.9),
        Sampling(1, stop_ids=(), pad_id=0),
    ],
)
def test_streamed_tokens_are_those_of_the_decoder(sampling):
    table = jnp.asarray(
        successors([1, 2, 3, 4, 5, 0])
        if sampling.temperature == 0
        else np.random.default_rng(1).standard_normal((6, 6))
    )
    stream, decoder = Streamer(Chain, sampling, 400), make_decoder(Chain, sampling)
    for seed, prompt in enumerate([[1], [4], [0] * 70, [3, 4], []]):
        key = jax.random.key(seed)
        [want] = generate(decoder, (table,), [prompt], sampling, batch_size=1, key=key)
        assert list(stream((table,), prompt, key)) == want
