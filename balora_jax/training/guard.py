"""Updates skipped because the loss or the gradient of their step cannot be trusted."""

from typing import NamedTuple

import jax.numpy as jnp

from balora_jax.array_types import Array, Bool, Float, Int, Scalar

WINDOW = 128
"""Steps that a spike is measured against."""

FEWEST = WINDOW // 2
"""Steps that must have been seen before anything counts as a spike."""


class Guard(NamedTuple):
    """Memory of the guard.

    Attributes:
        skipped: updates skipped so far.
        in_a_row: of these, the last ones without an update between.
        seen: steps whose update was made.
        losses, norms: loss and gradient norm of the last of them; a ring, 0 where not yet used.
    """

    skipped: Int[Array, ""]
    in_a_row: Int[Array, ""]
    seen: Int[Array, ""]
    losses: Float[Array, "window"]
    norms: Float[Array, "window"]


def new_guard() -> Guard:
    """Nothing seen yet."""
    count, ring = jnp.zeros((), jnp.int32), jnp.zeros((WINDOW,), jnp.float32)
    return Guard(count, count, count, ring, ring)


def accepts(guard: Guard, loss: Scalar, norm: Scalar, sigmas: float | None) -> Bool[Array, ""]:
    """Whether the update of a step with this loss and gradient norm is to be made.

    Not if one of them is not finite; nor, with ``sigmas``, if one lies more than that many
    standard deviations above the mean of the last steps.

    Source of the rule for spikes: the step-skipping optimizer of OLMo (128 steps, 6 deviations).
    """
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    if sigmas is None:
        return good
    spike = _above(loss, guard.losses, guard.seen, sigmas)
    spike |= _above(norm, guard.norms, guard.seen, sigmas)
    return good & ~(spike & (guard.seen >= FEWEST))


def _above(value: Scalar, ring: Array, seen: Array, sigmas: float) -> Array:
    count = jnp.clip(seen, 1, WINDOW)
    used = jnp.arange(WINDOW) < count
    mean = jnp.sum(jnp.where(used, ring, 0.0)) / count
    variance = jnp.sum(jnp.where(used, jnp.square(ring - mean), 0.0)) / jnp.maximum(count - 1, 1)
    return value > mean + sigmas * jnp.sqrt(variance)


def record(guard: Guard, good: Bool[Array, ""], loss: Scalar, norm: Scalar) -> Guard:
    """The guard after a step; what was skipped does not count towards what is usual."""
    place = guard.seen % WINDOW

    def put(ring: Array, value: Scalar) -> Array:
        return ring.at[place].set(jnp.where(good, value, ring[place]))

    skipped = jnp.where(good, 0, 1)
    return Guard(
        guard.skipped + skipped,
        jnp.where(good, 0, guard.in_a_row + 1),
        guard.seen + jnp.where(good, 1, 0),
        put(guard.losses, loss),
        put(guard.norms, norm),
    )
