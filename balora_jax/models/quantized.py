"""Frozen kernels in 8 or 4 bits, and the product that a layer computes with them.

A stack of kernels [L, D_in, D_out] becomes two arrays under two names:

======  =======================================  ================================================
kind    ``kernel``                               ``kernel_scale``
======  =======================================  ================================================
int8    int8 [L, D_in, D_out]                    float32 [L, 1, D_out]: one per output channel
nf4     uint8 [L, D_in / 2, D_out], two codes    bfloat16 [L, D_in / block, D_out]: one per block
        each                                     of rows and output channel
======  =======================================  ================================================

Only codes and scales are kept: :func:`quantized_matmul` dequantises one layer's kernel, in the
forward and again in the backward. The codes come from the package ``qwix``; dequantising, and so
training with arrays that exist already, does not need it.

Layout of the 4-bit codes. A byte holds rows ``i`` (low bits) and ``i + block / 2`` (high bits) of
one block, so unpacking joins two halves and never interleaves rows. ``jnp.uint4`` was tried:
on a CPU its buffers do take half a byte, but ``nbytes`` says one, and jax 0.10.2 refuses such an
array as the argument of an ahead-of-time compiled function ("input layouts that disagree").
For [4096, 4096] times 1024 rows of bfloat16 the compiler for TPU v5e estimates 0.71 million cycles
and no temporary memory; pairing neighbouring rows instead 1.50 million, a look-up in the table of
levels instead of selects 1.28 million, each with 64 MiB temporary; the bfloat16 product alone 0.28.

Sharding. D_out of both arrays is D_out of the kernel. D_in of ``kernel`` is D_in of the kernel,
and for nf4 a part must hold whole blocks: the parts of the mesh must divide ``D_in / block``
(``kernel_scale``'s own axis), not only ``D_in``. The D_in axis of an int8 scale has length one and
lies whole on every device; that of an nf4 scale may do so where the mesh does not divide it.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from balora_jax.array_types import Array, Float
from balora_jax.errors import InputError
from balora_jax.parallel.token_split import as_rows, as_tokens

Quantization = Literal["none", "int8", "nf4"]
Kind = Literal["int8", "nf4"]

CODES, SCALE = "kernel", "kernel_scale"
NF4_BLOCK = 64

# Means of 16 equally likely parts of a normal distribution, scaled to [-1, 1], with an exact zero.
# Source: QLoRA (arXiv 2305.14314), appendix E.
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def quantize_kernel(
    kernel: Float[Array, "L D F"],
    kind: Kind,
    *,
    name: str = CODES,
    groups: int = 1,
) -> dict[str, Array]:
    """Codes and scales of a stack of kernels, computed in float32 one layer after another.

    Layers are independent, so a large stack may be quantised one slice [1, D, F] at a time.

    Args:
        kernel: frozen weights, any floating dtype, wherever they lie.
        kind: ``int8`` or ``nf4``.
        name: the kernel's dotted path, for the error message.
        groups: of equally many layers one after another, each on devices of its own: one layer of
            every group at a time.

    Returns:
        ``kernel`` and ``kernel_scale`` as the table of this module has them.

    Raises:
        InputError: D is no multiple of the block, or ``qwix`` is not installed.

    Source: absmax quantisation. int8: ``round(w / s)``, ``s = absmax / 127`` (``qwix`` by itself
    takes 127.5, which clips the largest weight and leaves the overflow to the device). nf4: the
    level nearest to ``w / absmax``, QLoRA (arXiv 2305.14314), without its second quantisation of
    the scales; they are rounded to bfloat16 after the codes are chosen.
    """
    check_rows(kernel.shape[-2], kind, name)
    _qwix()
    return _quantize_stack(kernel, kind, groups)


@functools.partial(jax.jit, static_argnames=("kind", "groups"))
def _quantize_stack(kernel: Array, kind: Kind, groups: int) -> dict[str, Array]:
    def quantize(layers: Array) -> dict[str, Array]:
        return jax.lax.map(lambda layer: _quantize_layer(layer, kind), layers)

    if groups == 1:
        return quantize(kernel)
    found = jax.vmap(quantize)(kernel.reshape(groups, -1, *kernel.shape[1:]))
    return jax.tree.map(lambda value: value.reshape(-1, *value.shape[2:]), found)


def _quantize_layer(kernel: Float[Array, "D F"], kind: Kind) -> dict[str, Array]:
    rows, columns = kernel.shape
    block = rows if kind == "int8" else NF4_BLOCK
    qtype, method = (jnp.int8, f"absmax,{127.5 / 127}") if kind == "int8" else ("nf4", "absmax")
    quantize = functools.partial(_qwix().quantize, qtype=qtype, calibration_method=method)
    # One vector at a time, mapped: qwix flattens its argument to look levels up, and flattening
    # the kernel itself would gather a sharded one on every device.
    blocks = kernel.astype(jnp.float32).reshape(rows // block, block, columns)
    quantized = jax.vmap(jax.vmap(quantize, in_axes=1, out_axes=1))(blocks)
    codes, scale = quantized.qvalue, quantized.scale.reshape(rows // block, columns)
    if kind == "int8":
        return {CODES: codes.reshape(rows, columns), SCALE: scale}
    low, high = jnp.split(codes.astype(jnp.uint8), 2, axis=1)
    packed = (low | (high << 4)).reshape(rows // 2, columns)
    return {CODES: packed, SCALE: scale.astype(jnp.bfloat16)}


def dequantize_kernel(
    values: Mapping[str, Array], kind: Kind, dtype: jnp.dtype | type
) -> Float[Array, "*L D F"]:
    """The kernel that codes and scales stand for, of one layer [D, F] or of a stack [L, D, F].

    Multiplied in float32 and rounded once, to ``dtype``.

    Args:
        values: ``kernel`` and ``kernel_scale``.
        kind: what they were made with.
        dtype: of the result.

    Example:
        >>> import jax.numpy as jnp
        >>> codes = jnp.array([[127, 0], [-64, 127]], jnp.int8)
        >>> scale = jnp.array([[0.5, 2.0]])
        >>> dequantize_kernel({"kernel": codes, "kernel_scale": scale}, "int8", jnp.float32)
        Array([[ 63.5,   0. ],
               [-32. , 254. ]], dtype=float32)
    """
    codes, scale = values[CODES], values[SCALE].astype(jnp.float32)
    if kind == "int8":
        return (codes.astype(jnp.float32) * scale).astype(dtype)
    *layers, packed_rows, columns = codes.shape
    blocks = scale.shape[-2]
    packed = codes.reshape(*layers, blocks, packed_rows // blocks, columns).astype(jnp.int32)
    levels = _level(jnp.concatenate([packed & 15, packed >> 4], axis=-2))
    kernel = levels * scale[..., :, None, :]
    return kernel.reshape(*layers, 2 * packed_rows, columns).astype(dtype)


def _level(codes: Array) -> Array:
    """The NF4 level of each code, the same number on every device.

    A TPU is slow at looking up a table. On a CPU the compiler moves the selects' constants out of
    the scan over layers, each broadcast to the size of a kernel, so there it is the table.
    """
    return jax.lax.platform_dependent(codes, tpu=_level_by_selects, default=_level_by_table)


def _level_by_table(codes: Array) -> Array:
    levels = jnp.asarray(NF4_LEVELS, jnp.float32)
    return levels.at[codes].get(mode="promise_in_bounds")


def _level_by_selects(codes: Array) -> Array:
    """Halve the candidates bit by bit."""
    levels: list = [jnp.float32(level) for level in NF4_LEVELS]
    for bit in range(4):
        is_set = ((codes >> bit) & 1) == 1
        levels = [
            jnp.where(is_set, odd, even)
            for even, odd in zip(levels[::2], levels[1::2], strict=True)
        ]
    return levels[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def quantized_matmul(
    x: Float[Array, "... D"], values: Mapping[str, Array], kind: Kind
) -> Float[Array, "... F"]:
    """``x @ W`` in the dtype of ``x``, W dequantised here; float32 is computed as float32.

    Differentiable once in reverse, by ``x`` alone: the gradient of ``values`` is zero. What is
    kept for the backward are the codes; left to autodiff, a scan over layers would keep every
    layer's kernel in floating point.

    Args:
        x: activations.
        values: ``kernel`` and ``kernel_scale`` of one layer.
        kind: what they were made with.
    """
    y = _product(as_rows(x), dequantize_kernel(values, kind, x.dtype), 0)
    return as_tokens(y, x.shape[:-1])


def _matmul_forward(x: Array, values: Mapping[str, Array], kind: Kind):
    return quantized_matmul(x, values, kind), values


def _matmul_backward(kind: Kind, values: Mapping[str, Array], dy: Array):
    dx = _product(as_rows(dy), dequantize_kernel(values, kind, dy.dtype), 1)
    return as_tokens(dx, dy.shape[:-1]), None


quantized_matmul.defvjp(_matmul_forward, _matmul_backward)


def _product(rows: Array, kernel: Array, kernel_axis: int) -> Array:
    """Rows times a kernel, or its transpose when its axis 1 is summed over."""
    return jax.lax.dot_general(
        rows,
        kernel,
        (((rows.ndim - 1,), (kernel_axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None,
        preferred_element_type=rows.dtype,
    )


def quantized_shapes(
    kernel: jax.ShapeDtypeStruct, kind: Quantization, *, name: str = CODES
) -> dict[str, jax.ShapeDtypeStruct]:
    """What a kernel [L, D, F] is stored as, from shapes alone; ``none`` leaves it as it is.

    Raises:
        InputError: D is no multiple of the block.

    Example:
        >>> kernel = jax.ShapeDtypeStruct((32, 4096, 11008), jnp.bfloat16)
        >>> {k: (v.shape, str(v.dtype)) for k, v in quantized_shapes(kernel, "nf4").items()}
        {'kernel': ((32, 2048, 11008), 'uint8'), 'kernel_scale': ((32, 64, 11008), 'bfloat16')}
    """
    if kind == "none":
        return {CODES: kernel}
    layers, rows, columns = kernel.shape
    check_rows(rows, kind, name)
    if kind == "int8":
        codes = jax.ShapeDtypeStruct(kernel.shape, jnp.int8)
        return {CODES: codes, SCALE: jax.ShapeDtypeStruct((layers, 1, columns), jnp.float32)}
    codes = jax.ShapeDtypeStruct((layers, rows // 2, columns), jnp.uint8)
    scale = jax.ShapeDtypeStruct((layers, rows // NF4_BLOCK, columns), jnp.bfloat16)
    return {CODES: codes, SCALE: scale}


def bytes_of(arrays: Mapping[str, jax.ShapeDtypeStruct | Array]) -> int:
    """Bytes of arrays or their shapes, all devices together.

    Example:
        >>> kernel = jax.ShapeDtypeStruct((2, 128, 10), jnp.bfloat16)
        >>> [bytes_of(quantized_shapes(kernel, kind)) for kind in ("none", "int8", "nf4")]
        [5120, 2640, 1360]
    """
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in arrays.values())


class DequantizedKernels(Mapping[str, Array]):
    """Frozen arrays by path in which a quantised kernel is found in floating point.

    Each look-up dequantises the stack anew, so that one at a time is in memory.
    """

    def __init__(self, frozen: Mapping[str, Array], kind: Kind, dtype: str):
        self._frozen: Mapping[str, Array] = frozen
        self._kind: Kind = kind
        self._dtype = jnp.dtype(dtype)

    def __getitem__(self, path: str) -> Array:
        scale = self._frozen.get(f"{path}_scale")
        if scale is None:
            return self._frozen[path]
        values = {CODES: self._frozen[path], SCALE: scale}
        return dequantize_kernel(values, self._kind, self._dtype)

    def __iter__(self) -> Iterator[str]:
        return (path for path in self._frozen if not path.endswith(f".{SCALE}"))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def check_rows(rows: int, kind: Quantization, name: str) -> None:
    """Raises InputError unless a kernel of ``rows`` input features divides into blocks."""
    if kind == "nf4" and rows % NF4_BLOCK:
        raise InputError(
            "model.quantization: expected every layer's input width to be a multiple of "
            f"{NF4_BLOCK} (the rows that share a scale of nf4), got {rows} for {name}. "
            "Use int8 or none."
        )


def _qwix() -> Any:
    """The package ``qwix``, imported when it is first needed."""
    try:
        import qwix
    except ImportError as error:
        raise InputError(
            "model.quantization: expected the package qwix, which is not installed. "
            "Install balora_jax[quant]."
        ) from error
    return qwix


def floating_kernels(
    frozen: Mapping[str, Array], quantization: Quantization, dtype: str
) -> Mapping[str, Array]:
    """The frozen weights in floating point, dequantised one stack at a time when looked up."""
    if quantization == "none":
        return frozen
    return DequantizedKernels(frozen, quantization, dtype)
