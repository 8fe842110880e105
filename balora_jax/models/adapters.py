"""Low-rank adapters in delta form: the adapted linear layer, and which layers get one.

Every adapter is measured from its own start (``origin``):

    y = x W + s · ((x A) B − (x A₀) B₀)

``W`` is the checkpoint's weight and is never modified, so the frozen model *is* the teacher.
Starts that begin at zero (plain LoRA) have no origin. Source: PiSSA (arXiv 2404.02948) as BA-LoRA
uses it; with ``W_res = W − s·A₀B₀`` this is algebraically PiSSA's ``W_res + s·A B``.

What trains depends on the method: A and B (``lora``), B alone (``lora_fa``), or A, B and the
length of every output's weights (``dora``).
"""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from balora_jax.array_types import Array, Float, PRNGKeyArray
from balora_jax.errors import InputError
from balora_jax.models.products import low_rank, matmul, rescaled
from balora_jax.models.quantized import (
    Quantization,
    dequantize_kernel,
    quantized_matmul,
    quantized_shapes,
)
from balora_jax.models.variables import Ends, Origin, declared, prefixed

Method = Literal["lora", "dora", "lora_fa"]


@dataclass(frozen=True)
class AdaptedModule:
    """One adapted linear layer of the checkpoint.

    Attributes:
        name: its name in the checkpoint, ``model.layers.3.self_attn.q_proj``.
        path: the stacked layer that holds it here, ``layers.self_attn.q_proj``.
        layer: its index in that stack.
        rank: columns of A that train; the stack is zero-padded to its largest rank.
        alpha: numerator of the scale.
        scale: ``alpha / rank``, or ``alpha / sqrt(rank)`` with rank-stabilised scaling.
        in_features: rows of A.
        out_features: columns of B.
        method: which of its parts train.
    """

    name: str
    path: str
    layer: int
    rank: int
    alpha: float
    scale: float
    in_features: int
    out_features: int
    method: Method = "lora"

    @property
    def parameters(self) -> int:
        """Trainable numbers of this layer's adapter."""
        if self.method == "lora_fa":
            return self.rank * self.out_features
        magnitude = self.out_features if self.method == "dora" else 0
        return self.rank * (self.in_features + self.out_features) + magnitude


@dataclass(frozen=True)
class AdapterShape:
    """What a stacked linear layer must know to hold adapters (static, hashable)."""

    rank: int
    origin: bool
    dropout: float = 0.0
    method: Method = "lora"


class Linear(nnx.Module):
    """A stack of linear layers ``y = x W (+ b)``, each optionally with an adapter in delta form.

    Parameters are stacked on a leading axis [L, …]; the forward sees one layer at a time (inside
    the decoder's ``lax.scan``), so the call works on ``kernel`` [D_in, D_out]. ``axes`` are the
    logical axes of these two; those of all other arrays follow from them.

    Source: delta form of this project. The start is subtracted from the *factors* in float32,
    ``s·(x [A − A₀, A₀]) [B; B − B₀]``, before they are cast to the activations' dtype: it is the
    same sum, exactly zero at the start whatever the order of summation, and small updates survive
    bfloat16, where the difference of two rounded products would lose them.

    LoRA-FA (arXiv 2308.03303) freezes A, so the delta is ``s·(x A)(B − B₀)`` at half the rank.
    DoRA (arXiv 2402.09353) multiplies ``W + s·Δ`` by ``m / ‖W + s·Δ‖`` per output, the norm a
    constant for the gradient (its section 4.3, and PEFT); the bias is added afterwards.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        layers: int,
        axes: Ends = (None, None),
        use_bias: bool = False,
        adapter: AdapterShape | None = None,
        dtype: jnp.dtype = jnp.float32,
        quantization: Quantization = "none",
        name: str = "kernel",
    ):
        self.quantization: Quantization = quantization
        kernel, (d_in, d_out) = (
            jax.ShapeDtypeStruct((layers, in_features, out_features), dtype),
            axes,
        )
        stored = quantized_shapes(kernel, quantization, name=name)
        self.kernel = declared(jnp.zeros_like(stored["kernel"]), "layers", d_in, d_out)
        if quantization != "none":
            scale = jnp.zeros_like(stored["kernel_scale"])
            self.kernel_scale = declared(scale, "layers", prefixed("blocks", d_in), d_out)
        # A vector over the model's width is small, and lies whole on every device.
        across, bias = None if d_out == "width" else d_out, jnp.zeros((layers, out_features), dtype)
        self.bias = declared(bias, "layers", across) if use_bias else None
        self.adapter = adapter
        if adapter is not None:
            self._adapt(adapter, kernel, axes)

    def _adapt(self, adapter: AdapterShape, kernel: jax.ShapeDtypeStruct, axes: Ends) -> None:
        """The adapter's arrays; a factor's long axis has a name of its own: it is split further."""
        (layers, in_features, out_features), dtype = kernel.shape, kernel.dtype
        d_in, d_out = (prefixed("adapter", axis) for axis in axes)
        down, up = (layers, in_features, adapter.rank), (layers, adapter.rank, out_features)
        trained, frozen = {"kind": nnx.LoRAParam}, {"kind": Origin}
        moved = frozen if adapter.method == "lora_fa" else trained
        self.lora_a = declared(jnp.zeros(down, jnp.float32), "layers", d_in, None, **moved)
        self.lora_b = declared(jnp.zeros(up, jnp.float32), "layers", None, d_out, **trained)
        self.lora_scale = declared(jnp.zeros((layers,), jnp.float32), "layers", **frozen)
        if adapter.origin and adapter.method != "lora_fa":
            self.origin_a = declared(jnp.zeros(down, dtype), "layers", d_in, None, **frozen)
        if adapter.origin:
            self.origin_b = declared(jnp.zeros(up, dtype), "layers", None, d_out, **frozen)
        if adapter.method == "dora":
            lengths = jnp.zeros((layers, out_features), jnp.float32)
            self.lora_magnitude = declared(lengths, "layers", d_out, **trained)
            self.origin_norm = declared(lengths, "layers", d_out, **frozen)

    def __call__(
        self, x: Float[Array, "... D_in"], dropout_key: PRNGKeyArray | None = None
    ) -> Float[Array, "... D_out"]:
        """Apply the layer; ``dropout_key`` switches LoRA dropout on (training only)."""
        y = self._frozen(x)
        if self.adapter is not None and self.adapter.method == "dora":
            down, up = self._factors()
            y = rescaled(y + low_rank(x, down, up), self._gain(down, up))
        if self.bias is not None:
            y = y + self.bias[...]
        if self.adapter is not None and self.adapter.method != "dora":
            y = y + low_rank(self._dropped(x, dropout_key), *self._factors())
        return y

    def _frozen(self, x: Array) -> Array:
        """``x W``, W dequantised here if need be."""
        if self.quantization == "none":
            return matmul(x, self.kernel[...])
        return quantized_matmul(x, self._codes(), self.quantization)

    def _codes(self) -> dict[str, Array]:
        return {"kernel": self.kernel[...], "kernel_scale": self.kernel_scale[...]}

    def _factors(self) -> tuple[Float[Array, "*E D_in R"], Float[Array, "*E R D_out"]]:
        """Float32 factors of s·Δ, the scale in the first one; of one layer or of several."""
        assert self.adapter is not None
        start_a = self.adapter.origin and self.adapter.method != "lora_fa"
        down, up = delta_factors(
            self.lora_a[...],
            self.lora_b[...],
            self.origin_a[...] if start_a else None,
            self.origin_b[...] if self.adapter.origin else None,
        )
        # Scaled while still float32: a scale such as 1/√2 is not a bfloat16 number.
        return down * self.lora_scale[...][..., None, None], up

    def _dropped(self, x: Array, key: PRNGKeyArray | None) -> Array:
        assert self.adapter is not None
        if key is None or self.adapter.dropout == 0.0:
            return x
        keep = 1.0 - self.adapter.dropout
        kept = jax.random.bernoulli(key, keep, x.shape)
        return jnp.where(kept, x / keep, jnp.zeros((), x.dtype)).astype(x.dtype)

    def _gain(self, down: Array, up: Array) -> Float[Array, "*E D_out"]:
        """DoRA's factor m / ‖W + s·Δ‖ of every output, float32."""
        kernel = self.kernel[...]
        if self.quantization != "none":
            kernel = dequantize_kernel(self._codes(), self.quantization, jnp.float32)
        norm = column_norms(kernel, self.origin_norm[...], down, up)
        gain = magnitude_gain(self.lora_magnitude[...], norm)
        # A layer of the stack that is not adapted has the scale 0 and stays as it is.
        return jnp.where(self.lora_scale[...][..., None] == 0.0, 1.0, gain)


def column_norms(
    kernel: Float[Array, "*L D F"],
    squares: Float[Array, "*L F"],
    down: Float[Array, "*L D R"],
    up: Float[Array, "*L R F"],
) -> Float[Array, "*L F"]:
    """Length of every column of ``W + down up``, float32, a constant for the gradient.

    ``‖W_j‖² + 2 (downᵀ W)_j · up_j + up_jᵀ (downᵀ down) up_j``: nothing of the size of W is formed,
    and where the product of the factors is exactly zero the norm is exactly that of W.

    Args:
        kernel: W in its dtype; the factor it meets is rounded to it, as in the forward.
        squares: ``‖W_j‖²`` of every column, float32.
        down: float32, the first factor of ``s·Δ``, scale included.
        up: float32, the second one.
    """
    down, up = jax.lax.stop_gradient(down), jax.lax.stop_gradient(up)
    across, highest = jnp.swapaxes(down, -1, -2), jax.lax.Precision.HIGHEST
    cross = jnp.matmul(
        across.astype(kernel.dtype),
        kernel,
        precision=highest if kernel.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    gram = jnp.matmul(across, down, precision=highest)
    inner = 2.0 * cross + jnp.matmul(gram, up, precision=highest)
    total = squares + jnp.sum(inner * up, axis=-2)
    # A column that the delta cancels may come out below zero by rounding.
    return jnp.sqrt(jnp.maximum(total, jnp.finfo(jnp.float32).eps * squares))


def magnitude_gain(
    magnitude: Float[Array, "*L F"], norm: Float[Array, "*L F"]
) -> Float[Array, "*L F"]:
    """``magnitude / norm``, exactly 1 where they are equal, and 1 where the norm is 0.

    Example:
        >>> import jax.numpy as jnp
        >>> magnitude_gain(jnp.array([3.0, 0.1, 0.0]), jnp.array([2.0, 0.1, 0.0])).tolist()
        [1.5, 1.0, 1.0]
    """
    # Not the quotient itself: division is approximate on some devices, a difference of 0 is not.
    nothing = norm == 0.0
    return 1.0 + jnp.where(nothing, 0.0, (magnitude - norm) / jnp.where(nothing, 1.0, norm))


def delta_factors(
    lora_a: Float[Array, "*L D R"],
    lora_b: Float[Array, "*L R F"],
    origin_a: Float[Array, "*L D R"] | None,
    origin_b: Float[Array, "*L R F"] | None,
) -> tuple[Array, Array]:
    """The two factors whose product is ``A B − A₀ B₀`` (or ``A B`` without an origin), float32.

    Returns:
        ``[A − A₀, A₀]`` [*L, D, 2R] and ``[B; B − B₀]`` [*L, 2R, F]; with ``origin_b`` alone, A is
        its own start and ``A`` [*L, D, R], ``B − B₀`` [*L, R, F] are the whole of it.

    Example:
        >>> import jax.numpy as jnp
        >>> a, b = jnp.ones((3, 1)), jnp.full((1, 2), 2.0)
        >>> down, up = delta_factors(a, b, a, b)
        >>> float(jnp.abs(down @ up).max())  # measured from itself: exactly nothing
        0.0
    """
    if origin_b is None:
        return lora_a, lora_b
    moved = lora_b - origin_b.astype(jnp.float32)
    if origin_a is None:
        return lora_a, moved
    origin_a = origin_a.astype(jnp.float32)
    down = jnp.concatenate([lora_a - origin_a, origin_a], axis=-1)
    return down, jnp.concatenate([lora_b, moved], axis=-2)


@dataclass(frozen=True)
class LinearShape:
    """A stack of linear layers as the planner sees it: our path, and each one's checkpoint name."""

    path: str
    names: tuple[str, ...]
    in_features: int
    out_features: int


def plan_adapters(
    linears: Sequence[LinearShape],
    *,
    rank: int,
    alpha: float,
    target_modules: Sequence[str] | str,
    exclude_modules: Sequence[str] | str = (),
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False,
    method: Method = "lora",
) -> tuple[AdaptedModule, ...]:
    """Which layers of a model get an adapter, with the rank and scale of each.

    ``target_modules`` and ``exclude_modules`` mean what they mean in PEFT: a list of name
    suffixes, one regular expression for the whole name, or ``all-linear``. Patterns are PEFT's
    too: a key matches a whole name or its dotted end.

    Raises:
        InputError: a target or pattern that matches no layer; a rank larger than a layer.
    """
    modules = []
    used = {key: False for key in (*(rank_pattern or {}), *(alpha_pattern or {}))}
    names = [name for shape in linears for name in shape.names]
    _check_targets(names, target_modules)
    _check_expressions("exclude_modules", [exclude_modules])
    _check_expressions("rank_pattern/alpha_pattern", list(used))
    for shape in linears:
        for i, name in enumerate(shape.names):
            if not _matches(name, target_modules) or _matches(name, exclude_modules):
                continue
            r = int(_pattern_value(name, rank_pattern or {}, rank, used))
            a = float(_pattern_value(name, alpha_pattern or {}, alpha, used))
            _check_rank(name, r, shape)
            scale = a / math.sqrt(r) if use_rslora else a / r
            modules.append(
                AdaptedModule(
                    name, shape.path, i, r, a, scale, shape.in_features, shape.out_features, method
                )
            )
    if not modules:
        raise InputError(
            "adapter.exclude_modules: expected to leave some target layer, but it excludes all of "
            f"adapter.target_modules={target_modules!r}. Exclude fewer layers."
        )
    for key, seen in used.items():
        if not seen:
            raise InputError(
                f"adapter.rank_pattern/alpha_pattern: {key!r} matches no adapted layer. "
                f"Use the end of a layer's name, such as {modules[0].name!r}, or remove it."
            )
    return tuple(modules)


def _matches(name: str, targets: Sequence[str] | str) -> bool:
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith("." + target) for target in targets)


def _check_targets(names: Sequence[str], targets: Sequence[str] | str) -> None:
    """Every target must match something: a silent miss would train less than was asked for."""
    try:
        missed = [
            target
            for target in ([targets] if isinstance(targets, str) else targets)
            if not any(_matches(name, targets if isinstance(targets, str) else [target])
                       for name in names)
        ]  # fmt: skip
    except re.error as error:
        raise InputError(
            f"adapter.target_modules: expected a regular expression, got {targets!r} ({error}). "
            "Correct it, or give a list of layer names."
        ) from error
    kinds = sorted({name.rsplit(".", 1)[-1] for name in names})
    if not isinstance(targets, str) and not targets:
        raise InputError(
            f"adapter.target_modules: expected at least one layer, got an empty list. "
            f"This model has {', '.join(kinds)}."
        )
    if missed:
        near = difflib.get_close_matches(missed[0], kinds, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise InputError(
            f"adapter.target_modules: {missed[0]!r} matches no linear layer of this model."
            f"{hint} It has {', '.join(kinds)} (embeddings and lm_head stay frozen)."
        )


def _check_expressions(key: str, expressions: Sequence[Sequence[str] | str]) -> None:
    for expression in expressions:
        try:
            re.compile(expression if isinstance(expression, str) else "")
        except re.error as error:
            raise InputError(
                f"adapter.{key}: expected a regular expression, got {expression!r} ({error}). "
                "Correct it."
            ) from error


def _pattern_value(
    name: str, patterns: Mapping[str, float], default: float, used: dict[str, bool]
) -> float:
    matching = [key for key in patterns if re.match(rf"(.*\.)?({key})$", name)]
    used.update(dict.fromkeys(matching, True))
    return patterns[matching[0]] if matching else default


def _check_rank(name: str, rank: int, shape: LinearShape) -> None:
    if rank < 1:
        raise InputError(f"adapter.rank: expected at least 1 for {name}, got {rank}. Raise it.")
    largest = min(shape.in_features, shape.out_features)
    if rank > largest:
        raise InputError(
            f"adapter.rank: expected at most {largest} for {name} "
            f"({shape.in_features} x {shape.out_features}), got {rank}. Lower the rank, or set it "
            "for this layer in adapter.rank_pattern."
        )


def adapter_shapes(
    modules: Sequence[AdaptedModule], *, origin: bool, dropout: float = 0.0
) -> dict[str, AdapterShape]:
    """For each stacked layer that is adapted, the largest rank in the stack, and the method.

    Raises:
        InputError: dropout with DoRA, whose norm is that of the whole weight.
    """
    if dropout > 0.0 and any(module.method == "dora" for module in modules):
        raise InputError(
            f"adapter.dropout: expected 0 with the method dora, got {dropout}. Set it to 0, or "
            "choose another method."
        )
    ranks: dict[str, int] = {}
    for module in modules:
        ranks[module.path] = max(ranks.get(module.path, 0), module.rank)
    methods: dict[str, Method] = {module.path: module.method for module in modules}
    return {
        path: AdapterShape(rank, origin, dropout, methods[path]) for path, rank in ranks.items()
    }


def trainable_parameters(modules: Sequence[AdaptedModule]) -> int:
    """Number of trainable parameters, from shapes alone (padding not counted)."""
    return sum(module.parameters for module in modules)
