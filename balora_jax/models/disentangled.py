"""Bidirectional self-attention: BERT's, and DeBERTa's, which also scores relative positions.

A layer of DeBERTa adds to the scores of content against content those of content against position
(``c2p``: a query meets the key of a distance) and position against content (``p2c``: a key meets
the query of a distance). Here every table is expanded to one row per distance of the sequence and
the products are shifted into place, so that no pass needs a gather or scatter over [T, T].
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from balora_jax.array_types import Array, Bool, Float
from balora_jax.models.layers import INTO_HEADS, MakeLinear

Keys = dict[str, Array | None]


@dataclass(frozen=True)
class DisentangledConfig:
    """DeBERTa's relative positions.

    Attributes:
        position_buckets: distances beyond half of it share logarithmic buckets; 0 for none.
        max_relative_positions: distance at which the last bucket ends (without buckets: at which
            distances are clipped).
        share_att_key: positions are projected by the layer's own query and key layers, else by
            ``pos_query_proj`` and ``pos_key_proj``.
        pos_att_type: ``c2p``, ``p2c`` or both, sorted.
        norm_rel_ebd: whether the table of positions passes a LayerNorm.
        position_biased_input: whether absolute positions are added to the embeddings.
    """

    position_buckets: int
    max_relative_positions: int
    share_att_key: bool
    pos_att_type: tuple[str, ...]
    norm_rel_ebd: bool
    position_biased_input: bool

    @property
    def span(self) -> int:
        """Half the rows of the table of relative positions."""
        return self.position_buckets or self.max_relative_positions


def table_rows(config: DisentangledConfig, tokens: int) -> np.ndarray:
    """Row of the table for every distance ``query − key`` from 1 − T to T − 1, ascending.

    Source: He et al. 2021 (DeBERTaV3); the rounding as ``transformers``: float32, upwards.

    Example:
        >>> config = DisentangledConfig(4, 16, True, ("c2p",), False, False)
        >>> table_rows(config, 4)  # span 4, exact up to half of it, then logarithmic
        array([1, 2, 3, 4, 5, 6, 7])
    """
    distance = np.arange(1 - tokens, tokens)
    bucket = distance
    if config.position_buckets:
        middle = config.position_buckets // 2
        far = np.maximum(np.abs(distance), middle).astype(np.float32) / np.float32(middle)
        largest = np.float32((config.max_relative_positions - 1) / middle)
        steps = np.ceil(np.log(far) / np.log(largest) * np.float32(middle - 1)).astype(np.int64)
        coarse = np.sign(distance) * (middle + steps)
        bucket = np.where(np.abs(distance) <= middle, distance, coarse)
    return np.clip(bucket + config.span, 0, 2 * config.span - 1)


def shift_rows(products: Float[Array, "... T P"]) -> Float[Array, "... T T"]:
    """Entry (i, j) of the result is entry (i, T − 1 − i + j) of ``products`` [T, 2T − 1].

    With one column more and T − 1 leading entries dropped, rows of 2T − 1 start where they should.

    Example:
        >>> shift_rows(jnp.array([[0.0, 1, 2], [3, 4, 5]])).tolist()
        [[1.0, 2.0], [3.0, 4.0]]
    """
    *batch, tokens, columns = products.shape
    flat = jnp.pad(products, [(0, 0)] * (len(batch) + 1) + [(0, 1)]).reshape(*batch, -1)
    flat = flat[..., tokens - 1 : tokens - 1 + tokens * columns]
    return flat.reshape(*batch, tokens, columns)[..., :tokens]


class SelfAttention(nnx.Module):
    """A stack of BERT's self-attention layers, up to the output projection."""

    def __init__(self, width: int, heads: int, *, linear: MakeLinear):
        self.query = linear("query", width, width, INTO_HEADS, True)
        self.key = linear("key", width, width, INTO_HEADS, True)
        self.value = linear("value", width, width, INTO_HEADS, True)
        self.heads = heads

    def __call__(
        self, x: Float[Array, "B T D"], mask: Bool[Array, "B 1 #T T"], keys: Keys, table: None
    ) -> Float[Array, "B T D"]:
        """Attend where ``mask`` allows (it may be broadcast over queries)."""
        del table
        q = split_heads(self.query(x, keys["query"]), self.heads)
        k = split_heads(self.key(x, keys["key"]), self.heads)
        v = split_heads(self.value(x, keys["value"]), self.heads)
        return attend_by_scores(products(q, k) * q.shape[-1] ** -0.5, mask, v)


class DisentangledSelfAttention(nnx.Module):
    """A stack of DeBERTa's self-attention layers, up to the output projection.

    Source: He et al. 2021 (DeBERTa), eq. 2–4, as ``transformers`` computes it.
    """

    def __init__(self, width: int, heads: int, config: DisentangledConfig, *, linear: MakeLinear):
        self.query_proj = linear("query_proj", width, width, INTO_HEADS, True)
        self.key_proj = linear("key_proj", width, width, INTO_HEADS, True)
        self.value_proj = linear("value_proj", width, width, INTO_HEADS, True)
        if not config.share_att_key and "c2p" in config.pos_att_type:
            self.pos_key_proj = linear("pos_key_proj", width, width, INTO_HEADS, True)
        if not config.share_att_key and "p2c" in config.pos_att_type:
            self.pos_query_proj = linear("pos_query_proj", width, width, INTO_HEADS, True)
        self.heads = heads
        self.config = config

    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Bool[Array, "B 1 #T T"],
        keys: Keys,
        table: Float[Array, "P D"],
    ) -> Float[Array, "B T D"]:
        """Attend where ``mask`` allows; ``table`` holds the embeddings of relative positions."""
        q = split_heads(self.query_proj(x, keys["query"]), self.heads)
        k = split_heads(self.key_proj(x, keys["key"]), self.heads)
        v = split_heads(self.value_proj(x, keys["value"]), self.heads)
        scores = products(q, k) + self._position_scores(q, k, keys, table)
        kinds = 1 + len(self.config.pos_att_type)
        return attend_by_scores(scores * (q.shape[-1] * kinds) ** -0.5, mask, v)

    def _position_scores(
        self,
        q: Float[Array, "B H T K"],
        k: Float[Array, "B H T K"],
        keys: Keys,
        table: Float[Array, "P D"],
    ) -> Float[Array, "B H T T"]:
        config = self.config
        rows = table_rows(config, q.shape[2])
        # Only the rows that this length can reach are projected.
        first = rows[0]
        table, rows = table[first : rows[-1] + 1], rows - first
        scores = jnp.zeros((), jnp.float32)
        if "c2p" in config.pos_att_type:
            project = self.key_proj if config.share_att_key else self.pos_key_proj
            positions = split_heads(project(table, keys["pos_key"])[None], self.heads)
            # Row i is a query, and its columns go from the largest distance to the smallest.
            scores += shift_rows(products(q, positions[:, :, rows[::-1]]))
        if "p2c" in config.pos_att_type:
            project = self.query_proj if config.share_att_key else self.pos_query_proj
            positions = split_heads(project(table, keys["pos_query"])[None], self.heads)
            # Row j is a key: the distance grows with the query.
            scores += shift_rows(products(k, positions[:, :, rows])).swapaxes(-1, -2)
        return scores


def split_heads(x: Float[Array, "B T D"], heads: int) -> Float[Array, "B H T K"]:
    """Heads before tokens."""
    batch, tokens, _ = x.shape
    return x.reshape(batch, tokens, heads, -1).transpose(0, 2, 1, 3)


def attend_by_scores(
    scores: Float[Array, "B H T S"], mask: Bool[Array, "B 1 #T S"], v: Float[Array, "B H S K"]
) -> Float[Array, "B T D"]:
    """Softmax in float32 over the allowed keys, then the mean of their values.

    A query that may attend to nothing takes the plain mean of all values, as in ``transformers``.
    """
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    precision = jax.lax.Precision.HIGHEST if v.dtype == jnp.float32 else None
    out = jnp.einsum("bhts,bhsk->bthk", weights, v, precision=precision)
    return out.reshape(*out.shape[:2], -1)


def products(a: Float[Array, "B H T K"], b: Float[Array, "#B H P K"]) -> Float[Array, "B H T P"]:
    """Every row against every row, float32; ``b`` may be one for the whole batch."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    subscripts = "bhtk,hpk->bhtp" if b.shape[0] == 1 else "bhtk,bhpk->bhtp"
    b = b[0] if b.shape[0] == 1 else b
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=jnp.float32)
