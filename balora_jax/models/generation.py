"""Batched decoding with a key/value cache: greedy or sampled, with stop tokens."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from balora_jax.array_types import Array, Float, Int, Key, PRNGKeyArray
from balora_jax.models.decoder import mask_positions
from balora_jax.numerics.few import batches_by_length
from balora_jax.parallel import hosts

_WIDTH_MULTIPLE = 16
_STREAMED = 64
"""Columns of the shortest prompt that is streamed: a conversation soon has as many."""
NOTHING = -1
"""Of a column after a row's end: no row of any table, so that no token is taken for it."""


@dataclass(frozen=True)
class Sampling:
    """Rule that chooses the next token and ends a row.

    Attributes:
        max_new_tokens: longest continuation.
        stop_ids: tokens that end a row (the stop token itself is not returned).
        pad_id: what the model is given where there is no token: any row of its table.
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_p: draw from the smallest set of tokens with at least this probability.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    pad_id: int
    temperature: float = 0.0
    top_p: float = 1.0


@runtime_checkable
class Cached(Protocol):
    """A model that goes on from a cache of keys and values, as ``Decoder`` does."""

    def empty_cache(self, batch: int, length: int) -> Any:
        """A cache for ``length`` columns in all."""
        ...

    def extend(
        self,
        input_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        valid: Int[Array, "B T"],
        cache: Any,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Hidden states of further tokens, and the cache with these in it."""
        ...

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Scores of every vocabulary entry."""
        ...


def next_token(
    logits: Float[Array, "B V"], sampling: Sampling, keys: Key[Array, "B"]
) -> Int[Array, "B"]:
    """The next token of every row; each row draws with its own key."""
    if sampling.temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_p < 1.0:
        logits = keep_nucleus(logits, sampling.top_p)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def keep_nucleus(logits: Float[Array, "B V"], top_p: float) -> Float[Array, "B V"]:
    """Set all but the most likely tokens, up to a mass of ``top_p``, to minus infinity.

    Source: Holtzman et al. 2020 (nucleus sampling); the token that crosses the mass is kept.

    Example:
        >>> import jax.numpy as jnp
        >>> keep_nucleus(jnp.log(jnp.array([[0.5, 0.3, 0.2]])), 0.6)[0, 2].item()
        -inf
    """
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
    before = jnp.cumsum(ranked, axis=-1) - ranked
    keep = jnp.zeros(logits.shape, bool)
    keep = jnp.put_along_axis(keep, order, before < top_p, axis=-1, inplace=False)
    return jnp.where(keep, logits, -jnp.inf)


class Written(NamedTuple):
    """What a decoder has written so far, and what it goes on from.

    Attributes:
        tokens: int32 [B, M]; -1 where nothing is written, and from a row's stop token on.
        last: int32 [B], the newest of each row.
        done: bool [B], rows that have ended.
        column: int32, how many columns are written.
        lengths: int32 [B], tokens of the prompts.
        keys: [B], of the draws.
        cache: of the model.
    """

    tokens: Array
    last: Array
    done: Array
    column: Array
    lengths: Array
    keys: Array
    cache: Any


def decode(
    module: Cached,
    input_ids: Int[Array, "B T"],
    mask: Int[Array, "B T"],
    sampling: Sampling,
    key: Key[Array, "..."],
) -> Int[Array, "B M"]:
    """Continuations of ``max_new_tokens`` columns; -1 from a row's stop token on.

    ``mask`` is 1 on prompt tokens; padding may stand left or right. Rows without any token end at
    once. Each row draws with a key of its own: those given [B], or from one key by its place.
    """

    def unfinished(written: Written) -> Array:
        return (written.column < sampling.max_new_tokens) & ~jnp.all(written.done)

    def step(written: Written) -> Written:
        return advanced(module, written, sampling)

    return jax.lax.while_loop(
        unfinished, step, begun(module, input_ids, mask, sampling, key)
    ).tokens


def begun(
    module: Cached,
    input_ids: Int[Array, "B T"],
    mask: Int[Array, "B T"],
    sampling: Sampling,
    key: Key[Array, "..."],
) -> Written:
    """The first column after prompts, as :func:`decode` writes it."""
    rows, width = input_ids.shape
    limit = sampling.max_new_tokens
    keys = key if key.ndim else each_row(key, jnp.arange(rows))
    cache = module.empty_cache(rows, width + limit)
    hidden, cache = module.extend(input_ids, mask_positions(mask), mask, cache)
    last = jnp.argmax(jnp.arange(width)[None, :] * mask, axis=-1)
    lengths = jnp.sum(mask, axis=-1)
    logits = module.logits(hidden[jnp.arange(rows), last])
    token, done = _chosen(logits, lengths == 0, jnp.array(0), sampling, keys)
    tokens = jnp.full((rows, limit), NOTHING, jnp.int32).at[:, 0].set(token)
    return Written(tokens, token, done, jnp.array(1), lengths, keys, cache)


def advanced(module: Cached, written: Written, sampling: Sampling) -> Written:
    """One more column."""
    tokens, token, done, column, lengths, keys, cache = written
    positions = (lengths + column - 1)[:, None]
    given = jnp.where(done, sampling.pad_id, token)[:, None]
    hidden, cache = module.extend(given, positions, jnp.ones_like(positions), cache)
    token, done = _chosen(module.logits(hidden[:, 0]), done, column, sampling, keys)
    tokens = tokens.at[:, column].set(token)
    return Written(tokens, token, done, column + 1, lengths, keys, cache)


def _chosen(
    logits: Array, done: Array, column: Array, sampling: Sampling, row_keys: Array
) -> tuple[Array, Array]:
    """The next token of every row, and which rows have ended."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, column)
    token = next_token(logits, sampling, keys)
    stops = jnp.asarray(sampling.stop_ids, jnp.int32)
    done = done | jnp.any(token[:, None] == stops[None, :], axis=-1)
    return jnp.where(done, NOTHING, token), done


def make_decoder(bind: Callable[..., Cached], sampling: Sampling) -> Callable[..., Array]:
    """``decode`` jitted over ``(parts, input_ids, mask, key)`` with ``bind(*parts)`` the module."""

    def run(parts, input_ids, mask, key):
        return decode(bind(*parts), input_ids, mask, sampling, key)

    return jax.jit(run)


class Streamer:
    """Tokens of one prompt as they are written: the same as :func:`generate` gives for it alone.

    Prompts are padded to few widths, each a compilation.

    Args:
        bind: from ``*parts`` to the module.
        sampling: the rule.
        longest: of a prompt and its answer.
    """

    def __init__(self, bind: Callable[..., Cached], sampling: Sampling, longest: int):
        self._sampling, self._longest = sampling, longest

        def begin(parts, input_ids, mask, keys):
            return begun(bind(*parts), input_ids, mask, sampling, keys)

        def advance(parts, written):
            return advanced(bind(*parts), written, sampling)

        self._begin, self._advance = jax.jit(begin), jax.jit(advance, donate_argnums=1)

    def __call__(
        self, parts: Sequence[Any], prompt: Sequence[int], key: PRNGKeyArray
    ) -> Iterator[int]:
        """The tokens after a prompt, up to the first stop token, one by one."""
        most = self._longest - self._sampling.max_new_tokens
        width = streamed_width(len(prompt), most)
        ids, mask = pad_prompts([prompt], rows=1, width=width, pad_id=self._sampling.pad_id)
        written = self._begin(parts, ids, mask, keys_of(key, jnp.zeros(1, jnp.int32), 1))
        for count in range(1, self._sampling.max_new_tokens + 1):
            token = int(np.asarray(written.last)[0])
            if token == NOTHING:
                return
            yield token
            if count < self._sampling.max_new_tokens:
                written = self._advance(parts, written)


def streamed_width(length: int, most: int) -> int:
    """The width that one prompt is padded to: 64, 128, 256, … and ``most``.

    >>> [streamed_width(length, 300) for length in (1, 65, 200, 290)]
    [64, 128, 256, 300]
    """
    width = _STREAMED
    while width < length:
        width *= 2
    return max(length, min(width, most))


def each_row(key: PRNGKeyArray, rows: Int[Array, "B"]) -> Key[Array, "B"]:
    """A key for each row by its number."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, rows)


@functools.partial(jax.jit, static_argnums=2)
def keys_of(key: PRNGKeyArray, places: Int[Array, "B"], size: int) -> Key[Array, "B"]:
    """A key for each row by its place among all, which stand in batches of ``size``."""
    row = places % size
    return jax.vmap(jax.random.fold_in)(each_row(key, places - row), row)


def pad_prompts(
    prompts: Sequence[Sequence[int]], *, rows: int, width: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded ids and mask [rows, width]; rows beyond the prompts are empty."""
    ids = np.full((rows, width), pad_id, np.int32)
    mask = np.zeros((rows, width), np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
        mask[row, : len(prompt)] = 1
    return ids, mask


def generate(
    decoder: Callable[..., Array],
    parts: Sequence[Any],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    batch_size: int,
    key: PRNGKeyArray,
    progress: Callable[[int], object] = lambda done: None,
) -> list[list[int]]:
    """Continuations of all prompts, in their order.

    Prompts of like lengths are decoded together, padded to few widths, each a compilation. What a
    row draws depends on its place among the prompts and on ``batch_size`` alone. Rows keep their
    own text up to the first stop token. ``progress`` gets the rows done per batch.
    """
    if not prompts:
        return []
    lengths = [len(prompt) for prompt in prompts]
    widest = -(-max(1, *lengths) // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
    outputs: list[list[int]] = [[] for _ in prompts]
    for places, width in batches_by_length(
        lengths,
        widest,
        batch_size=batch_size,
        multiple=_WIDTH_MULTIPLE,
        more=sampling.max_new_tokens,
    ):
        batch = [prompts[place] for place in places]
        ids, mask = pad_prompts(batch, rows=batch_size, width=width, pad_id=sampling.pad_id)
        of = np.zeros(batch_size, np.int32)
        of[: len(places)] = places
        keys = keys_of(key, jnp.asarray(of), batch_size)
        tokens = hosts.gathered(decoder(parts, ids, mask, keys))
        for place, row in zip(places, tokens.tolist(), strict=False):
            outputs[place] = until_stop(row)
        progress(len(batch))
    return outputs


def until_stop(row: Sequence[int]) -> list[int]:
    """The tokens before the end of a row."""
    return list(itertools.takewhile(lambda token: token != NOTHING, row))
