"""Batched decoding with a key/value cache: greedy or sampled, with stop tokens."""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from balora_jax.array_types import Array, Float, Int, Key, PRNGKeyArray
from balora_jax.models.decoder import mask_positions
from balora_jax.numerics.few import batches_by_length
from balora_jax.parallel import hosts

_WIDTH_MULTIPLE = 16
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
    rows, width = input_ids.shape
    limit = sampling.max_new_tokens
    row_keys = key if key.ndim else each_row(key, jnp.arange(rows))
    stops = jnp.asarray(sampling.stop_ids, jnp.int32)

    def choose(hidden: Array, done: Array, column: Array) -> tuple[Array, Array]:
        keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, column)
        token = next_token(module.logits(hidden), sampling, keys)
        done = done | jnp.any(token[:, None] == stops[None, :], axis=-1)
        return jnp.where(done, NOTHING, token), done

    cache = module.empty_cache(rows, width + limit)
    hidden, cache = module.extend(input_ids, mask_positions(mask), mask, cache)
    last = jnp.argmax(jnp.arange(width)[None, :] * mask, axis=-1)
    token, done = choose(hidden[jnp.arange(rows), last], jnp.sum(mask, axis=-1) == 0, jnp.array(0))
    out = jnp.full((rows, limit), NOTHING, jnp.int32).at[:, 0].set(token)
    lengths = jnp.sum(mask, axis=-1)

    def unfinished(carry):
        _, _, done, column, _ = carry
        return (column < limit) & ~jnp.all(done)

    def step(carry):
        out, token, done, column, cache = carry
        positions = (lengths + column - 1)[:, None]
        given = jnp.where(done, sampling.pad_id, token)[:, None]
        hidden, cache = module.extend(given, positions, jnp.ones_like(positions), cache)
        token, done = choose(hidden[:, 0], done, column)
        return out.at[:, column].set(token), token, done, column + 1, cache

    carry = (out, token, done, jnp.array(1), cache)
    return jax.lax.while_loop(unfinished, step, carry)[0]


def make_decoder(bind: Callable[..., Cached], sampling: Sampling) -> Callable[..., Array]:
    """``decode`` jitted over ``(parts, input_ids, mask, key)`` with ``bind(*parts)`` the module."""

    def run(parts, input_ids, mask, key):
        return decode(bind(*parts), input_ids, mask, sampling, key)

    return jax.jit(run)


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
