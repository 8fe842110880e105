"""Adapters on a module of your own: any NNX model with ``nnx.Linear`` layers."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from balora_jax.array_types import PRNGKeyArray
from balora_jax.errors import InputError
from balora_jax.models.adapters import AdapterShape, LinearShape, plan_adapters
from balora_jax.models.linear import Linear
from balora_jax.models.methods import METHODS
from balora_jax.models.starts import STARTS
from balora_jax.models.starts.stacks import start_adapters
from balora_jax.models.variables import Origin


def adapt(
    model: nnx.Module,
    *,
    rank: int,
    key: PRNGKeyArray,
    alpha: float | None = None,
    target_modules: Sequence[str] | str = "all-linear",
    start: str = "pissa",
    method: str = "lora",
) -> nnx.Module:
    """Give layers of a model adapters, and return the model, which is changed in place.

    Every ``nnx.Linear`` whose dotted path ``target_modules`` names becomes a
    :class:`~balora_jax.models.linear.Linear` with the same weights. At the start it computes what
    it did before, to the last bit, whatever the start: so the model with its starting adapters is
    the teacher of the regularizers. It computes in the dtype of its input.

    What trains are the model's ``nnx.LoRAParam`` variables; all else is to be left as it is.

    Args:
        model: holds the layers, at any depth.
        rank: R of every adapter.
        key: of the start.
        alpha: numerator of the scale alpha / R; R itself where not given.
        target_modules: ends of paths (``["up", "attention.query"]``), one regular expression for
            the whole path, or ``all-linear``.
        start: where A and B begin, one of ``STARTS``.
        method: what trains, one of ``METHODS`` with adapters.

    Raises:
        InputError: no such layer, start or method; a rank that is too large or that the start
            cannot have.

    >>> import jax
    >>> model = adapt(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), rank=2, key=jax.random.key(0))
    Traceback (most recent call last):
    balora_jax.errors.InputError: adapt: expected a model with nnx.Linear layers inside, got ...
    """
    layers = {
        ".".join(map(str, path)): (path, node)
        for path, node in nnx.iter_graph(model)
        if path and isinstance(node, nnx.Linear)
    }
    if not layers:
        raise InputError(
            "adapt: expected a model with nnx.Linear layers inside, got "
            f"{type(model).__name__} without any. Adapt the model that holds the layers."
        )
    kind, begin = METHODS[method], STARTS[start]
    if kind.trains_base:
        raise InputError(
            f"adapt: expected a method with adapters, got {method!r}, which trains all weights. "
            "Train the model as it is, or choose another."
        )
    modules = plan_adapters(
        [
            LinearShape(name, (name,), layer.in_features, layer.out_features)
            for name, (_, layer) in layers.items()
        ],
        rank=rank,
        alpha=rank if alpha is None else alpha,
        target_modules=target_modules,
        method=kind,
    )
    kernels = {f"{m.path}.kernel": layers[m.path][1].kernel[...][None] for m in modules}
    trained, constants = start_adapters(modules, kernels, start=begin, key=key)
    shape = AdapterShape(rank, begin.has_origin, method=kind)
    for module in modules:
        path, layer = layers[module.path]
        values = {name: (trained | constants)[f"{module.path}.{name}"][0] for name in shape.parts}
        _replace(model, path, _adapted(layer, shape, values))
    return model


def _adapted(layer: nnx.Linear, shape: AdapterShape, values: dict[str, Any]) -> Linear:
    """The layer with an adapter; its variables hold one layer, not a stack."""
    kernel = layer.kernel[...]
    bias = layer.bias is not None
    made = Linear(*kernel.shape, layers=1, use_bias=bias, adapter=shape, dtype=kernel.dtype)
    made.kernel = layer.kernel
    made.bias = layer.bias
    for name, part in shape.parts.items():
        kind = nnx.LoRAParam if part.trains else Origin
        setattr(made, name, kind(jnp.asarray(values[name])))
    return made


def _replace(model: Any, path: tuple[Any, ...], layer: Linear) -> None:
    *parents, last = path
    for part in parents:
        model = getattr(model, part) if isinstance(part, str) else model[part]
    if isinstance(last, str) and hasattr(model, last):
        setattr(model, last, layer)
    else:
        model[last] = layer
