"""Parts of the head's pass: rows of hidden states, the head, chunks of rows."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from balora_jax.array_types import Array, Bool, Float, Int, Scalar
from balora_jax.numerics.arithmetic import einsum
from balora_jax.numerics.softmax import Softmax


@dataclass(frozen=True)
class LogitMap:
    """From ``H Wᵀ`` to logits: ``cap · tanh(scale · H Wᵀ / cap)``. Static.

    Attributes:
        soft_cap: Largest size of a logit (Gemma 2); None leaves them linear.
        scale: Factor of the products (Granite).
    """

    soft_cap: float | None = None
    scale: float = 1.0

    def __call__(self, products: Array) -> Array:
        """Logits, float32."""
        products = self._scaled(products)
        if self.soft_cap is None:
            return products
        return self.soft_cap * jnp.tanh(products / self.soft_cap)

    def pull_back(self, gradient: Array, logits: Array) -> Array:
        """``d loss / d(H Wᵀ)`` from ``d loss / d logits``."""
        gradient = self._scaled(gradient)
        if self.soft_cap is None:
            return gradient
        return gradient * (1 - (logits / self.soft_cap) ** 2)

    def _scaled(self, values: Array) -> Array:
        return values if self.scale == 1.0 else values * self.scale


@dataclass(frozen=True)
class HeadAxes:
    """Mesh axes inside ``jax.shard_map``: rows are split over ``rows``, W over ``vocabulary``."""

    rows: tuple[str, ...] = ()
    vocabulary: str | None = None


LINEAR, ONE_DEVICE = LogitMap(), HeadAxes()


class Rows(NamedTuple):
    """Hidden states of a micro-batch and what each row counts for.

    Attributes:
        student: Final hidden states of the model in training, ``[N, D]``.
        teacher: Those of the frozen model; None where no term reads them.
        labels: Token to predict, ``[N]``; read where ``label_mask``.
        label_mask: Rows of the cross-entropy, ``[N]``.
        term_mask: Rows of the regularizers, ``[N]``.
        taught: Rows whose ``teacher`` is there, ``[N]``; None for all. Terms that read the teacher
            count no others.
    """

    student: Float[Array, "N D"]
    teacher: Float[Array, "N D"] | None
    labels: Int[Array, "N"]
    label_mask: Bool[Array, "N"]
    term_mask: Bool[Array, "N"]
    taught: Bool[Array, "N"] | None = None

    def mask_of(self, *, needs_teacher: bool) -> Bool[Array, "N"]:
        """Rows that a term counts."""
        if self.taught is None or not needs_teacher:
            return self.term_mask
        return self.term_mask & self.taught


class HeadSums(NamedTuple):
    """Sums of a micro-batch over all its devices; float32 scalars.

    Attributes:
        task_sum: Cross-entropy summed over rows with labels, in nats.
        task_count: Rows with labels.
        term_count: Rows of the terms.
        terms: Of each term at work, by name: its sum over the rows of the terms, or of a term that
            couples rows its value on this micro-batch.
        teacher_entropy: Of each term whose weight follows it, by name: entropy of the teacher's
            softmax at the term's temperature over the full vocabulary, summed over the rows.
        statistics: What else terms tell of this micro-batch, by name.
    """

    task_sum: Scalar
    task_count: Scalar
    term_count: Scalar
    terms: dict[str, Scalar]
    teacher_entropy: dict[str, Scalar]
    statistics: dict[str, Scalar]


@dataclass(frozen=True)
class Head:
    """A head and how its pass runs.

    Attributes:
        embedding: ``[V, D]``; this device's rows if ``axes.vocabulary`` is given.
        factor: R of ``scale · W``; None where no term reads it, logits are capped or the head
            trains.
        logit_map: From products to logits.
        chunk: Rows of a chunk.
        axes: Mesh axes that are manual here.
        original: The teacher's own head where this one trains; None where it is frozen, and serves
            both.
    """

    embedding: Float[Array, "V D"]
    factor: Float[Array, "D D"] | None
    logit_map: LogitMap
    chunk: int
    axes: HeadAxes
    original: Float[Array, "V D"] | None = None

    @property
    def linear(self) -> bool:
        """Whether a term may work in the width of the model.

        The logits are linear in the hidden states, and no derivative by the head is wanted.
        """
        return self.logit_map.soft_cap is None and self.original is None

    def logits(self, hidden: Float[Array, "N D"]) -> Float[Array, "N V"]:
        """The student's logits of a few rows, this device's columns, float32."""
        return self.logit_map(head_products(hidden, self.embedding))

    def teacher_logits(self, hidden: Float[Array, "N D"]) -> Float[Array, "N V"]:
        """Those of the teacher."""
        table = self.embedding if self.original is None else self.original
        return self.logit_map(head_products(hidden, table))

    def unchanged(self) -> Bool[Array, ""]:
        """Whether the student's head is that of the teacher, bit for bit, on all devices."""
        if self.original is None:
            return jnp.ones((), bool)
        same = jnp.all(self.embedding == self.original)
        axis = self.axes.vocabulary
        return same if axis is None else jax.lax.pmin(same.astype(jnp.int32), axis) > 0


class Chunks(NamedTuple):
    """Rows that each chunk takes: those that count, closed up, in their order.

    Attributes:
        order: Row of each place, ``[places]``; places behind the last used row repeat row 0.
        place: Place of each row, ``[N]``.
        used: Rows that count.
        count: Chunks that hold any; the only number of chunks that costs time.
        size: Rows of a chunk, static.
    """

    order: Array
    place: Array
    used: Array
    count: Array
    size: int

    @classmethod
    def of(cls, used: Array, chunk: int) -> "Chunks":
        """Close up the rows that are used."""
        rows = used.shape[0]
        size = min(chunk, rows)
        places = size * -(-rows // size)
        order = jnp.nonzero(used, size=places, fill_value=0)[0]
        total = jnp.cumsum(used)
        return cls(order, total - 1, used, -(-total[-1] // size), size)

    def rows(self, index: Array) -> tuple[Array, Array]:
        """Rows of a chunk, and which of its places are taken."""
        taken = jax.lax.dynamic_slice_in_dim(self.order, index * self.size, self.size)
        places = index * self.size + jnp.arange(self.size)
        return taken, places < jnp.sum(self.used)

    def put_back(self, values: Array) -> Array:
        """From ``[places, D]`` to ``[N, D]``, zero in rows that were left out."""
        return jnp.where(self.used[:, None], values[jnp.maximum(self.place, 0)], 0)


class Chunk(NamedTuple):
    """A few rows as a term sees them, the vocabulary perhaps split over devices.

    Attributes:
        student: Logits in float32, ``[n, V]``; this device's columns if ``axis`` is given.
        teacher: Those of the frozen model; None where no term reads them.
        softmax: Of the student's logits at temperature 1.
        mask: Rows of the terms, ``[n]``.
        equal: Rows whose logits agree with the teacher's as hidden states and head do, bit for bit,
            ``[n]``.
        taken: Row of the micro-batch in each place, ``[n]``.
        axis: Mesh axis inside ``jax.shard_map`` that the vocabulary is split over.
        linear: As :attr:`Head.linear`.
    """

    student: Float[Array, "n V"]
    teacher: Float[Array, "n V"] | None
    softmax: Softmax
    mask: Bool[Array, "n"]
    equal: Bool[Array, "n"]
    taken: Int[Array, "n"]
    axis: str | None
    linear: bool


def head_products(
    hidden: Float[Array, "N D"], embedding: Float[Array, "V D"]
) -> Float[Array, "N V"]:
    """Return ``H Wᵀ`` in float32, multiplied in the dtype of the hidden states.

    >>> import jax.numpy as jnp
    >>> head_products(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0]])).tolist()
    [[11.0]]
    """
    return einsum("nd,vd->nv", hidden, embedding)


def take(array: Float[Array, "N w"], taken: Array, counted: Array) -> Float[Array, "n w"]:
    """Rows of a chunk, zero in places that do not count."""
    # A row that is left out may hold anything, NaN included, which a product with 0 would keep.
    return jnp.where(counted[:, None], array[taken], 0)
