"""One optimizer step: accumulate gradients over micro-batches, update, report."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from balora_jax.array_types import Array, PRNGKeyArray, Scalar
from balora_jax.numerics.objective import TASK, columns_of
from balora_jax.numerics.terms import TERMS
from balora_jax.parallel import hosts
from balora_jax.parallel.sharding import AnyMesh, batch_sharding, replicated
from balora_jax.training import guard
from balora_jax.training.guard import Guard

Metrics = dict[str, Scalar]


class TrainState(NamedTuple):
    """State that training changes.

    Attributes:
        step: optimizer steps done, int32, those without an update among them.
        adapters: trainable arrays by path, float32.
        opt_state: of the optax chain.
        guard: what decides whether an update is skipped.
    """

    step: Scalar
    adapters: dict[str, Array]
    opt_state: Any
    guard: Guard


class StepParts(NamedTuple):
    """Parts of a step; each is a pure function.

    Attributes:
        loss: ``(adapters, constants, micro_batch, counts, weights, dropout_key, emphasis)`` →
            (loss, parts); ``emphasis`` multiplies the task and each term in the loss by name, None
            for all 1.
        counts: batch → the divisors of every mean.
        weights: step → λ of every term by name.
        optimizer: the optax chain.
        learning_rate: step → its learning rate.
        dropout: whether the loss wants a key, for dropout or to draw rows.
        spike_sigmas: of :func:`guard.accepts`.
    """

    loss: Callable[..., tuple[Scalar, Metrics]]
    counts: Callable[[dict[str, Array]], Any]
    weights: Callable[[Scalar], dict[str, Scalar]]
    optimizer: optax.GradientTransformation
    learning_rate: Callable[[Scalar], Any]
    dropout: bool
    spike_sigmas: float | None = None


def train_step(
    parts: StepParts,
    state: TrainState,
    constants: Any,
    batch: dict[str, Array],
    key: PRNGKeyArray,
) -> tuple[TrainState, Metrics]:
    """The next state and this step's metrics; every mean is over the global batch.

    Where the guard does not accept the loss and the gradient, adapters and optimizer stay as they
    were, the schedule of the learning rate with them.

    Args:
        parts: static functions.
        state: donated by the caller.
        constants: frozen arrays, passed through to the loss.
        batch: arrays [micro-batches, B, T].
        key: the run's key; the step and the micro-batch are folded in.
    """
    counts, weights = parts.counts(batch), parts.weights(state.step)
    step_key = jax.random.fold_in(key, state.step)
    grad = jax.value_and_grad(parts.loss, has_aux=True)

    def accumulate(total: Any, numbered: Any) -> tuple[Any, None]:
        index, micro_batch = numbered
        dropout_key = jax.random.fold_in(step_key, index) if parts.dropout else None
        (loss, values), grads = grad(
            state.adapters, constants, micro_batch, counts, weights, dropout_key, None
        )
        return jax.tree.map(jnp.add, total, (loss, values, grads)), None

    micro_batches = batch["input_ids"].shape[0]
    first = jax.tree.map(lambda x: x[0], batch)
    drawn = step_key if parts.dropout else None
    # Of the loss alone: the gradients' shapes are the adapters', and tracing them takes longer.
    shapes = jax.eval_shape(
        lambda: parts.loss(state.adapters, constants, first, counts, weights, drawn, None)
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (*shapes, state.adapters))
    (loss, values, grads), _ = jax.lax.scan(accumulate, zeros, (jnp.arange(micro_batches), batch))
    norm = optax.tree.norm(grads)
    good = guard.accepts(state.guard, loss, norm, parts.spike_sigmas)
    seen = guard.record(state.guard, good, loss, norm)
    updates, opt_state = parts.optimizer.update(grads, state.opt_state, state.adapters)
    new = (jax.tree.map(jnp.add, state.adapters, updates), opt_state)
    old = (state.adapters, state.opt_state)
    adapters, opt_state = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
    rate = parts.learning_rate(state.step - state.guard.skipped)
    metrics = {
        "loss": loss,
        **columns_of(weights),
        **values,
        "learning_rate": jnp.asarray(rate, jnp.float32),
        "grad_norm": norm,
        "tokens": jnp.asarray(counts.tokens, jnp.float32),
        "skipped": seen.skipped,
        "skipped_in_a_row": seen.in_a_row,
    }
    return TrainState(state.step + 1, adapters, opt_state, seen), metrics


def compile_step(parts: StepParts, state: TrainState, mesh: Mesh) -> Callable[..., Any]:
    """``train_step`` jitted for a mesh: state donated, its shardings fixed, metrics replicated."""
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)

    def step(state, constants, batch, key):
        return train_step(parts, state, constants, batch, key)

    return jax.jit(step, donate_argnums=0, out_shardings=(placed, replicated(mesh)))


def initial_state(
    adapters: dict[str, Array], optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Step 0, with the optimizer's moments laid out like the adapters they belong to."""
    shapes = {
        path: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=value.sharding)
        for path, value in adapters.items()
    }
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(shapes, optimizer, mesh))
    opt_state = jax.jit(optimizer.init, out_shardings=layout.opt_state)(adapters)
    begin = jax.jit(
        lambda: (jnp.zeros((), jnp.int32), guard.new_guard()),
        out_shardings=(layout.step, layout.guard),
    )
    step, seen = begin()
    return TrainState(step, adapters, opt_state, seen)


def abstract_state(
    adapters: dict[str, jax.ShapeDtypeStruct],
    optimizer: optax.GradientTransformation,
    mesh: AnyMesh,
) -> TrainState:
    """Shapes and shardings of a state, from those of the adapters alone."""
    placed = {path: leaf.sharding for path, leaf in adapters.items()}

    def struct(leaf: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        struct,
        jax.eval_shape(optimizer.init, adapters),
        placed,
        transform_non_params=lambda leaf: struct(leaf, replicated(mesh)),
    )
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    seen = jax.tree.map(
        lambda leaf: struct(leaf, replicated(mesh)), jax.eval_shape(guard.new_guard)
    )
    shapes: Any = adapters
    return TrainState(step, shapes, opt_state, seen)


def gradient_shares(parts: StepParts) -> Callable[..., Metrics]:
    """A jitted function of each weighted term's gradient norm and its share of their sum.

    Measured on the first micro-batch, with the weights of the step.
    """
    names = (TASK, *TERMS)

    def measure(state: TrainState, constants: Any, batch: dict, key: PRNGKeyArray) -> Metrics:
        counts = parts.counts(jax.tree.map(lambda x: x[:1], batch))
        weights = parts.weights(state.step)
        dropout_key = jax.random.fold_in(key, state.step) if parts.dropout else None
        micro_batch = jax.tree.map(lambda x: x[0], batch)

        def norm(one_hot: Array) -> Scalar:
            emphasis = dict(zip(names, one_hot, strict=True))
            rest = (constants, micro_batch, counts, weights, dropout_key, emphasis)
            return optax.tree.norm(jax.grad(parts.loss, has_aux=True)(state.adapters, *rest)[0])

        norms = jax.lax.map(norm, jnp.eye(len(names)))
        total = jnp.sum(norms)
        shares = jnp.where(total > 0, norms / jnp.where(total > 0, total, 1), 0)
        found = {f"gradient_share_{name}": shares[i] for i, name in enumerate(names)}
        return found | {f"gradient_norm_{name}": norms[i] for i, name in enumerate(names)}

    return jax.jit(measure)


@jax.jit
def all_finite(arrays: dict[str, Array]) -> Scalar:
    """Whether every number is finite."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in arrays.values()]))


def place_batch(batch: dict, mesh: Mesh) -> dict[str, Array]:
    """Host arrays [micro-batches, B, T] onto the devices that hold their rows.

    Every process has the whole batch and places the part of its own devices.
    """
    return {name: hosts.place(value, batch_sharding(mesh)) for name, value in batch.items()}
