"""Where adapters begin: LoRA's zero B, a part of the weight, random factors, or given ones.

A start is one compiled program for each shape of a stack: it takes the stack and a layer's number,
and writes that layer's factors into their place. The stack may be split over the devices of several
hosts, alike and so agreeing to the bit. ``pissa_niter_N`` multiplies it by thin matrices where it
lies, and only thin ones, [D, R] and [F, R], travel. ``pissa``, ``milora`` and ``olora`` decompose a
whole layer: every device gathers that one layer in float32 and decomposes it for itself.
"""

import functools
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from balora_jax.array_types import Array, Float, PRNGKeyArray
from balora_jax.errors import InputError
from balora_jax.models.adapters import AdaptedModule, column_norms
from balora_jax.numerics import linalg

Arrays = dict[str, Array]
Factors = tuple[Float[Array, "D R"], Float[Array, "R F"]]
Stacks = tuple[Float[Array, "L D R"], Float[Array, "L R F"]]
Layout = Callable[[str, tuple[int, ...]], Sharding]
"""Where an array lies, from its path and shape."""

_NAMED = ("lora", "pissa", "milora", "olora", "orthogonal")


def start_has_origin(start: str) -> bool:
    """Whether a named start is not zero, so that the adapter keeps a frozen copy of it."""
    return start != "lora" and _is_start(start)


def _is_start(start: str) -> bool:
    return start in _NAMED or re.fullmatch(r"pissa_niter_\d+", start) is not None


def check_start(start: str) -> None:
    """Raises InputError unless ``start`` is one of the names that :func:`start_adapters` takes."""
    if _is_start(start):
        return
    raise InputError(
        "adapter.start: expected 'lora', 'pissa', 'pissa_niter_N' (N power iterations), 'milora', "
        f"'olora', 'orthogonal' or the folder of a PEFT adapter, got {start!r}. "
        "Choose one of these."
    )


def check_start_ranks(start: str, modules: Sequence[AdaptedModule]) -> None:
    """Raises InputError for a rank that the start cannot have: ``orthogonal`` halves it."""
    odd = [module for module in modules if module.rank % 2]
    if start == "orthogonal" and odd:
        raise InputError(
            f"adapter.rank: expected an even rank with the start 'orthogonal', got {odd[0].rank} "
            f"for {odd[0].name}. Choose an even rank, or another start."
        )


def start_adapters(
    modules: Sequence[AdaptedModule],
    kernels: Mapping[str, Float[Array, "L D F"]],
    *,
    start: str,
    key: PRNGKeyArray,
    layout: Layout | None = None,
    report: Callable[[Stacks], Any] = lambda stacks: None,
) -> tuple[Arrays, Arrays]:
    """The adapters at step 0 and the origin they are measured from.

    Args:
        modules: the adapted layers.
        kernels: the frozen stacked weights by ``path`` + ``.kernel``, wherever they lie; each is
            looked up once.
        start: ``lora``, ``pissa`` (exact SVD), ``pissa_niter_N`` (randomized SVD), ``milora``,
            ``olora`` or ``orthogonal``.
        key: the run's key; each layer folds its own name in, so the values do not depend on which
            other layers are adapted.
        layout: where the factors lie; None leaves it to the compiler.
        report: called after each layer with the stacks that it was written into.

    Returns:
        ``adapters`` (``lora_a``, ``lora_b``; float32) and ``origin`` (``lora_scale``, and
        ``origin_a``, ``origin_b`` in the kernels' dtype where the start is not zero). The
        trainable start is the origin's own values, so the delta is exactly zero. LoRA-FA has
        ``lora_a`` in ``origin`` and no ``origin_a``; DoRA has ``lora_magnitude`` [L, F] in
        ``adapters`` and ``origin_norm`` [L, F], its square, in ``origin``.

    Raises:
        InputError: an unknown start, or a rank that it cannot have.
    """
    check_start(start)
    check_start_ranks(start, modules)
    adapters: Arrays = {}
    origin: Arrays = {}
    for path, members in _by_path(modules).items():
        kernel = kernels[f"{path}.kernel"]
        origin |= _scales(path, members, kernel, layout)
        stacks = _started(path, members, kernel, start, key, layout, report)
        for side, stack in zip("ab", stacks, strict=True):
            # A copy even where the dtype agrees: the step donates the adapters, not the origin.
            adapters[f"{path}.lora_{side}"] = jnp.array(stack, jnp.float32, copy=True)
            if start_has_origin(start):
                origin[f"{path}.origin_{side}"] = stack
        if members[0].method == "dora":
            origin[f"{path}.origin_norm"] = squared_norms(kernel)
            adapters[f"{path}.lora_magnitude"] = jnp.sqrt(origin[f"{path}.origin_norm"])
    return _freeze_a(modules, adapters, origin)


def _started(
    path: str,
    members: Sequence[AdaptedModule],
    kernel: Float[Array, "L D F"],
    start: str,
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
    # The plain start has no origin to agree with, so its A need not be rounded.
    dtype = jnp.dtype(jnp.float32) if start == "lora" else kernel.dtype
    stacks = _zero_stacks(shapes, dtype, places)
    for member in members:
        layer_key = jax.random.fold_in(key, zlib.crc32(member.name.encode()))
        where = np.int32(member.layer), np.float32(member.scale)
        stacks = _write_layer(stacks, kernel, *where, layer_key, start, member.rank, places)
        report(stacks)
    return stacks


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zero_stacks(shapes: Any, dtype: Any, places: tuple[Sharding, Sharding] | None) -> Stacks:
    down, up = shapes
    return _constrained((jnp.zeros(down, dtype), jnp.zeros(up, dtype)), places)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=(5, 6, 7))
def _write_layer(
    stacks: Stacks,
    kernel: Float[Array, "L D F"],
    layer: Any,
    scale: Any,
    key: PRNGKeyArray,
    start: str,
    rank: int,
    places: tuple[Sharding, Sharding] | None,
) -> Stacks:
    """The stacks with the factors of one layer in them, zero-padded to the largest rank.

    A padded column of A meets a padded row of B that is zero too, so both gradients are exactly
    zero there and the padding stays zero under any optimizer of this project.
    """
    down, up = stacks
    if start == "lora":
        a, b = lora_start(kernel.shape[1:], rank, key)
    else:
        a, b = nonzero_start(start, kernel[layer], rank, scale, key)
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
    adapters = given_factors(modules, kernels, factors, magnitudes, layout)
    origin: Arrays = {}
    for path, members in _by_path(modules).items():
        origin |= _scales(path, members, kernels[f"{path}.kernel"], layout)
    for path in _paths(modules, "dora"):
        kernel, scale = kernels[f"{path}.kernel"], origin[f"{path}.lora_scale"][:, None]
        origin[f"{path}.origin_norm"] = squares = squared_norms(kernel)
        down, up = adapters[f"{path}.lora_a"] * scale[..., None], adapters[f"{path}.lora_b"]
        # One layer at a time; where none is adapted both factors are zero and the norm is W's.
        layers = (kernel, squares, down, up)
        norms: Array = jax.lax.map(lambda layer: column_norms(*layer), layers)
        name = f"{path}.lora_magnitude"
        given = adapters.get(name, norms)
        adapters[name] = jnp.where(scale == 0.0, norms, given)
    return _freeze_a(modules, adapters, origin)


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
            if magnitudes and member.method == "dora":
                lengths[member.layer] = magnitudes[member.name]
        tables: dict[str, np.ndarray] = {"lora_a": down, "lora_b": up}
        if magnitudes and members[0].method == "dora":
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


def _paths(modules: Sequence[AdaptedModule], method: str) -> list[str]:
    return sorted({module.path for module in modules if module.method == method})


def _freeze_a(
    modules: Sequence[AdaptedModule], adapters: Arrays, origin: Arrays
) -> tuple[Arrays, Arrays]:
    """Move A to the constants where it does not train; its start is then A itself."""
    for path in _paths(modules, "lora_fa"):
        origin[f"{path}.lora_a"] = adapters.pop(f"{path}.lora_a")
        origin.pop(f"{path}.origin_a", None)
    return adapters, origin


@jax.jit
def squared_norms(kernel: Float[Array, "L D F"]) -> Float[Array, "L F"]:
    """``Σ_d W_df²`` of every output, summed in float32 without a float32 copy of W."""
    return jnp.sum(jnp.square(kernel.astype(jnp.float32)), axis=1)


def lora_start(shape: tuple[int, ...], rank: int, key: PRNGKeyArray) -> Factors:
    """Random A and zero B, float32. Source: PEFT's default, Kaiming uniform with a = √5."""
    bound = 1.0 / np.sqrt(shape[0])
    a = jax.random.uniform(key, (shape[0], rank), jnp.float32, -bound, bound)
    return a, jnp.zeros((rank, shape[1]), jnp.float32)


def nonzero_start(
    start: str, kernel: Float[Array, "D F"], rank: int, scale: float, key: PRNGKeyArray
) -> Factors:
    """The factors of a named start other than ``lora`` on one weight, float32."""
    if start == "milora":
        return milora_start(kernel, rank, scale)
    if start == "olora":
        return olora_start(kernel, rank)
    if start == "orthogonal":
        return orthogonal_start(kernel.shape, rank, key)
    return pissa_start(kernel, rank, scale, start, key)


def pissa_start(
    kernel: Float[Array, "D F"], rank: int, scale: float, start: str, key: PRNGKeyArray
) -> Factors:
    """Factors with ``scale · A B`` = the rank-R principal part of ``kernel``, float32.

    Source: PiSSA (arXiv 2404.02948): A = U_r √S_r and B = √S_r V_rᵀ in the orientation y = x W,
    with S divided by the scale first, so that alpha does not change the product.
    """
    matrix = kernel.astype(jnp.float32)
    if start == "pissa":
        u, s, vt = linalg.truncated_svd(matrix, rank)
    else:
        n_iter = int(start.rsplit("_", 1)[-1])
        u, s, vt = linalg.randomized_svd(matrix, rank, n_iter, key)
    root = jnp.sqrt(s / scale)
    return u * root, root[:, None] * vt


def milora_start(kernel: Float[Array, "D F"], rank: int, scale: float) -> Factors:
    """Factors with ``scale · A B`` = the part of the R smallest singular values, float32.

    Source: MiLoRA (arXiv 2406.09044), split as PiSSA splits the largest ones.
    """
    u, s, vt = linalg.truncated_svd(kernel.astype(jnp.float32), min(kernel.shape))
    root = jnp.sqrt(s[-rank:] / scale)
    return u[:, -rank:] * root, root[:, None] * vt[-rank:]


def olora_start(kernel: Float[Array, "D F"], rank: int) -> Factors:
    """The first R columns and rows of ``Wᵀ = Q R`` (W in our orientation), float32.

    Source: OLoRA (arXiv 2406.01775) as PEFT has it: with ``[out, in]`` weights B = Q[:, :R] and
    A = R[:R], whatever the scale.
    """
    q, r = jnp.linalg.qr(kernel.astype(jnp.float32).T)
    return r[:rank].T, q[:, :rank].T


def orthogonal_start(shape: tuple[int, ...], rank: int, key: PRNGKeyArray) -> Factors:
    """Random factors whose product is zero though neither is, float32.

    Source: PEFT's ``init_lora_weights="orthogonal"``: A lies in the span of one half of the rows
    of a random rotation, B in that of the other half, entries scaled by 1/10.
    """
    half, highest = rank // 2, jax.lax.Precision.HIGHEST
    key_q, key_a, key_b = jax.random.split(key, 3)
    q, _ = jnp.linalg.qr(jax.random.normal(key_q, (rank, rank)))
    a = jnp.matmul(jax.random.normal(key_a, (shape[0], half)), q[0::2], precision=highest)
    b = jnp.matmul(q[1::2].T, jax.random.normal(key_b, (half, shape[1])), precision=highest)
    return a / 10.0, b / 10.0


def _scales(
    path: str, members: Sequence[AdaptedModule], kernel: Any, layout: Layout | None
) -> Arrays:
    """``lora_scale`` [L] of a stacked layer; 0 where a layer of the stack is not adapted."""
    table = np.zeros(kernel.shape[:1], np.float32)
    for member in members:
        table[member.layer] = member.scale
    return {f"{path}.lora_scale": _placed(f"{path}.lora_scale", table, layout)}
