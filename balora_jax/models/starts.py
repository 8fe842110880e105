"""Where adapters begin: LoRA's random A and zero B, PiSSA's principal part, or given factors."""

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
from balora_jax.models.adapters import AdaptedModule
from balora_jax.numerics import linalg

Arrays = dict[str, Array]
Factors = tuple[Float[Array, "D R"], Float[Array, "R F"]]


def start_has_origin(start: str) -> bool:
    """Whether a start is not zero, so that the adapter keeps a frozen copy of it."""
    return start.startswith("pissa")


def check_start(start: str) -> None:
    """Raises InputError unless ``start`` is ``lora``, ``pissa`` or ``pissa_niter_N``."""
    if start in ("lora", "pissa") or re.fullmatch(r"pissa_niter_\d+", start):
        return
    raise InputError(
        f"adapter.start: expected 'lora', 'pissa', 'pissa_niter_N' (N power iterations) or the "
        f"folder of a PEFT adapter, got {start!r}. Choose one of these."
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
        start: ``lora``, ``pissa`` (exact SVD) or ``pissa_niter_N`` (randomized SVD).
        key: the run's key; each layer folds its own name in, so the values do not depend on which
            other layers are adapted.

    Returns:
        ``adapters`` (``lora_a``, ``lora_b``; float32) and ``origin`` (``lora_scale``, and
        ``origin_a``, ``origin_b`` in the kernels' dtype where the start is not zero). The
        trainable start is the origin's own values, so the delta is exactly zero.
    """
    check_start(start)

    def make(module: AdaptedModule) -> Factors:
        layer_key = jax.random.fold_in(key, zlib.crc32(module.name.encode()))
        if start == "lora":
            return lora_start(module, layer_key)
        kernel = kernels[f"{module.path}.kernel"]
        a, b = pissa_start(kernel[module.layer], module.rank, module.scale, start, layer_key)
        # Rounded to the dtype in which the origin is kept, so that A − A₀ is exactly 0.
        return a.astype(kernel.dtype), b.astype(kernel.dtype)

    stacks = stack_factors(modules, kernels, make)
    # A copy even where the dtype agrees: the train step donates the adapters, not the origin.
    adapters = {name: jnp.array(stack, jnp.float32, copy=True) for name, stack in stacks.items()}
    origin = scales(modules, kernels)
    if start_has_origin(start):
        origin |= {name.replace(".lora_", ".origin_"): stack for name, stack in stacks.items()}
    return adapters, origin


def start_from_factors(
    modules: Sequence[AdaptedModule],
    kernels: Mapping[str, Any],
    factors: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> tuple[Arrays, Arrays]:
    """Adapters that begin with given factors by checkpoint name (``A`` [D, R], ``B`` [R, F]).

    Of ``kernels`` (arrays or their shapes by path) only the shapes are read.
    """

    def make(module: AdaptedModule) -> Factors:
        a, b = factors[module.name]
        return jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)

    return stack_factors(modules, kernels, make), scales(modules, kernels)


def lora_start(module: AdaptedModule, key: PRNGKeyArray) -> Factors:
    """Random A and zero B. Source: PEFT's default, Kaiming uniform with a = √5."""
    bound = 1.0 / np.sqrt(module.in_features)
    shape = (module.in_features, module.rank)
    a = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
    return a, jnp.zeros((module.rank, module.out_features), jnp.float32)


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
