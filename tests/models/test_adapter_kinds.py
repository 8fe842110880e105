"""DoRA, LoRA-FA and every start: what the adapted layer computes, and what trains in it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
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
from balora_jax.models.linear import Linear
from balora_jax.models.methods import METHODS
from balora_jax.models.methods.dora import column_norms, magnitude_gain
from balora_jax.models.starts import STARTS
from balora_jax.models.starts.stacks import start_adapters, start_from_factors
from tests.models import tiny

KINDS = ["lora", "dora", "lora_fa"]
NAMES = ["lora", "pissa", "pissa_niter_2", "milora", "olora", "orthogonal"]
D_IN, D_OUT, LAYERS, ALPHA = 12, 9, 3, 7.0
PATH = "layers.fc"


def plan(method, rank=4, layers=(0, 2), **patterns):
    names = tuple(f"model.layers.{i}.fc" for i in range(LAYERS))
    return plan_adapters(
        [LinearShape(PATH, names, D_IN, D_OUT)],
        rank=rank,
        alpha=ALPHA,
        target_modules=[f"model.layers.{i}.fc" for i in layers],
        method=METHODS[method],
        **patterns,
    )


def weights(dtype=jnp.float32):
    rng = np.random.default_rng(3)
    return {
        f"{PATH}.kernel": jnp.asarray(rng.standard_normal((LAYERS, D_IN, D_OUT)), dtype),
        f"{PATH}.bias": jnp.asarray(rng.standard_normal((LAYERS, D_OUT)), dtype),
    }


def forward(shape, dtype=jnp.float32):
    """A function of (arrays by path, x) to the outputs of every layer of the stack."""
    layer = nnx.eval_shape(
        lambda: Linear(
            D_IN, D_OUT, layers=LAYERS, use_bias=True, adapter=shape, dtype=jnp.dtype(dtype)
        )
    )
    graph = nnx.split(layer)[0]

    def apply(arrays, x):
        stacked = {path.rsplit(".", 1)[1]: value for path, value in arrays.items()}
        return jax.lax.map(lambda one: nnx.merge(graph, nnx.State(one))(x), stacked)

    return jax.jit(apply)


def adapted(method, start, dtype=jnp.float32, rank=4, **patterns):
    modules, frozen = plan(method, rank, **patterns), weights(dtype)
    adapters, origin = start_adapters(modules, frozen, start=STARTS[start], key=jax.random.key(1))
    (shape,) = adapter_shapes(modules, origin=STARTS[start].has_origin).values()
    return modules, frozen, adapters, origin, forward(shape, dtype)


def inputs(dtype=jnp.float32, rows=5):
    return jnp.asarray(np.random.default_rng(0).standard_normal((rows, D_IN)), dtype)


def moved(modules, adapters, size=0.3):
    """Other values in every adapted layer, up to its rank: padding stays zero."""
    rng = np.random.default_rng(5)
    changed = {path: np.array(value) for path, value in adapters.items()}
    for module in modules:
        for path, stack in changed.items():
            one = stack[module.layer]
            rank = {"lora_a": (..., slice(module.rank)), "lora_b": slice(module.rank)}
            part = rank.get(path.rsplit(".", 1)[1], ...)
            one[part] += size * rng.standard_normal(one[part].shape)
    return {path: jnp.asarray(value) for path, value in changed.items()}


def wide(value):
    return np.asarray(jnp.asarray(value, jnp.float32), np.float64)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("start", NAMES)
@pytest.mark.parametrize("method", KINDS)
def test_every_kind_starts_as_the_plain_layer_bit_for_bit(method, start, dtype):
    _, frozen, adapters, origin, apply = adapted(
        method, start, dtype, rank_pattern={"layers.0.fc": 2}
    )
    x = inputs(dtype)
    got = apply({**frozen, **adapters, **origin}, x)
    assert got.dtype == dtype
    assert np.array_equal(np.asarray(got), np.asarray(forward(None, dtype)(frozen, x)))
    a = {**adapters, **origin}[f"{PATH}.lora_a"]
    assert np.abs(np.asarray(a[2])).max() > 0.02
    assert np.asarray(adapters[f"{PATH}.lora_b"]).any() == (start != "lora")


def formula(module, frozen, adapters, origin, x):
    """Output of one layer in float64, from the definitions."""

    def part(name):
        arrays = {**adapters, **origin}
        path = f"{PATH}.{name}"
        return wide(arrays[path][module.layer]) if path in arrays else None

    a, b, a0, b0 = (part(name) for name in ("lora_a", "lora_b", "origin_a", "origin_b"))
    delta = a @ b
    if b0 is not None:
        delta = delta - (a if a0 is None else a0) @ b0
    weight = wide(frozen[f"{PATH}.kernel"][module.layer]) + ALPHA / module.rank * delta
    if module.method.name == "dora":
        weight = weight * part("lora_magnitude") / np.linalg.norm(weight, axis=0)
    return wide(x) @ weight + wide(frozen[f"{PATH}.bias"][module.layer])


@pytest.mark.parametrize("start", [s for s in NAMES if s != "pissa_niter_2"])
@pytest.mark.parametrize("method", KINDS)
def test_forward_is_the_formula(method, start):
    modules, frozen, adapters, origin, apply = adapted(
        method, start, rank_pattern={"layers.0.fc": 2}
    )
    x, trained = inputs(), moved(modules, adapters)
    got = wide(apply({**frozen, **trained, **origin}, x))
    plain = wide(forward(None)(frozen, x))
    for module in modules:
        want = formula(module, frozen, trained, origin, x)
        np.testing.assert_allclose(got[module.layer], want, rtol=0, atol=1e-5 * np.abs(want).max())
        assert np.abs(want - plain[module.layer]).max() > 0.1
    assert np.array_equal(got[1], plain[1])
    if method == "lora_fa":
        assert set(trained) == {f"{PATH}.lora_b"}
        assert origin[f"{PATH}.lora_a"].dtype == jnp.float32
        assert f"{PATH}.origin_a" not in origin


def peft_layer(weight, bias, **options):
    """One PEFT linear layer on a copy of an [in, out] weight."""
    linear = torch.nn.Linear(D_IN, D_OUT)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(np.array(weight.T)))
        linear.bias.copy_(torch.tensor(np.array(bias)))
    model = torch.nn.Sequential()
    model.add_module("fc", linear)
    config = LoraConfig(target_modules=["fc"], r=4, lora_alpha=ALPHA, **options)
    return get_peft_model(model, config).base_model.model.fc


def torch_gradients(layer, x, magnitude):
    """y and the gradients of A, B (in our orientation) and m of sum(sin(y))."""
    y = layer(torch.tensor(np.array(x)))
    torch.sin(y).sum().backward()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    gradients = {"lora_a": a.grad.numpy().T, "lora_b": b.grad.numpy().T}
    if magnitude:
        gradients["lora_magnitude"] = layer.lora_magnitude_vector["default"].weight.grad.numpy()
    return y.detach().numpy(), gradients


def our_gradients(apply, frozen, adapters, origin, x, layer):
    def loss(adapters):
        y = apply({**frozen, **adapters, **origin}, x)[layer]
        return jnp.sum(jnp.sin(y)), y

    (_, y), gradients = jax.value_and_grad(loss, has_aux=True)(adapters)
    return y, {path.rsplit(".", 1)[1]: value[layer] for path, value in gradients.items()}


@pytest.mark.parametrize("method", KINDS)
def test_outputs_and_gradients_are_those_of_peft(method):
    modules, frozen = plan(method), weights()
    rng = np.random.default_rng(9)
    factors = {
        m.name: (rng.standard_normal((D_IN, 4)) / 3, rng.standard_normal((4, D_OUT)) / 3)
        for m in modules
    }
    sizes = {m.name: 1 + rng.random(D_OUT) for m in modules} if method == "dora" else None
    adapters, origin = start_from_factors(modules, frozen, factors, sizes)
    (shape,) = adapter_shapes(modules, origin=False).values()
    last, x = modules[-1], inputs()
    layer = peft_layer(
        frozen[f"{PATH}.kernel"][2], frozen[f"{PATH}.bias"][2], use_dora=method == "dora"
    )
    with torch.no_grad():
        a, b = factors[last.name]
        layer.lora_A["default"].weight.copy_(torch.tensor(a.T))
        layer.lora_B["default"].weight.copy_(torch.tensor(b.T))
        if sizes:
            layer.lora_magnitude_vector["default"].weight.copy_(torch.tensor(sizes[last.name]))
    want, wanted = torch_gradients(layer, x, method == "dora")
    got, gradients = our_gradients(forward(shape), frozen, adapters, origin, x, 2)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    assert set(gradients) == set(wanted) - ({"lora_a"} if method == "lora_fa" else set())
    for name, value in gradients.items():
        np.testing.assert_allclose(value, wanted[name], atol=2e-5 * np.abs(wanted[name]).max())


@pytest.mark.parametrize("start", ["pissa", "olora", "milora", "orthogonal"])
def test_delta_form_trains_as_the_residual_form_of_peft(start):
    """PEFT's residual base and factors against W, our origin and PEFT's factors."""
    _, frozen, adapters, origin, apply = adapted("lora", start)
    kernel, x = frozen[f"{PATH}.kernel"][2], inputs()
    layer = peft_layer(
        kernel,
        frozen[f"{PATH}.bias"][2],
        init_lora_weights=True if start == "milora" else start,
    )
    rng = np.random.default_rng(2)
    with torch.no_grad():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if start == "milora":  # which PEFT does not have
            u, s, vt = np.linalg.svd(wide(kernel))
            residual = u[:, :5] * s[:5] @ vt[:5]
            layer.base_layer.weight.copy_(torch.tensor(residual.T))
            root = np.sqrt(s[5:] * 4 / ALPHA)
            a.copy_(torch.tensor((u[:, 5:9] * root).T))
            b.copy_(torch.tensor((root[:, None] * vt[5:]).T))
        a.add_(torch.tensor(0.2 * rng.standard_normal(a.shape)))
        b.add_(torch.tensor(0.2 * rng.standard_normal(b.shape)))
    trained = {
        f"{PATH}.lora_{side}": adapters[f"{PATH}.lora_{side}"].at[2].set(value.detach().numpy().T)
        for side, value in (("a", a), ("b", b))
    }
    want, wanted = torch_gradients(layer, x, magnitude=False)
    got, gradients = our_gradients(apply, frozen, trained, origin, x, 2)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    for name, value in gradients.items():
        np.testing.assert_allclose(value, wanted[name], atol=2e-5 * np.abs(wanted[name]).max())


def test_a_layer_that_is_not_adapted_ignores_its_magnitude():
    _, frozen, adapters, origin, apply = adapted("dora", "lora")
    path, x = f"{PATH}.lora_magnitude", inputs()
    assert np.array_equal(np.asarray(adapters[path][1]), np.sqrt(origin[f"{PATH}.origin_norm"][1]))
    adapters[path] = adapters[path] * 2.0
    got = apply({**frozen, **adapters, **origin}, x)
    plain = forward(None)(frozen, x)
    assert np.array_equal(got[1], plain[1])
    bias = frozen[f"{PATH}.bias"][:, None]
    np.testing.assert_allclose(got[0] - bias[0], 2 * (plain[0] - bias[0]), rtol=1e-4, atol=1e-5)
    gradient = jax.grad(lambda a: jnp.sum(jnp.sin(apply({**frozen, **a, **origin}, x))))(adapters)
    assert not gradient[path][1].any()
    assert (np.abs(gradient[path][0]) > 1e-4).all()


@pytest.mark.parametrize("method", ["dora", "lora_fa"])
@pytest.mark.parametrize("start", ["lora", "pissa"])
def test_padding_of_mixed_ranks_has_no_gradient(method, start):
    _, frozen, adapters, origin, apply = adapted(method, start, rank_pattern={"layers.0.fc": 1})
    x = inputs()
    gradient = jax.grad(lambda a: jnp.sum(jnp.sin(apply({**frozen, **a, **origin}, x))))(adapters)
    b = gradient[f"{PATH}.lora_b"]
    assert not b[0, 1:].any()
    assert not b[1].any()
    assert (b[2] != 0).all()
    assert (b[0, 0] != 0).all()
    if method == "dora":
        a = gradient[f"{PATH}.lora_a"]
        assert not a[0, :, 1:].any()
        assert not a[1].any()


def test_small_steps_of_a_magnitude_survive_bfloat16():
    _, frozen, adapters, origin, apply = adapted("dora", "lora", jnp.bfloat16)
    frozen[f"{PATH}.bias"] = jnp.zeros_like(frozen[f"{PATH}.bias"])
    x = inputs(jnp.bfloat16, rows=2000)
    path = f"{PATH}.lora_magnitude"
    longer = {**adapters, path: adapters[path] * 1.003}  # a bfloat16 gain would be 1
    before, after = (wide(apply({**frozen, **a, **origin}, x)) for a in (adapters, longer))
    step = np.sum(after * before, axis=(1, 2)) / np.sum(before**2, axis=(1, 2)) - 1
    np.testing.assert_allclose(step, [0.003, 0.0, 0.003], rtol=0.3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_column_norms_are_those_of_the_whole_matrix(dtype):
    rng = np.random.default_rng(4)
    kernel = jnp.asarray(rng.standard_normal((30, 20)), dtype)
    down = jnp.asarray(rng.standard_normal((30, 3)), jnp.float32)
    up = jnp.asarray(rng.standard_normal((3, 20)), jnp.float32)
    squares = jnp.sum(jnp.square(kernel.astype(jnp.float32)), axis=0)
    want = np.linalg.norm(wide(kernel) + wide(down) @ wide(up), axis=0)
    tolerance = 1e-5 if dtype == jnp.float32 else 5e-3
    np.testing.assert_allclose(column_norms(kernel, squares, down, up), want, rtol=tolerance)
    # Several layers at once, as experts have them.
    pairs = [jnp.stack([one, 2 * one]) for one in (kernel, squares, down, up)]
    pairs[1] = pairs[1] * jnp.asarray([[1.0], [2.0]])
    second = np.linalg.norm(2 * wide(kernel) + 4 * wide(down) @ wide(up), axis=0)
    both = column_norms(*pairs)
    np.testing.assert_allclose(both, [want, second], rtol=tolerance)
    still = jax.grad(lambda down: column_norms(kernel, squares, down, up).sum())(down)
    assert not still.any()


def test_norms_of_nothing_stay_finite():
    kernel = jnp.concatenate([jnp.zeros((6, 1)), jnp.full((6, 1), 0.1)], axis=1)
    squares = jnp.sum(kernel**2, axis=0)
    down, up = jnp.full((6, 1), 0.3), jnp.asarray([[0.0, -1 / 3]])  # cancels the second column
    norms = column_norms(kernel, squares, down, up)
    assert norms[0] == 0
    assert 0 < norms[1] < 1e-3 * jnp.sqrt(squares[1])
    magnitude = jnp.asarray([2.0, 2.0])
    assert magnitude_gain(magnitude, norms)[0] == 1
    gradient = jax.grad(lambda m: magnitude_gain(m, jnp.asarray([0.0, 4.0])).sum())(magnitude)
    assert gradient.tolist() == [0.0, 0.25]


def test_counts_are_those_of_peft_and_of_what_trains():
    names = {}
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        weight = tiny.llama().get_submodule(f"model.layers.0.{name}").weight
        names[name] = (weight.shape[1], weight.shape[0])
    linears = [
        LinearShape(f"layers.{n}", tuple(f"model.layers.{i}.{n}" for i in range(3)), *shape)
        for n, shape in names.items()
    ]
    settings = {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"1.mlp.down_proj": 3}}
    for method, options in (("lora", {}), ("dora", {"use_dora": True})):
        modules = plan_adapters(linears, rank=4, alpha=4, method=METHODS[method], **settings)
        config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=4, **settings, **options)
        wrapped = get_peft_model(tiny.llama(), config)
        assert trainable_parameters(modules) == wrapped.get_nb_trainable_parameters()[0]
        assert {module.method.name for module in modules} == {method}
    modules = plan_adapters(linears, rank=4, alpha=4, method=METHODS["lora_fa"], **settings)
    outputs = {name: shape[1] for name, shape in names.items()}
    assert trainable_parameters(modules) == (
        3 * 4 * outputs["self_attn.q_proj"] + (4 + 3 + 4) * outputs["mlp.down_proj"]
    )


def test_shapes_carry_the_method():
    assert adapter_shapes(plan("lora_fa"), origin=True, dropout=0.5) == {
        PATH: AdapterShape(4, True, 0.5, METHODS["lora_fa"])
    }
    assert adapter_shapes(plan("dora"), origin=False) == {
        PATH: AdapterShape(4, False, 0.0, METHODS["dora"])
    }
    with pytest.raises(InputError) as caught:
        adapter_shapes(plan("dora"), origin=False, dropout=0.1)
    assert str(caught.value) == (
        "adapter.dropout: expected 0 with the method dora, got 0.1. Set it to 0, or choose another "
        "method."
    )


def test_frozen_a_keeps_its_dropout():
    modules = plan("lora_fa")
    frozen = weights()
    factors = {m.name: (np.ones((D_IN, 4)), np.ones((4, D_OUT))) for m in modules}
    adapters, origin = start_from_factors(modules, frozen, factors)
    (shape,) = adapter_shapes(modules, origin=False, dropout=0.5).values()
    layer = nnx.eval_shape(lambda: Linear(D_IN, D_OUT, layers=LAYERS, use_bias=True, adapter=shape))
    graph = nnx.split(layer)[0]
    one = {p.rsplit(".", 1)[1]: v[2] for p, v in {**frozen, **adapters, **origin}.items()}
    x = jnp.ones((1, D_IN))
    merged = nnx.merge(graph, nnx.State(one))
    draws = [merged(x, jax.random.key(i)) - merged(x) for i in range(8)]
    # Inputs are doubled or dropped, so the delta s · Σ x_i · R changes in steps of s · R.
    steps = np.asarray(jnp.stack(draws)) / ALPHA
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-4)
    assert np.abs(steps).max() > 0.5
