"""The blocks of the decoders one by one, against torch, transformers and hand values."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from balora_jax.models import attention, layers, rope_settings, rotary
from balora_jax.models.adapters import AdapterShape
from balora_jax.models.decoder_config import DecoderConfig
from balora_jax.models.options import Options
from balora_jax.untyped.fields import Fields
from tests.models import tiny


def random(*shape, seed=0, size=1.0):
    return np.float32(size * np.random.default_rng(seed).standard_normal(shape))


NORMS = {"rms": LlamaRMSNorm, "rms_float32": Olmo2RMSNorm, "rms_plus_one": GemmaRMSNorm}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rms_norm_equals_transformers(dtype, kind):
    x, weight = random(3, 24, size=5.0), random(24, seed=1)
    norm = layers.RMSNorm(24, layers=None, eps=0.3, dtype=jnp.dtype(dtype), kind=kind)
    norm.scale[...] = jnp.asarray(weight, dtype)
    got = norm(jnp.asarray(x, dtype))
    theirs = NORMS[kind](24, eps=0.3).to(getattr(torch, dtype))
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(weight))
        want = theirs(torch.tensor(x).to(getattr(torch, dtype))).float().numpy()
    assert got.dtype == jnp.dtype(dtype)
    tolerance = 1e-6 if dtype == "float32" else 2**-7
    np.testing.assert_allclose(np.float32(got), want, rtol=tolerance, atol=tolerance)
    if dtype == "bfloat16":  # where it is rounded tells the kinds apart
        assert np.mean(np.float32(got) == want) > 0.95
    scale = 1 + weight if kind == "rms_plus_one" else weight
    bare = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 0.3) * scale
    np.testing.assert_allclose(np.float32(got), bare, rtol=4 * tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("rope", [name for name in tiny.ROPES if name != "default"])
def test_frequencies_equal_transformers(rope):
    config = LlamaConfig(
        head_dim=16, max_position_embeddings=32, rope_parameters=dict(tiny.ROPES[rope])
    )
    kind = tiny.ROPES[rope]["rope_type"]
    for length in (20, 75):
        want, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
        ours = rope_settings.rope_config(Fields(config.to_dict(), "config.json"))
        got = rotary.rope_frequencies(ours, 16, jnp.int32(length))
        np.testing.assert_allclose(got, want.numpy(), rtol=2e-6)
        assert ours.attention_factor == pytest.approx(factor, rel=1e-12)
    plain = 1.0 / tiny.ROPES[rope]["rope_theta"] ** (np.arange(0, 16, 2) / 16)
    assert np.abs(np.asarray(got) / plain - 1).max() > 0.1  # the scaling does something


def test_default_frequencies():
    got = rotary.rope_frequencies(rotary.RopeConfig(theta=81.0), 4, 10)
    np.testing.assert_allclose(got, [1.0, 1 / 9], rtol=1e-6)


def test_rotation_equals_transformers():
    rope = rotary.RopeConfig(theta=50.0, attention_factor=1.25)
    positions = np.array([[0, 1, 2, 5, 9], [3, 3, 0, 7, 40]])
    q = random(2, 5, 3, 8)
    cos, sin = rotary.rotary_tables(rope, 8, jnp.asarray(positions))
    got = rotary.rotate(jnp.asarray(q), cos, sin)
    angles = positions[..., None] * (50.0 ** -(np.arange(0, 8, 2) / 8))
    angles = torch.tensor(np.concatenate([angles, angles], -1))
    turned = torch.tensor(q, dtype=torch.float64).transpose(1, 2)
    want, _ = apply_rotary_pos_emb(turned, turned, angles.cos() * 1.25, angles.sin() * 1.25)
    np.testing.assert_allclose(got, want.transpose(1, 2).numpy(), atol=2e-5)


def test_rotation_depends_on_distance_only():
    rope = rotary.RopeConfig(theta=50.0)
    q, k = random(1, 1, 1, 8), random(1, 1, 1, 8, seed=1)

    def score(i, j):
        turn = [rotary.rotary_tables(rope, 8, jnp.array([[p]])) for p in (i, j)]
        return float(
            jnp.sum(
                rotary.rotate(jnp.asarray(q), *turn[0]) * rotary.rotate(jnp.asarray(k), *turn[1])
            )
        )

    assert score(9, 4) == pytest.approx(score(25, 20), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-2)


def test_mask_by_hand():
    """Two packed segments and one padding token; a window of two."""
    positions = jnp.array([[0, 1, 2, 0, 1, 0]])
    segments = jnp.array([[1, 1, 1, 2, 2, 0]])
    want = np.array(
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [0, 0, 0, 1, 0, 0],
            [0, 0, 0, 1, 1, 0],
            [0, 0, 0, 0, 0, 1],
        ],
        bool,
    )
    got = attention.attention_mask(positions, segments, positions, segments, None)
    assert np.array_equal(np.asarray(got)[0, 0], want)
    want[2, 0] = False
    got = attention.attention_mask(positions, segments, positions, segments, 2)
    assert np.array_equal(np.asarray(got)[0, 0], want)


def test_mask_of_one_query_on_a_cache():
    """Columns not yet written carry segment -1 and are never attended to."""
    got = attention.attention_mask(
        jnp.array([[2]]), jnp.array([[1]]), jnp.array([[0, 1, 2, 0]]), jnp.array([[1, 1, 1, -1]]), 2
    )
    assert np.asarray(got)[0, 0].tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("kernel", ["auto", "xla", "blocks"])
def test_grouped_attention_equals_torch(kernel):
    q, k, v = random(2, 5, 6, 4), random(2, 7, 2, 4, seed=1), random(2, 7, 2, 4, seed=2)
    mask = np.random.default_rng(3).random((2, 1, 5, 7)) < 0.6
    mask[..., 0] = True
    got = attention.attend(*map(jnp.asarray, (q, k, v, mask)), kernel)
    torch_q, torch_k, torch_v = (torch.tensor(x).double().transpose(1, 2) for x in (q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(
        torch_q, torch_k, torch_v, attn_mask=torch.tensor(mask), enable_gqa=True
    )
    np.testing.assert_allclose(got, want.transpose(1, 2).numpy(), atol=1e-5)


@pytest.mark.parametrize("name", layers.ACTIVATIONS)
def test_activations_are_those_of_transformers(name):
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    want = ACT2FN[name](torch.tensor(x, dtype=torch.float64)).numpy()
    np.testing.assert_allclose(layers.ACTIVATIONS[name](jnp.asarray(x)), want, atol=1e-6)


def test_gated_mlp_by_its_definition():
    make = layers.stacked_linear("layers.mlp", 1, Options())
    sizes = {"hidden_size": 4, "intermediate_size": 6, "num_layers": 1, "vocab_size": 2}
    heads = {"num_heads": 1, "num_kv_heads": 1, "head_dim": 4, "rope": None, "max_length": 8}
    config = DecoderConfig(
        "llama", **sizes, **heads, norm_eps=1e-6, activation="relu", tie_word_embeddings=True,
        mlp_bias=True,
    )  # fmt: skip
    mlp = layers.GatedMLP(config, linear=make)
    weights = {
        name: (random(*shape, seed=i), random(shape[1], seed=i + 10))
        for i, (name, shape) in enumerate(
            {"gate_proj": (4, 6), "up_proj": (4, 6), "down_proj": (6, 4)}.items()
        )
    }
    state = {n: {"kernel": jnp.asarray(w), "bias": jnp.asarray(b)} for n, (w, b) in weights.items()}
    x = random(2, 3, 4, seed=20)
    keys = dict.fromkeys(weights)
    got = nnx.merge(nnx.split(mlp)[0], nnx.State(state))(jnp.asarray(x), keys)

    def linear(name, value):
        return value @ np.float64(weights[name][0]) + weights[name][1]

    want = linear("down_proj", np.maximum(linear("gate_proj", x), 0) * linear("up_proj", x))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_adapters_are_found_by_path():
    adapters = {"layers.mlp.up_proj": AdapterShape(2, origin=False)}
    make = layers.stacked_linear("layers.mlp", 3, Options(adapters))
    adapted = make("up_proj", 5, 4, layers.INTO_INNER, False)
    assert adapted.lora_a[...].shape == (3, 5, 2)
    assert adapted.lora_b[...].shape == (3, 2, 4)
    assert make("gate_proj", 5, 4, layers.INTO_INNER, False).adapter is None
