"""Frozen kernels in 8 and 4 bits: the codes, what they stand for, and the product with them."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy.stats import norm

from balora_jax.errors import InputError
from balora_jax.models.quantized import (
    _level_by_selects,
    _level_by_table,
    bytes_of,
    dequantize_kernel,
    quantize_kernel,
    quantized_matmul,
    quantized_shapes,
)
from tests import compiler

qwix = pytest.importorskip("qwix")

KINDS = ("int8", "nf4")
LAYERS, ROWS, COLUMNS = 3, 256, 48


def weights():
    """Heavy-tailed weights with an outlier per layer, one column of zeros, one tiny column."""
    rng = np.random.default_rng(0)
    values = rng.standard_t(4, size=(LAYERS, ROWS, COLUMNS)).astype(np.float32) * 0.03
    values[:, 5, 7] = 1.5
    values[:, :, 3] = 0.0
    values[:, :, 4] *= 1e-6
    return values


@pytest.fixture(scope="module")
def kernel():
    return weights()


def nf4_levels():
    """The 16 levels from the paper's definition: quantiles of a normal distribution."""
    offset = 1 - (1 / 32 + 1 / 30) / 2
    positive = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([positive, [0.0], negative]))
    return levels / levels.max()


@pytest.mark.parametrize("level", [_level_by_table, _level_by_selects])
def test_levels_by_either_way(level):
    """The selects run on a TPU only."""
    got = jax.jit(level)(jnp.arange(16).reshape(2, 8))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(got).ravel(), nf4_levels(), atol=2e-7)
    np.testing.assert_array_equal(
        np.asarray(_level_by_table(jnp.arange(16))), np.asarray(_level_by_selects(jnp.arange(16)))
    )


def int8_by_hand(kernel):
    """Codes and scales in float64: the largest weight of a column is 127."""
    kernel = kernel.astype(np.float64)
    scale = np.abs(kernel).max(1, keepdims=True) / 127
    scale[scale == 0] = 1
    return np.rint(kernel / scale), scale


def nf4_by_hand(kernel, block):
    """Nearest levels' numbers [L, D, F] and scales [L, D / block, F] in float64."""
    layers, rows, columns = kernel.shape
    blocks = kernel.astype(np.float64).reshape(layers, rows // block, block, columns)
    scale = np.abs(blocks).max(2, keepdims=True)
    scale[scale == 0] = 1
    distance = np.abs((blocks / scale)[..., None] - nf4_levels())
    return distance.argmin(-1).reshape(kernel.shape), scale[:, :, 0]


def unpacked(packed, block):
    """Codes by row, from bytes, as the module's docstring has the layout."""
    packed = np.asarray(packed)
    codes = np.zeros((packed.shape[0], 2 * packed.shape[1], packed.shape[2]), int)
    for row in range(codes.shape[1]):
        inside = row % block
        byte = packed[:, row // block * (block // 2) + inside % (block // 2)]
        codes[:, row] = byte // 16 if inside >= block // 2 else byte % 16
    return codes


def test_int8_codes_are_the_nearest_of_127_steps(kernel):
    values = quantize_kernel(jnp.asarray(kernel), "int8")
    codes, scale = int8_by_hand(kernel)
    assert values["kernel"].dtype == jnp.int8
    assert values["kernel_scale"].dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(values["kernel"], int), codes)
    nonzero = np.abs(kernel).max(1) > 0
    np.testing.assert_allclose(
        np.asarray(values["kernel_scale"])[:, 0][nonzero], scale[:, 0][nonzero], rtol=1e-6
    )
    assert np.asarray(values["kernel"], int).max() == 127
    assert np.asarray(values["kernel"], int).min() >= -127


def test_nf4_codes_are_the_nearest_levels(kernel):
    block = 64
    values = quantize_kernel(jnp.asarray(kernel), "nf4")
    codes, scale = nf4_by_hand(kernel, block)
    assert values["kernel"].dtype == jnp.uint8
    assert values["kernel_scale"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(unpacked(values["kernel"], block), codes)
    stored = np.asarray(values["kernel_scale"], np.float64)
    np.testing.assert_allclose(stored, scale, rtol=2**-8)
    # What they stand for: level times the scale as stored.
    by_hand = nf4_levels()[codes] * np.repeat(stored, block, axis=1)
    whole = dequantize_kernel(values, "nf4", jnp.float32)
    np.testing.assert_allclose(np.asarray(whole), by_hand, rtol=1e-6, atol=1e-7)


def test_int8_is_never_off_by_more_than_half_a_step(kernel):
    values = quantize_kernel(jnp.asarray(kernel), "int8")
    error = np.abs(np.asarray(dequantize_kernel(values, "int8", jnp.float32)) - kernel)
    assert (error <= np.abs(kernel).max(1, keepdims=True) / 127 * 0.50001).all()
    assert error.max() > 0


def test_nf4_is_never_off_by_more_than_half_the_widest_gap(kernel):
    values = quantize_kernel(jnp.asarray(kernel), "nf4")
    error = np.abs(np.asarray(dequantize_kernel(values, "nf4", jnp.float32)) - kernel)
    largest = np.repeat(np.abs(kernel).reshape(LAYERS, -1, 64, COLUMNS).max(2), 64, axis=1)
    # Half of the gap −1 … −0.696, and what rounding of the scale to bfloat16 adds.
    assert (error <= largest * (0.304 / 2 + 2**-8)).all()
    normal = np.random.default_rng(1).normal(size=(1, 512, 64)).astype(np.float32)
    restored = dequantize_kernel(quantize_kernel(jnp.asarray(normal), "nf4"), "nf4", jnp.float32)
    relative = np.linalg.norm(np.asarray(restored) - normal) / np.linalg.norm(normal)
    assert 0.08 < relative < 0.10


@pytest.mark.parametrize("kind", KINDS)
def test_what_codes_stand_for_is_what_qwix_means(kernel, kind):
    """Its own tiled quantisation and dequantisation of the whole stack, with the same scales."""
    values = quantize_kernel(jnp.asarray(kernel), kind)
    if kind == "int8":
        codes, tiles = values["kernel"], {}
        qtype, method = jnp.int8, f"absmax,{127.5 / 127}"
    else:
        codes = jnp.asarray(unpacked(values["kernel"], 64), jnp.uint4)
        qtype, tiles, method = "nf4", {1: 64}, "absmax"
    theirs = qwix.quantize(
        jnp.asarray(kernel),
        qtype,
        channelwise_axes=(0, 2),
        tiled_axes=tiles,
        calibration_method=method,
        scale_dtype=values["kernel_scale"].dtype,
    )
    np.testing.assert_array_equal(np.asarray(codes, int), np.asarray(theirs.qvalue, int))
    np.testing.assert_allclose(
        np.asarray(values["kernel_scale"], np.float32), np.asarray(theirs.scale, np.float32), 1e-6
    )
    meant = qwix.dequantize(
        qwix.QArray(codes, values["kernel_scale"].astype(jnp.float32), qtype=qtype)
    )
    ours = dequantize_kernel(values, kind, jnp.float32)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(meant))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_stack_and_its_layers_agree_whichever_way_they_are_made(kernel, kind, dtype):
    stack = jnp.asarray(kernel, dtype)
    whole = quantize_kernel(stack, kind)
    for i in range(LAYERS):
        one = quantize_kernel(stack[i : i + 1], kind)
        for name, array in one.items():
            np.testing.assert_array_equal(np.asarray(array[0]), np.asarray(whole[name][i]))
        np.testing.assert_array_equal(
            np.asarray(dequantize_kernel(jax.tree.map(lambda a, i=i: a[i], whole), kind, dtype)),
            np.asarray(dequantize_kernel(whole, kind, dtype)[i]),
        )
    assert dequantize_kernel(whole, kind, dtype).dtype == dtype
    # bfloat16 weights are scaled in float32: the codes are those of the same numbers in float32.
    wide = quantize_kernel(stack.astype(jnp.float32), kind)
    np.testing.assert_array_equal(np.asarray(whole["kernel"]), np.asarray(wide["kernel"]))


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_known_before_any_array(kernel, kind):
    values = quantize_kernel(jnp.asarray(kernel), kind)
    shapes = quantized_shapes(jax.ShapeDtypeStruct(kernel.shape, jnp.float32), kind)
    assert {k: (v.shape, v.dtype) for k, v in values.items()} == {
        k: (v.shape, v.dtype) for k, v in shapes.items()
    }
    assert bytes_of(shapes) == sum(np.asarray(array).nbytes for array in values.values())


def test_bytes_of_the_kernels_of_llama_2_7b():
    """By hand: 32 layers of four 4096 x 4096 and three 4096 x 11008 kernels."""
    square = jax.ShapeDtypeStruct((32, 4096, 4096), jnp.bfloat16)
    up = jax.ShapeDtypeStruct((32, 4096, 11008), jnp.bfloat16)
    down = jax.ShapeDtypeStruct((32, 11008, 4096), jnp.bfloat16)
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    columns = 32 * (4 * 4096 + 2 * 11008 + 4096)

    def total(kind):
        return sum(bytes_of(quantized_shapes(s, kind)) for s in [*[square] * 4, up, up, down])

    assert total("none") == 2 * weights
    assert total("int8") == weights + 4 * columns
    assert total("nf4") == weights // 2 + weights // 64 * 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_product_and_gradient_are_those_of_the_kernel_it_stands_for(kernel, kind, dtype):
    values = quantize_kernel(jnp.asarray(kernel[:1]), kind)
    layer = jax.tree.map(lambda a: a[0], values)
    weights = np.asarray(dequantize_kernel(layer, kind, dtype), np.float64)
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(2, 5, ROWS)), dtype)
    dy = jnp.asarray(rng.normal(size=(2, 5, COLUMNS)), dtype)
    y, pullback = jax.vjp(jax.jit(lambda x: quantized_matmul(x, layer, kind)), x)
    (dx,) = pullback(dy)
    assert y.dtype == dx.dtype == dtype
    atol = 1e-5 if dtype == jnp.float32 else 0.03
    np.testing.assert_allclose(
        np.asarray(y, np.float64), np.asarray(x, np.float64) @ weights, atol=atol
    )
    np.testing.assert_allclose(
        np.asarray(dx, np.float64), np.asarray(dy, np.float64) @ weights.T, atol=atol
    )


def scanned_loss(kind, remat):
    def loss(x, values):
        def body(x, layer):
            return jnp.tanh(quantized_matmul(x, layer, kind)), None

        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        body = jax.checkpoint(body, policy=policy, prevent_cse=False) if remat else body
        return jax.lax.scan(body, x, values)[0].sum()

    return loss


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("remat", [False, True])
def test_gradient_through_a_scan_over_layers(kind, remat):
    rng = np.random.default_rng(3)
    stack = rng.normal(size=(4, 128, 128)).astype(np.float32) / 12
    x = rng.normal(size=(3, 128))
    values = quantize_kernel(jnp.asarray(stack), kind)
    kernels = np.asarray(dequantize_kernel(values, kind, jnp.float32), np.float64)
    states = [x]
    for weights in kernels:
        states.append(np.tanh(states[-1] @ weights))
    gradient = np.ones_like(states[-1])
    for weights, state in zip(kernels[::-1], states[:0:-1], strict=True):
        gradient = (gradient * (1 - state**2)) @ weights.T
    value, got = jax.jit(jax.value_and_grad(scanned_loss(kind, remat)))(
        jnp.asarray(x, jnp.float32), values
    )
    np.testing.assert_allclose(float(value), states[-1].sum(), rtol=1e-4)
    np.testing.assert_allclose(np.asarray(got), gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("remat", [False, True])
def test_backward_never_holds_the_stack_in_floating_point(kind, remat):
    layers, width = 16, 256
    shapes = quantized_shapes(jax.ShapeDtypeStruct((layers, width, width), jnp.float32), kind)
    x = jax.ShapeDtypeStruct((2, width), jnp.float32)
    compiled = jax.jit(jax.grad(scanned_loss(kind, remat))).lower(x, shapes).compile()
    one_layer = width * width * 4
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4 * one_layer < layers * one_layer


def test_codes_get_no_gradient(kernel):
    values = quantize_kernel(jnp.asarray(kernel[:1]), "nf4")
    layer = jax.tree.map(lambda a: a[0], values)
    x = jnp.ones((2, ROWS))

    def loss(scale):
        return jnp.sum(quantized_matmul(x, {**layer, "kernel_scale": scale}, "nf4"))

    assert not np.asarray(jax.grad(loss)(layer["kernel_scale"]), np.float32).any()


def test_a_width_that_blocks_do_not_divide_is_refused():
    message = (
        r"^model\.quantization: expected every layer's input width to be a multiple of 64 .*"
        r"got 172 for layers\.mlp\.down_proj\.kernel\. Use int8 or none\.$"
    )
    name = "layers.mlp.down_proj.kernel"
    with pytest.raises(InputError, match=message):
        quantize_kernel(jnp.zeros((2, 172, 64)), "nf4", name=name)
    with pytest.raises(InputError, match=message):
        quantized_shapes(jax.ShapeDtypeStruct((2, 172, 64), jnp.float32), "nf4", name=name)
    assert quantize_kernel(jnp.ones((2, 171, 3)), "int8")["kernel"].shape == (2, 171, 3)


def test_without_qwix_the_error_says_what_to_install(monkeypatch, kernel):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(InputError) as caught:
        quantize_kernel(jnp.asarray(kernel), "int8")
    assert str(caught.value) == (
        "model.quantization: expected the package qwix, which is not installed. "
        "Install balora_jax[quant]."
    )


def test_codes_lie_over_a_mesh_and_are_made_there():
    """Four virtual devices, which only a fresh process can have; see :func:`on_a_mesh`."""
    environment = {**os.environ, **compiler.on_cpu(4)}
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-m", "tests.models.test_quantized"],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == [*KINDS]


def on_a_mesh(kernel, kind):
    """Codes made and read where the parts of the kernel lie: no part travels."""
    mesh = jax.make_mesh(
        (2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4]
    )
    layout = NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
    whole = quantize_kernel(jnp.asarray(kernel), kind)
    made = jax.jit(lambda k: quantize_kernel(k, kind)).lower(jax.device_put(kernel, layout))
    assert "all-gather" not in str(made.compile().as_text())
    there = quantize_kernel(jax.device_put(kernel, layout), kind)
    for name, array in whole.items():
        np.testing.assert_array_equal(np.asarray(there[name]), np.asarray(array))
    scale = NamedSharding(mesh, PartitionSpec(None, "fsdp" if kind == "nf4" else None, "tensor"))
    placed = {
        "kernel": jax.device_put(whole["kernel"], layout),
        "kernel_scale": jax.device_put(whole["kernel_scale"], scale),
    }
    restored = jax.jit(lambda v: dequantize_kernel(v, kind, jnp.float32), out_shardings=layout)
    lowered = str(restored.lower(placed).compile().as_text())
    assert "all-gather" not in lowered
    assert "all-to-all" not in lowered
    assert "collective-permute" not in lowered
    np.testing.assert_array_equal(
        np.asarray(restored(placed)), np.asarray(dequantize_kernel(whole, kind, jnp.float32))
    )


if __name__ == "__main__":
    for kind in KINDS:
        on_a_mesh(weights(), kind)
        print(kind)
