"""Layers that get an adapter, their ranks and scales, and what the adapted layer computes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from peft import LoraConfig, get_peft_model

from balora_jax.errors import InputError
from balora_jax.models.adapters import (
    AdapterShape,
    LinearShape,
    adapter_shapes,
    plan_adapters,
    trainable_parameters,
)
from balora_jax.models.families.base import read_config, weight_rules
from balora_jax.models.linear import Linear
from balora_jax.models.methods.method import delta_factors
from balora_jax.models.starts import STARTS
from balora_jax.models.starts.stacks import start_adapters, start_from_factors
from balora_jax.models.structure import structure
from balora_jax.models.weight_names import linear_shapes
from tests.models import tiny

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def linears():
    config = read_config(tiny.llama().config.to_dict(), "config.json")
    return linear_shapes(weight_rules(config), structure(config).frozen)


def peft_choice(settings):
    """Name → (rank, alpha, scale) of every layer that PEFT adapts, and its parameter count."""
    options = dict(settings)
    names = {"rank": "r", "alpha": "lora_alpha"}
    options = {names.get(key, key): value for key, value in options.items()}
    wrapped = get_peft_model(tiny.llama(), LoraConfig(task_type="CAUSAL_LM", **options))
    chosen = {
        name.removeprefix("base_model.model."): (
            module.r["default"],
            float(module.lora_alpha["default"]),
            float(module.scaling["default"]),
        )
        for name, module in wrapped.named_modules()
        if hasattr(module, "lora_A")
    }
    return chosen, wrapped.get_nb_trainable_parameters()[0]


CASES = {
    "suffixes": {"target_modules": ["q_proj", "down_proj"]},
    "one full name": {"target_modules": ["model.layers.1.mlp.up_proj", "v_proj"]},
    "dotted suffix": {"target_modules": ["self_attn.o_proj", "2.mlp.gate_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "all-linear in capitals": {"target_modules": "ALL-LINEAR"},
    "regex": {"target_modules": r"model\.layers\.(0|2)\.(self_attn\.[qv]|mlp\.down)_proj"},
    "exclude list": {
        "target_modules": "all-linear",
        "exclude_modules": ["k_proj", "1.mlp.up_proj"],
    },
    "exclude regex": {"target_modules": SEVEN, "exclude_modules": r".*layers\.2\..*"},
    "rank pattern": {
        "target_modules": SEVEN,
        "rank_pattern": {"q_proj": 5, "model.layers.1.mlp.down_proj": 2, r"layers\.2\.mlp\..*": 3},
    },
    "alpha pattern": {
        "target_modules": SEVEN,
        "alpha_pattern": {"layers.0.self_attn.k_proj": 3.5, "mlp.up_proj": 20, "v_proj": 0.25},
    },
    "both, first key wins": {
        "target_modules": SEVEN,
        "rank_pattern": {r"layers\.1\..*_proj": 6, "q_proj": 1},
        "alpha_pattern": {"up_proj": 2, r"layers\.1\..*": 9},
    },
    "the second key never wins": {
        "target_modules": SEVEN,
        "rank_pattern": {"self_attn.v_proj": 2, "1.self_attn.v_proj": 7},
    },
    "rsLoRA": {"target_modules": ["v_proj", "up_proj"], "use_rslora": True},
    "rsLoRA with patterns": {
        "target_modules": ["v_proj", "up_proj"],
        "use_rslora": True,
        "rank_pattern": {"up_proj": 7},
        "alpha_pattern": {"1.mlp.up_proj": 11},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_layers_ranks_and_scales_are_those_of_peft(case, linears):
    settings = {"rank": 4, "alpha": 6, **CASES[case]}
    want, parameters = peft_choice(settings)
    modules = plan_adapters(linears, **settings)
    assert {m.name: (m.rank, m.alpha) for m in modules} == {n: v[:2] for n, v in want.items()}
    for module in modules:
        assert module.scale == pytest.approx(want[module.name][2], rel=1e-12)
    assert trainable_parameters(modules) == parameters
    for module in modules:  # path and layer say the same as the name
        stem = module.path.removeprefix("layers.")
        assert module.name == f"model.layers.{module.layer}.{stem}"


LLAMA_2_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
MISTRAL_7B = {
    **LLAMA_2_7B,
    "model_type": "mistral",
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
}

GEMMA_7B = {
    **LLAMA_2_7B,
    "model_type": "gemma",
    "vocab_size": 256000,
    "tie_word_embeddings": True,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "head_dim": 256,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}


@pytest.mark.parametrize(
    ("raw", "rank", "trainable", "total"),
    [
        (LLAMA_2_7B, 128, 319_815_680, 6_738_415_616),
        (MISTRAL_7B, 64, 167_772_160, 7_241_732_096),
        (GEMMA_7B, 64, 200_015_872, 8_537_680_896),
    ],
    ids=["llama2-7b", "mistral-7b", "gemma-7b"],
)
def test_published_counts_from_shapes_alone(raw, rank, trainable, total):
    config = read_config(raw, "config.json")
    plain = structure(config, dtype="bfloat16")
    modules = plan_adapters(
        linear_shapes(weight_rules(config), plain.frozen),
        rank=rank,
        alpha=rank,
        target_modules=SEVEN,
    )
    assert trainable_parameters(modules) == trainable
    shapes = adapter_shapes(modules, origin=True)
    student = structure(read_config(raw, "config.json"), adapters=shapes, dtype="bfloat16")
    leaves = [*student.frozen.values(), *student.adapters.values(), *student.origin.values()]
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert sum(np.prod(leaf.shape, dtype=int) for leaf in student.frozen.values()) == total
    assert sum(np.prod(leaf.shape, dtype=int) for leaf in student.adapters.values()) == trainable
    assert {leaf.dtype for leaf in student.adapters.values()} == {jnp.dtype(jnp.float32)}


ERRORS = {
    "near miss": (
        {"target_modules": ["q_porj"]},
        "adapter.target_modules: 'q_porj' matches no linear layer that takes an adapter. Did "
        "you mean 'q_proj'? There are down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj "
        "(embeddings and heads take none).",
    ),
    "one of two misses": (
        {"target_modules": ["q_proj", "lm_head"]},
        "adapter.target_modules: 'lm_head' matches no linear layer that takes an adapter.",
    ),
    "part of a name": ({"target_modules": ["proj"]}, "'proj' matches no linear layer"),
    "regex misses": (
        {"target_modules": r"q_proj"},
        "'q_proj' matches no linear layer that takes an adapter. A text is one expression for "
        "whole names: did you mean the list [q_proj]? There are",
    ),
    "regex of two names misses": (
        {"target_modules": "v_proj|q_proj"},
        "did you mean the list [q_proj, v_proj]?",
    ),
    "all-linear in a list": (
        {"target_modules": ["All-Linear"]},
        "Did you mean all-linear, without brackets?",
    ),
    "a head": ({"target_modules": ["pooler.dense"]}, "takes an adapter. There are down_proj,"),
    "broken regex": (
        {"target_modules": r"(q_proj"},
        "adapter.target_modules: expected a regular expression, got '(q_proj' (",
    ),
    "empty": (
        {"target_modules": []},
        "adapter.target_modules: expected at least one layer, got an empty list. This model has",
    ),
    "all excluded": (
        {"target_modules": ["q_proj"], "exclude_modules": ["self_attn.q_proj"]},
        "adapter.exclude_modules: expected to leave some target layer, but it excludes all of "
        "adapter.target_modules=['q_proj']. Exclude fewer layers.",
    ),
    "broken exclude": (
        {"target_modules": ["q_proj"], "exclude_modules": "*q_proj"},
        "adapter.exclude_modules: expected a regular expression, got '*q_proj' (",
    ),
    "pattern misses": (
        {"target_modules": ["q_proj"], "rank_pattern": {"k_proj": 2}},
        "adapter.rank_pattern/alpha_pattern: 'k_proj' matches no adapted layer. Use the end of a "
        "layer's name, such as 'model.layers.0.self_attn.q_proj', or remove it.",
    ),
    "alpha pattern misses": (
        {"target_modules": ["q_proj"], "alpha_pattern": {"layers.7.self_attn.q_proj": 2.0}},
        "'layers.7.self_attn.q_proj' matches no adapted layer",
    ),
    "broken pattern": (
        {"target_modules": ["q_proj"], "rank_pattern": {"(q_proj": 2}},
        "adapter.rank_pattern/alpha_pattern: expected a regular expression, got '(q_proj' (",
    ),
    "rank above a layer": (
        {"target_modules": ["q_proj"], "rank": 25},
        "adapter.rank: expected at most 24 for model.layers.0.self_attn.q_proj (24 x 72), got 25. "
        "Lower the rank, or set it for this layer in adapter.rank_pattern.",
    ),
    "rank zero": (
        {"target_modules": ["q_proj"], "rank_pattern": {"2.self_attn.q_proj": 0}},
        "adapter.rank: expected at least 1 for model.layers.2.self_attn.q_proj, got 0. Raise it.",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_messages(case, linears):
    settings, message = ERRORS[case]
    with pytest.raises(InputError) as caught:
        plan_adapters(linears, **{"rank": 4, "alpha": 4.0, **settings})
    assert message in str(caught.value)


def test_rank_pattern_may_stay_below_a_narrow_layer(linears):
    modules = plan_adapters(
        linears,
        rank=24,
        alpha=1.0,
        target_modules=["q_proj"],
        rank_pattern={"1.self_attn.q_proj": 3},
    )
    assert [module.rank for module in modules] == [24, 3, 24]
    shapes = adapter_shapes(modules, origin=False, dropout=0.25)
    assert shapes == {"layers.self_attn.q_proj": AdapterShape(24, False, 0.25)}


# One stacked layer "fc" of two: ranks 1 and 3, scales far from 1.
D_IN, D_OUT, LAYERS = 12, 9, 2


def stack(start, dtype=jnp.float32, rank=3, **patterns):
    """The layer's arrays [L, …] with a start, and a function of one layer on x."""
    rng = np.random.default_rng(3)
    kernels = {"layers.fc.kernel": jnp.asarray(rng.standard_normal((LAYERS, D_IN, D_OUT)), dtype)}
    modules = plan_adapters(
        [
            LinearShape(
                "layers.fc", tuple(f"model.layers.{i}.fc" for i in range(LAYERS)), D_IN, D_OUT
            )
        ],
        rank=rank,
        alpha=7.0,
        target_modules=["fc"],
        **patterns,
    )
    adapters, origin = start_adapters(modules, kernels, start=STARTS[start], key=jax.random.key(1))
    shape = AdapterShape(rank, origin=start != "lora")
    layer = nnx.eval_shape(
        lambda: Linear(D_IN, D_OUT, layers=LAYERS, adapter=shape, dtype=jnp.dtype(dtype))
    )
    graph = nnx.split(layer)[0]

    @jax.jit
    def apply(arrays, x):
        """Outputs of every layer of the stack, [L, …]."""

        def one(layer):
            return nnx.merge(graph, nnx.State(layer))(x)

        stacked = {path.rsplit(".", 1)[1]: value for path, value in arrays.items()}
        return jax.lax.map(one, stacked)

    return kernels, modules, adapters, origin, apply


@pytest.mark.parametrize(
    ("start", "dtype"),
    [
        ("lora", jnp.bfloat16),
        ("pissa", jnp.float32),
        ("pissa", jnp.bfloat16),
        ("pissa_niter_2", jnp.float32),
    ],
)
def test_every_start_changes_nothing_bit_for_bit(start, dtype):
    kernels, _, adapters, origin, apply = stack(start, dtype, rank_pattern={"layers.0.fc": 1})
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, D_IN)), dtype)
    got = apply({**kernels, **adapters, **origin}, x)
    silent = {path: jnp.zeros_like(value) for path, value in {**adapters, **origin}.items()}
    assert got.dtype == dtype
    assert np.array_equal(np.asarray(got), np.asarray(apply({**kernels, **silent}, x)))
    frozen = np.float64(kernels["layers.fc.kernel"].astype(jnp.float32))
    want = np.float64(x.astype(jnp.float32)) @ frozen
    np.testing.assert_allclose(np.float64(got), want, rtol=0.01, atol=0.05)
    assert np.abs(np.asarray(adapters["layers.fc.lora_a"])).max() > 0.05


def test_adapted_layer_is_pissa_by_its_definition():
    """y = x (W − s A₀B₀ + s A B) in float64, with other values in A and B than at the start."""
    kernels, modules, adapters, origin, apply = stack("pissa", rank_pattern={"layers.0.fc": 1})
    rng = np.random.default_rng(5)
    moved = {
        path: value + jnp.asarray(0.3 * rng.standard_normal(value.shape) * (value != 0))
        for path, value in adapters.items()
    }
    x = rng.standard_normal((5, D_IN))
    got = apply({**kernels, **moved, **origin}, jnp.asarray(x, jnp.float32))
    for module in modules:
        i, s = module.layer, 7.0 / module.rank
        w = np.float64(kernels["layers.fc.kernel"][i])
        a0, b0 = (np.float64(origin[f"layers.fc.origin_{side}"][i]) for side in "ab")
        a, b = (np.float64(moved[f"layers.fc.lora_{side}"][i]) for side in "ab")
        want = x @ ((w - s * a0 @ b0) + s * a @ b)
        np.testing.assert_allclose(got[i], want, rtol=0, atol=1e-5 * np.abs(want).max())
        assert np.abs(want - x @ w).max() > 0.1


def test_small_update_survives_bfloat16():
    kernels, _, adapters, origin, apply = stack("pissa", jnp.bfloat16, rank=6)
    rng = np.random.default_rng(8)
    moved = {p: v + 1e-4 * jnp.asarray(rng.standard_normal(v.shape)) for p, v in adapters.items()}
    names = ("lora_a", "lora_b", "origin_a", "origin_b")
    a, b, a0, b0 = (jnp.asarray({**moved, **origin}[f"layers.fc.{name}"][1]) for name in names)
    wide = [np.asarray(value, np.float64) for value in (a, b, a0, b0)]
    x = jnp.asarray(rng.standard_normal((40, D_IN)), jnp.bfloat16)
    scale = 7.0 / 6.0
    want = scale * np.asarray(x, np.float64) @ (wide[0] @ wide[1] - wide[2] @ wide[3])

    def error(got):
        return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)

    # With a zero kernel the layer's output is the delta alone.
    bare = {path: jnp.zeros_like(value) for path, value in kernels.items()}
    assert error(apply({**bare, **moved, **origin}, x)[1]) < 0.02
    low = [value.astype(jnp.bfloat16) for value in (a, b, a0, b0)]
    rounded = ((x @ low[0]) @ low[1] - (x @ low[2]) @ low[3]) * scale
    assert error(rounded) > 0.5  # what the plain difference of two products would have made of it


def test_delta_factors_keep_the_product():
    rng = np.random.default_rng(2)
    a, a0 = (jnp.asarray(rng.standard_normal((2, 7, 3)), jnp.float32) for _ in range(2))
    b, b0 = (jnp.asarray(rng.standard_normal((2, 3, 5)), jnp.float32) for _ in range(2))
    down, up = delta_factors(a, b, a0.astype(jnp.bfloat16), b0.astype(jnp.bfloat16))
    assert down.shape == (2, 7, 6)
    assert up.shape == (2, 6, 5)
    low_a, low_b = (np.float64(v.astype(jnp.bfloat16).astype(jnp.float32)) for v in (a0, b0))
    want = np.float64(a) @ np.float64(b) - low_a @ low_b
    np.testing.assert_allclose(np.float64(down) @ np.float64(up), want, atol=1e-5)
    for got, given in zip(delta_factors(a, b, None, None), (a, b), strict=True):
        assert got is given


@pytest.mark.parametrize(
    ("start", "rule"),
    [("pissa", "adamw"), ("lora", "lion")],
)
def test_padding_of_mixed_ranks_stays_zero(start, rule):
    kernels, _, adapters, origin, apply = stack(start, rank_pattern={"layers.0.fc": 1})
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, D_IN)), jnp.float32)
    optimizer = {
        "adamw": optax.adamw(0.1, weight_decay=0.1),
        "lion": optax.lion(0.1),
    }[rule]

    @jax.jit
    def update(adapters, state):
        def loss(adapters):
            return jnp.sum(jnp.tanh(apply({**kernels, **adapters, **origin}, x)))

        grads = jax.grad(loss)(adapters)
        updates, state = optimizer.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state

    state, first = optimizer.init(adapters), adapters
    for _ in range(4):
        adapters, state = update(adapters, state)
    a, b = (np.asarray(adapters[f"layers.fc.lora_{side}"]) for side in "ab")
    assert not a[0, :, 1:].any()
    assert not b[0, 1:].any()
    for side in "ab":  # everything else has moved
        moved = adapters[f"layers.fc.lora_{side}"] != first[f"layers.fc.lora_{side}"]
        assert moved[1].all()
        assert (moved[0, :, 0] if side == "a" else moved[0, 0]).all()


def dropped_layer(rate):
    shape = AdapterShape(3, origin=False, dropout=rate)
    layer = nnx.eval_shape(lambda: Linear(D_IN, D_OUT, layers=1, adapter=shape))
    graph = nnx.split(layer)[0]
    rng = np.random.default_rng(6)

    def random(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    arrays = {
        "kernel": random(D_IN, D_OUT),
        "lora_a": random(D_IN, 3),
        "lora_b": random(3, D_OUT),
        "lora_scale": jnp.float32(0.7),
    }
    return arrays, lambda arrays, x, key: nnx.merge(graph, nnx.State(arrays))(x, key)


def test_dropout_has_the_right_mean_and_variance():
    arrays, apply = dropped_layer(0.3)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((4, D_IN)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 4000)
    draws = np.asarray(jax.jit(jax.vmap(lambda key: apply(arrays, x, key)))(keys), np.float64)
    wide = {name: np.float64(value) for name, value in arrays.items()}
    product = 0.7 * wide["lora_a"] @ wide["lora_b"]
    want = np.float64(x) @ (wide["kernel"] + product)
    # Each input is dropped on its own: Var = p/(1-p) Σ x_i² (AB)_ij².
    variance = 0.3 / 0.7 * np.float64(x) ** 2 @ product**2
    assert np.abs((draws.mean(0) - want) / np.sqrt(variance / len(keys))).max() < 4.5
    np.testing.assert_allclose(draws.var(0), variance, rtol=0.12)
    np.testing.assert_allclose(apply(arrays, x, None), want, atol=1e-5 * np.abs(want).max())


def test_dropout_leaves_the_frozen_path_and_a_zero_b_alone():
    arrays, apply = dropped_layer(0.5)
    arrays["lora_b"] = jnp.zeros_like(arrays["lora_b"])
    x = jnp.ones((2, D_IN))
    got = apply(arrays, x, jax.random.key(3))
    assert np.array_equal(np.asarray(got), np.asarray(apply(arrays, x, None)))


def test_given_factors_are_padded_and_scaled():
    _, modules, _, _, apply = stack("lora", rank_pattern={"layers.0.fc": 1})
    rng = np.random.default_rng(4)
    factors = {
        m.name: (rng.standard_normal((D_IN, m.rank)), rng.standard_normal((m.rank, D_OUT)))
        for m in modules
    }
    kernels = {"layers.fc.kernel": jnp.zeros((LAYERS, D_IN, D_OUT))}
    adapters, origin = start_from_factors(modules, kernels, factors)
    assert set(origin) == {"layers.fc.lora_scale"}
    assert adapters["layers.fc.lora_a"].shape == (LAYERS, D_IN, 3)
    x = rng.standard_normal((4, D_IN))
    got = apply({**kernels, **adapters, **origin}, jnp.asarray(x, jnp.float32))
    for m in modules:
        a, b = factors[m.name]
        np.testing.assert_allclose(got[m.layer], 7.0 / m.rank * x @ a @ b, rtol=1e-4, atol=1e-4)
