"""Experts in 8 and 4 bits: the products of the dequantised kernels, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balora_jax.models.experts import Groups, quantized_grouped_matmul
from balora_jax.models.families.base import read_config
from balora_jax.models.quantized import quantize_kernel
from balora_jax.models.structure import structure
from tests.models import tiny
from tests.models.tiny_families import mixtral, qwen3_moe

pytest.importorskip("qwix")
# Levels of NF4 by QLoRA's appendix E.
LEVELS = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
])  # fmt: skip
E, D, F = 3, 128, 10
SIZES = np.array([4, 0, 5])


def rounded(kernels, kind):
    """Each kernel as its codes say, in NumPy."""
    if kind == "int8":
        scale = np.abs(kernels).max(axis=-2, keepdims=True) / 127
        return np.round(kernels / scale) * scale
    blocks = kernels.reshape(E, D // 64, 64, F)
    size = np.abs(blocks).max(axis=2, keepdims=True)
    nearest = np.abs(blocks[..., None] / size[..., None] - LEVELS).argmin(axis=-1)
    held = np.asarray(jnp.asarray(size, jnp.bfloat16), np.float64)
    return (LEVELS[nearest] * held).reshape(kernels.shape)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_products_and_their_gradient_are_those_of_the_rounded_kernels(kind):
    rng = np.random.default_rng(0)
    kernels = rng.standard_normal((E, D, F)).astype(np.float32)
    x, weight = rng.standard_normal((9, D)), rng.standard_normal((9, F))
    values = quantize_kernel(jnp.asarray(kernels), kind)
    want = rounded(kernels.astype(np.float64), kind)[np.repeat(np.arange(E), SIZES)]

    def total(x):
        y = quantized_grouped_matmul(x, values, Groups(jnp.asarray(SIZES, jnp.int32)), kind)
        return jnp.sum(y * weight), y

    gradient, got = jax.jit(jax.grad(total, has_aux=True))(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, np.einsum("md,mdf->mf", x, want), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        gradient, np.einsum("mf,mdf->md", weight, want), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("family", [mixtral, qwen3_moe])
def test_a_model_in_codes_is_the_model_of_the_rounded_weights(family):
    """And not that of the weights as they were."""
    model = family(num_hidden_layers=2)
    plain, weights = tiny.ours(model)
    coded = structure(read_config(model.config.to_dict(), "config.json"), quantization="int8")
    held, dequantised = {}, dict(weights)
    for path, value in weights.items():
        if f"{path}_scale" not in coded.frozen:
            held[path] = value
            continue
        found = quantize_kernel(value, "int8")
        held |= {path: found["kernel"], f"{path}_scale": found["kernel_scale"]}
        dequantised[path] = found["kernel"].astype(jnp.float32) * found["kernel_scale"]
    assert sum(".experts." in path for path in coded.frozen) == 6
    ids = np.random.default_rng(1).integers(3, 50, (2, 13))
    got, want = tiny.logits(coded, held, ids), tiny.logits(plain, dequantised, ids)
    assert tiny.relative_error(got, want) < 1e-5
    assert tiny.relative_error(tiny.logits(plain, weights, ids), want) > 1e-3


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_groups_of_layers_have_the_codes_of_one_after_another(kind):
    kernels = jax.random.normal(jax.random.key(0), (6, 64, 4))
    plain, grouped = (quantize_kernel(kernels, kind, groups=groups) for groups in (1, 3))
    assert plain.keys() == grouped.keys()
    for name, value in plain.items():
        np.testing.assert_array_equal(grouped[name], value)
