"""Where adapters begin: LoRA's zero B, a part of the weight, random factors, or given ones."""

import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from balora_jax.array_types import Array, Float, PRNGKeyArray
from balora_jax.errors import InputError
from balora_jax.models.adapters import AdaptedModule, column_norms
from balora_jax.numerics import linalg

Arrays = dict[str, Array]
Factors = tuple[Float[Array, "D R"], Float[Array, "R F"]]


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
) -> tuple[Arrays, Arrays]:
    """The adapters at step 0 and the origin they are measured from.

    Args:
        modules: the adapted layers.
        kernels: the frozen stacked weights by ``path`` + ``.kernel``.
        start: ``lora``, ``pissa`` (exact SVD), ``pissa_niter_N`` (randomized SVD), ``milora``,
            ``olora`` or ``orthogonal``.
        key: the run's key; each layer folds its own name in, so the values do not depend on which
            other layers are adapted.

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

    def make(module: AdaptedModule) -> Factors:
        layer_key = jax.random.fold_in(key, zlib.crc32(module.name.encode()))
        if start == "lora":
            return lora_start(module, layer_key)
        kernel = kernels[f"{module.path}.kernel"]
        a, b = nonzero_start(start, kernel[module.layer], module.rank, module.scale, layer_key)
        # Rounded to the dtype in which the origin is kept, so that A − A₀ is exactly 0.
        return a.astype(kernel.dtype), b.astype(kernel.dtype)

    stacks = stack_factors(modules, kernels, make)
    # A copy even where the dtype agrees: the train step donates the adapters, not the origin.
    adapters = {name: jnp.array(stack, jnp.float32, copy=True) for name, stack in stacks.items()}
    origin = scales(modules, kernels)
    if start_has_origin(start):
        origin |= {name.replace(".lora_", ".origin_"): stack for name, stack in stacks.items()}
    for path in _paths(modules, "dora"):
        origin[f"{path}.origin_norm"] = squared_norms(kernels[f"{path}.kernel"])
        adapters[f"{path}.lora_magnitude"] = jnp.sqrt(origin[f"{path}.origin_norm"])
    return _freeze_a(modules, adapters, origin)


def start_from_factors(
    modules: Sequence[AdaptedModule],
    kernels: Mapping[str, Any],
    factors: Mapping[str, tuple[np.ndarray, np.ndarray]],
    magnitudes: Mapping[str, np.ndarray] | None = None,
) -> tuple[Arrays, Arrays]:
    """Adapters that begin with given factors by checkpoint name (``A`` [D, R], ``B`` [R, F]).

    Of ``kernels`` (arrays or their shapes by path) only the shapes are read, but for DoRA, which
    needs the norms of real weights. Without ``magnitudes`` ([F] by checkpoint name) DoRA begins
    with the norms of ``W + s·A B``: it computes what plain LoRA with these factors does.
    """
    adapters = given_factors(modules, kernels, factors, magnitudes)
    origin = scales(modules, kernels)
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
) -> Arrays:
    """Stacks of given factors and magnitudes from shapes alone, as an export needs them.

    Args:
        modules: the adapted layers.
        kernels: arrays or their shapes by ``path`` + ``.kernel``.
        factors: ``A`` [D, R] and ``B`` [R, F] by checkpoint name.
        magnitudes: of DoRA, [F] by checkpoint name; the rest of a stack has 0.

    Returns:
        ``lora_a``, ``lora_b`` and, with magnitudes, ``lora_magnitude``; float32.
    """

    def make(module: AdaptedModule) -> Factors:
        a, b = factors[module.name]
        return jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)

    stacks = stack_factors(modules, kernels, make)
    tables: dict[str, np.ndarray] = {}
    for module in modules:
        if magnitudes and module.method == "dora":
            layers, _, d_out = kernels[f"{module.path}.kernel"].shape
            name = f"{module.path}.lora_magnitude"
            table = tables.setdefault(name, np.zeros((layers, d_out), np.float32))
            table[module.layer] = magnitudes[module.name]
    return stacks | {name: jnp.asarray(table) for name, table in tables.items()}


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


def lora_start(module: AdaptedModule, key: PRNGKeyArray) -> Factors:
    """Random A and zero B. Source: PEFT's default, Kaiming uniform with a = √5."""
    bound = 1.0 / np.sqrt(module.in_features)
    shape = (module.in_features, module.rank)
    a = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
    return a, jnp.zeros((module.rank, module.out_features), jnp.float32)


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


def stack_factors(
    modules: Sequence[AdaptedModule],
    kernels: Mapping[str, Any],
    make: Callable[[AdaptedModule], Factors],
) -> Arrays:
    """Stack per-layer factors, zero-padded to the largest rank, on the leading axis.

    A padded column of A meets a padded row of B that is zero too, so both gradients are exactly
    zero there and the padding stays zero under any optimizer of this project.
    """
    by_path: dict[str, list[AdaptedModule]] = defaultdict(list)
    for module in modules:
        by_path[module.path].append(module)
    stacks: Arrays = {}
    for path, members in by_path.items():
        layers, d_in, d_out = kernels[f"{path}.kernel"].shape
        widest = max(member.rank for member in members)
        made = {member.layer: make(member) for member in members}
        dtype = next(iter(made.values()))[0].dtype
        empty = (jnp.zeros((d_in, 0), dtype), jnp.zeros((0, d_out), dtype))
        pairs = [made.get(i, empty) for i in range(layers)]
        stacks[f"{path}.lora_a"] = jnp.stack(
            [jnp.pad(a, ((0, 0), (0, widest - a.shape[1]))) for a, _ in pairs]
        )
        stacks[f"{path}.lora_b"] = jnp.stack(
            [jnp.pad(b, ((0, widest - b.shape[0]), (0, 0))) for _, b in pairs]
        )
    return stacks


def scales(modules: Sequence[AdaptedModule], kernels: Mapping[str, Any]) -> Arrays:
    """``lora_scale`` [L] for each stacked layer; 0 where a layer of the stack is not adapted."""
    tables: dict[str, np.ndarray] = {}
    for module in modules:
        layers = kernels[f"{module.path}.kernel"].shape[0]
        name = f"{module.path}.lora_scale"
        tables.setdefault(name, np.zeros((layers,), np.float32))[module.layer] = module.scale
    return {name: jnp.asarray(table) for name, table in tables.items()}
