"""The factors of a start in the stacks of a model, and factors that are given.

A start is one compiled program for each shape of a stack: it takes the stack and a layer's number,
and writes that layer's factors into their place. The stack may be split over the devices of several
hosts, alike and so agreeing to the bit. ``pissa_niter_N`` multiplies it by thin matrices where it
lies, and only thin ones, [D, R] and [F, R], travel. ``pissa``, ``milora`` and ``olora`` decompose a
whole layer: every device gathers that one layer in float32 and decomposes it for itself.
"""

import functools
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from balora_jax.array_types import Array, Float, PRNGKeyArray
from balora_jax.models.adapters import AdaptedModule
from balora_jax.models.methods.method import Part
from balora_jax.models.starts.start import Start, check_without_rows

Arrays = dict[str, Array]
Stacks = tuple[Float[Array, "L D R"], Float[Array, "L R F"]]
Layout = Callable[[str, tuple[int, ...]], Sharding]
"""Place of an array, from its path and shape."""

Moments = Callable[[str], Float[Array, "L D D"]]
"""Of a stacked layer's path: ``Σ x xᵀ`` of each layer over the tokens x that enter it, divided by
their number."""


def start_adapters(
    modules: Sequence[AdaptedModule],
    kernels: Mapping[str, Array],
    *,
    start: Start,
    key: PRNGKeyArray,
    layout: Layout | None = None,
    moments: Moments | None = None,
    report: Callable[[Stacks], Any] = lambda stacks: None,
) -> tuple[Arrays, Arrays]:
    """The adapters at step 0 and the origin they are measured from.

    Args:
        modules: the adapted layers.
        kernels: the frozen stacked weights [L, D, F] by ``path`` + ``.kernel``, wherever they lie;
            each is looked up once.
        start: makes the factors of a layer.
        key: the run's key; each layer folds its own name in, so the values do not depend on which
            other layers are adapted.
        layout: where the factors lie; None leaves it to the compiler.
        moments: of the inputs of the layers, for a start that reads rows; each is looked up once.
        report: called after each layer with the stacks that it was written into.

    Returns:
        ``adapters`` (``lora_a``, ``lora_b``; float32) and ``origin`` (``lora_scale``, and
        ``origin_a``, ``origin_b`` in the kernels' dtype where the start is not zero). The
        trainable start is the origin's own values, so the delta is exactly zero. LoRA-FA has
        ``lora_a`` in ``origin`` and no ``origin_a``; DoRA has ``lora_magnitude`` [L, F] in
        ``adapters`` and ``origin_norm`` [L, F], its square, in ``origin``.

    Raises:
        InputError: a rank that the start cannot have, or no moments for one that reads rows.
    """
    start.check_ranks(modules)
    if moments is None:
        check_without_rows(start)
    adapters: Arrays = {}
    origin: Arrays = {}
    for path, members in _by_path(modules).items():
        kernel = kernels[f"{path}.kernel"]
        origin[f"{path}.lora_scale"] = _scales(path, members, kernel, layout)
        moment = moments(path) if start.rows and moments is not None else None
        stacks = _started(path, members, kernel, moment, start, key, layout, report)
        method, began = members[0].method, (adapters, origin)
        _put(began, path, method.parts(origin=start.has_origin), method.begun(kernel, *stacks))
    return adapters, origin


def _put(
    began: tuple[Arrays, Arrays], path: str, parts: Mapping[str, Part], values: Mapping[str, Array]
) -> None:
    """Add those arrays of a stack that its method has to what trains and to the constants."""
    adapters, origin = began
    for name, part in parts.items():
        if name in values:
            (adapters if part.trains else origin)[f"{path}.{name}"] = values[name]


def _started(
    path: str,
    members: Sequence[AdaptedModule],
    kernel: Float[Array, "L D F"],
    moment: Float[Array, "L D D"] | None,
    start: Start,
    key: PRNGKeyArray,
    layout: Layout | None,
    report: Callable[[Stacks], Any],
) -> Stacks:
    """The factors of one stack of layers, written layer by layer into stacks of zeros."""
    layers, d_in, d_out = kernel.shape
    widest = max(member.rank for member in members)
    shapes = (layers, d_in, widest), (layers, widest, d_out)
    names = (f"{path}.lora_a", f"{path}.lora_b")
    places = layout and tuple(layout(*pair) for pair in zip(names, shapes, strict=True))
    # Without an origin there is nothing to agree with, so A need not be rounded.
    dtype = kernel.dtype if start.has_origin else jnp.dtype(jnp.float32)
    stacks = _zero_stacks(shapes, dtype, places)
    for member in members:
        layer_key = jax.random.fold_in(key, zlib.crc32(member.name.encode()))
        where = np.int32(member.layer), np.float32(member.scale)
        one = stacks, kernel, moment, *where, layer_key
        stacks = _write_layer(*one, start, member.rank, places)
        report(stacks)
    return stacks


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zero_stacks(shapes: Any, dtype: Any, places: tuple[Sharding, Sharding] | None) -> Stacks:
    down, up = shapes
    return _constrained((jnp.zeros(down, dtype), jnp.zeros(up, dtype)), places)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=(6, 7, 8))
def _write_layer(
    stacks: Stacks,
    kernel: Float[Array, "L D F"],
    moment: Float[Array, "L D D"] | None,
    layer: Any,
    scale: Any,
    key: PRNGKeyArray,
    start: Start,
    rank: int,
    places: tuple[Sharding, Sharding] | None,
) -> Stacks:
    """The stacks with the factors of one layer in them, zero-padded to the largest rank.

    A padded column of A meets a padded row of B that is zero too, so both gradients are exactly
    zero there and the padding stays zero under any optimizer of this project.
    """
    down, up = stacks
    inputs = None if moment is None else moment[layer]
    a, b = start.factors(kernel[layer], rank, scale, key, inputs)
    # Rounded to the dtype in which the origin is kept, so that A − A₀ is exactly 0.
    a = jax.lax.dynamic_update_slice(down, a.astype(down.dtype)[None], (layer, 0, 0))
    b = jax.lax.dynamic_update_slice(up, b.astype(up.dtype)[None], (layer, 0, 0))
    return _constrained((a, b), places)


def _constrained(stacks: Stacks, places: tuple[Sharding, Sharding] | None) -> Stacks:
    return stacks if places is None else jax.lax.with_sharding_constraint(stacks, places)


def start_from_factors(
    modules: Sequence[AdaptedModule],
    kernels: Mapping[str, Any],
    factors: Mapping[str, tuple[np.ndarray, np.ndarray]],
    magnitudes: Mapping[str, np.ndarray] | None = None,
    layout: Layout | None = None,
) -> tuple[Arrays, Arrays]:
    """Adapters that begin with given factors by checkpoint name (``A`` [D, R], ``B`` [R, F]).

    Of ``kernels`` (arrays or their shapes by path) only the shapes are read, but for DoRA, which
    needs the norms of real weights. Without ``magnitudes`` ([F] by checkpoint name) DoRA begins
    with the norms of ``W + s·A B``: it computes what plain LoRA with these factors does.
    """
    stacks = given_factors(modules, kernels, factors, magnitudes, layout)
    adapters: Arrays = {}
    origin: Arrays = {}
    for path, members in _by_path(modules).items():
        kernel, method = kernels[f"{path}.kernel"], members[0].method
        leaves = (name for name in stacks if name.rpartition(".")[0] == path)
        values = {name.rpartition(".")[2]: stacks[name] for name in leaves}
        values |= {"lora_scale": _scales(path, members, kernel, layout)}
        values |= method.given(kernel, values)
        _put((adapters, origin), path, method.parts(origin=False), values)
    return adapters, origin


def given_factors(
    modules: Sequence[AdaptedModule],
    kernels: Mapping[str, Any],
    factors: Mapping[str, tuple[np.ndarray, np.ndarray]],
    magnitudes: Mapping[str, np.ndarray] | None = None,
    layout: Layout | None = None,
) -> Arrays:
    """Stacks of given factors and magnitudes from shapes alone, as an export needs them.

    Args:
        modules: the adapted layers.
        kernels: arrays or their shapes by ``path`` + ``.kernel``.
        factors: ``A`` [D, R] and ``B`` [R, F] by checkpoint name.
        magnitudes: of DoRA, [F] by checkpoint name; the rest of a stack has 0.
        layout: where the stacks lie; None for the first device here.

    Returns:
        ``lora_a``, ``lora_b`` and, with magnitudes, ``lora_magnitude``; float32.
    """
    stacks: Arrays = {}
    for path, members in _by_path(modules).items():
        layers, d_in, d_out = kernels[f"{path}.kernel"].shape
        widest = max(member.rank for member in members)
        down = np.zeros((layers, d_in, widest), np.float32)
        up = np.zeros((layers, widest, d_out), np.float32)
        lengths = np.zeros((layers, d_out), np.float32)
        for member in members:
            a, b = factors[member.name]
            down[member.layer][:, : member.rank] = a
            up[member.layer][: member.rank] = b
            if magnitudes:
                lengths[member.layer] = magnitudes[member.name]
        tables: dict[str, np.ndarray] = {"lora_a": down, "lora_b": up}
        if magnitudes:
            tables["lora_magnitude"] = lengths
        for leaf, table in tables.items():
            stacks[f"{path}.{leaf}"] = _placed(f"{path}.{leaf}", table, layout)
    return stacks


def _by_path(modules: Sequence[AdaptedModule]) -> dict[str, list[AdaptedModule]]:
    members: dict[str, list[AdaptedModule]] = defaultdict(list)
    for module in modules:
        members[module.path].append(module)
    return members


def _placed(path: str, table: np.ndarray, layout: Layout | None) -> Array:
    """A table that every process holds whole as an array on its devices."""
    if layout is None:
        return jnp.asarray(table)
    place = layout(path, table.shape)
    return jax.make_array_from_callback(table.shape, place, table.__getitem__)


def _scales(
    path: str, members: Sequence[AdaptedModule], kernel: Any, layout: Layout | None
) -> Float[Array, "L"]:
    """``lora_scale`` [L] of a stacked layer; 0 where a layer of the stack is not adapted."""
    table = np.zeros(kernel.shape[:1], np.float32)
    for member in members:
        table[member.layer] = member.scale
    return _placed(f"{path}.lora_scale", table, layout)
