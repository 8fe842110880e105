"""First factors of adapters: PiSSA against PEFT and exact SVDs, LoRA's bounds, given factors."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from balora_jax.errors import InputError
from balora_jax.models.adapters import AdaptedModule
from balora_jax.models.methods import METHODS
from balora_jax.models.starts import STARTS
from balora_jax.models.starts.stacks import given_factors, start_adapters, start_from_factors

TALL, WIDE = (14, 9), (9, 14)  # [in, out]


def module(layer=0, rank=3, scale=1.0, shape=TALL, name="fc"):
    return AdaptedModule(
        f"model.layers.{layer}.{name}", f"layers.{name}", layer, rank, scale * rank, scale, *shape
    )


def decaying(shape, ratio, seed=0):
    """A random matrix with singular values 1, ratio, ratio², …"""
    rng = np.random.default_rng(seed)
    u, _, vt = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
    return u * ratio ** np.arange(min(shape)) @ vt


def best(matrix, rank):
    """The truncated product in float64 (Eckart-Young)."""
    u, s, vt = np.linalg.svd(np.float64(matrix), full_matrices=False)
    return u[:, :rank] * s[:rank] @ vt[:rank]


def relative(got, want):
    return np.linalg.norm(np.float64(got) - want) / np.linalg.norm(want)


def ours(weight, rank, scale, start, key=0):
    """scale · A B of our start on one [in, out] weight, and the two factors, float64."""
    one = module(rank=rank, scale=scale, shape=weight.shape)
    kernels = {"layers.fc.kernel": jnp.asarray(weight, jnp.float32)[None]}
    adapters, origin = start_adapters([one], kernels, start=STARTS[start], key=jax.random.key(key))
    a, b = (np.float64(adapters[f"layers.fc.lora_{side}"][0]) for side in "ab")
    factor = np.float64(origin["layers.fc.lora_scale"][0])
    return factor * a @ b, a, b


def peft(weight, start, **options):
    """scale · B A and the residual of PEFT's start, as [in, out] float64."""
    model = torch.nn.Sequential()
    linear = torch.nn.Linear(*weight.shape, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(weight.T))
    model.add_module("fc", linear)
    config = LoraConfig(target_modules=["fc"], init_lora_weights=start, **options)
    layer = get_peft_model(model, config).base_model.model.fc
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    product = layer.scaling["default"] * (up.double() @ down.double())
    residual = layer.base_layer.weight.double()
    return product.detach().numpy().T, residual.detach().numpy().T


@pytest.mark.parametrize("shape", [TALL, WIDE], ids=["tall", "wide"])
@pytest.mark.parametrize(("rank", "alpha", "rslora"), [(3, 7.5, False), (4, 6, True)])
def test_pissa_product_and_residual_equal_peft(shape, rank, alpha, rslora):
    weight = np.float32(np.random.default_rng(rank).standard_normal(shape))
    want, residual = peft(weight, "pissa", r=rank, lora_alpha=alpha, use_rslora=rslora)
    scale = alpha / np.sqrt(rank) if rslora else alpha / rank
    got, a, b = ours(weight, rank, scale, "pissa")
    assert relative(got, want) < 1e-5
    assert relative(weight - got, residual) < 1e-5
    assert relative(got, best(weight, rank)) < 1e-5
    # Balanced: √S in both factors, divided by the scale.
    sigma = np.linalg.svd(np.float64(weight), compute_uv=False)[:rank]
    np.testing.assert_allclose(a.T @ a, np.diag(sigma / scale), atol=1e-5 * sigma[0] / scale)
    np.testing.assert_allclose(b @ b.T, np.diag(sigma / scale), atol=1e-5 * sigma[0] / scale)


@pytest.mark.parametrize("shape", [TALL, WIDE], ids=["tall", "wide"])
def test_sixteen_iterations_reach_the_exact_product(shape):
    weight = np.float32(decaying(shape, 0.6))
    got, _, _ = ours(weight, 4, 2.5, "pissa_niter_16")
    assert relative(got, best(weight, 4)) < 1e-5
    torch.manual_seed(0)
    want, residual = peft(weight, "pissa_niter_16", r=4, lora_alpha=10)
    assert relative(got, want) < 1e-4
    assert relative(weight - got, residual) < 1e-4 / 0.6**4


def test_few_iterations_lose_no_more_than_those_of_peft():
    """On a flat spectrum the sketch is only as good as chance: compare what each leaves over."""
    weight = np.float32(decaying((40, 30), 0.97, seed=3))
    least = np.linalg.norm(weight - best(weight, 5))

    def lost(products):
        return np.array([np.linalg.norm(weight - product) / least for product in products])

    def products(name):
        sketch = jax.jit(STARTS[name].factors, static_argnums=(1, 2))
        for seed in range(8):
            a, b = sketch(jnp.asarray(weight), 5, 1.0, jax.random.key(seed), None)
            yield np.float64(a) @ np.float64(b)

    draws = list(products("pissa_niter_1"))
    mine = lost(draws)
    theirs = []
    for seed in range(8):
        torch.manual_seed(seed)
        theirs.append(peft(weight, "pissa_niter_1", r=5, lora_alpha=5)[0])
    theirs = lost(theirs)
    assert mine.min() > 1.0
    spread = max(theirs.std(), mine.std())
    assert mine.mean() < theirs.mean() + spread
    assert relative(draws[0], draws[1]) > 1e-3  # another key, another sketch
    assert np.array_equal(draws[0], next(products("pissa_niter_1")))
    better = lost(products("pissa_niter_12"))
    assert better.mean() < mine.mean()


def test_lora_start_has_the_bound_of_peft_and_a_zero_b():
    shape, rank = (64, 40), 32
    kernels = {"layers.fc.kernel": jnp.ones((1, *shape))}
    adapters, origin = start_adapters(
        [module(rank=rank, scale=0.5, shape=shape)],
        kernels,
        start=STARTS["lora"],
        key=jax.random.key(4),
    )
    a = np.asarray(adapters["layers.fc.lora_a"])
    linear = torch.nn.Sequential()
    linear.add_module("fc", torch.nn.Linear(*shape))
    layer = get_peft_model(linear, LoraConfig(r=rank, target_modules=["fc"])).base_model.model.fc
    reference = layer.lora_A["default"].weight.detach().numpy()
    bound = 1 / 8  # √(6 / ((1 + 5) · 64)), Kaiming uniform with a = √5
    for sample in (a, reference):
        assert 0.99 * bound < np.abs(sample).max() <= bound
        assert sample.std() == pytest.approx(bound / np.sqrt(3), rel=0.05)
        assert abs(sample.mean()) < 0.05 * bound
    assert not np.asarray(adapters["layers.fc.lora_b"]).any()
    assert set(origin) == {"layers.fc.lora_scale"}
    assert origin["layers.fc.lora_scale"].tolist() == [0.5]


@pytest.mark.parametrize(
    "start", ["lora", "pissa", "pissa_niter_1", "milora", "olora", "orthogonal"]
)
def test_start_does_not_depend_on_other_layers(start):
    rng = np.random.default_rng(0)
    kernels = {
        f"layers.{name}.kernel": jnp.asarray(rng.standard_normal((3, *TALL)), jnp.float32)
        for name in ("fc", "other")
    }
    every = [module(i, rank=4, name=name) for name in ("other", "fc") for i in range(3)]
    key = jax.random.key(9)
    alone, _ = start_adapters([module(1, rank=4)], kernels, start=STARTS[start], key=key)
    both, _ = start_adapters(every, kernels, start=STARTS[start], key=key)
    for side in "ab":
        got, want = (np.asarray(x[f"layers.fc.lora_{side}"]) for x in (alone, both))
        assert np.array_equal(got[1], want[1])
        assert not got[[0, 2]].any()
    a = np.asarray(both["layers.fc.lora_a"])
    assert not np.array_equal(a[0], a[1])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_origin_is_the_start_itself_in_the_dtype_of_the_weights(dtype):
    weight = jnp.asarray(decaying(TALL, 0.8), dtype)
    kernels = {"layers.fc.kernel": weight[None]}
    adapters, origin = start_adapters(
        [module(scale=2.0)], kernels, start=STARTS["pissa"], key=jax.random.key(0)
    )
    for side in "ab":
        trained = adapters[f"layers.fc.lora_{side}"]
        frozen = origin[f"layers.fc.origin_{side}"]
        assert trained.dtype == jnp.float32
        assert frozen.dtype == dtype
        assert np.array_equal(np.asarray(trained), np.asarray(frozen.astype(jnp.float32)))
        # The step donates the adapters: they must not share memory with the origin.
        assert trained.unsafe_buffer_pointer() != frozen.unsafe_buffer_pointer()
    product = (
        2.0
        * np.float64(origin["layers.fc.origin_a"][0].astype(jnp.float32))
        @ np.float64(origin["layers.fc.origin_b"][0].astype(jnp.float32))
    )
    exact = best(weight.astype(jnp.float32), 3)
    assert relative(product, exact) < (1e-5 if dtype == jnp.float32 else 1e-2)


def test_mixed_ranks_and_missing_layers_are_zero_padded():
    rng = np.random.default_rng(0)
    kernels = {"layers.fc.kernel": jnp.asarray(rng.standard_normal((3, *TALL)), jnp.float32)}
    modules = [module(0, rank=2, scale=0.5), module(2, rank=4, scale=3.0)]
    adapters, origin = start_adapters(
        modules, kernels, start=STARTS["pissa"], key=jax.random.key(0)
    )
    a, b = (np.asarray(adapters[f"layers.fc.lora_{side}"]) for side in "ab")
    assert a.shape == (3, 14, 4)
    assert b.shape == (3, 4, 9)
    assert not a[0, :, 2:].any()
    assert not b[0, 2:].any()
    assert not a[1].any()
    assert not b[1].any()
    assert origin["layers.fc.lora_scale"].tolist() == [0.5, 0.0, 3.0]
    for m in modules:
        weight = np.asarray(kernels["layers.fc.kernel"][m.layer])
        assert relative(m.scale * a[m.layer] @ b[m.layer], best(weight, m.rank)) < 1e-5


def test_start_from_factors_reads_only_shapes():
    rng = np.random.default_rng(0)
    modules = [module(0, rank=2, scale=0.5), module(2, rank=3, scale=3.0)]
    factors = {
        m.name: (
            np.float32(rng.standard_normal((14, m.rank))),
            np.float32(rng.standard_normal((m.rank, 9))),
        )
        for m in modules
    }
    shapes = {"layers.fc.kernel": jax.ShapeDtypeStruct((3, *TALL), jnp.bfloat16)}
    adapters, origin = start_from_factors(modules, shapes, factors)
    assert {value.dtype for value in adapters.values()} == {jnp.dtype(jnp.float32)}
    assert origin["layers.fc.lora_scale"].tolist() == [0.5, 0.0, 3.0]
    for m in modules:
        a, b = factors[m.name]
        stacked = np.asarray(adapters["layers.fc.lora_a"][m.layer])
        assert np.array_equal(stacked[:, : m.rank], a)
        assert not stacked[:, m.rank :].any()
        stacked = np.asarray(adapters["layers.fc.lora_b"][m.layer])
        assert np.array_equal(stacked[: m.rank], b)
        assert not stacked[m.rank :].any()


@pytest.mark.parametrize("shape", [TALL, WIDE], ids=["tall", "wide"])
@pytest.mark.parametrize(("rank", "alpha", "rslora"), [(3, 7.5, False), (4, 6, True)])
def test_olora_product_and_residual_equal_peft(shape, rank, alpha, rslora):
    weight = np.float32(np.random.default_rng(rank).standard_normal(shape))
    want, residual = peft(weight, "olora", r=rank, lora_alpha=alpha, use_rslora=rslora)
    scale = alpha / np.sqrt(rank) if rslora else alpha / rank
    got, _, b = ours(weight, rank, scale, "olora")
    assert relative(got, want) < 1e-5
    assert relative(weight - got, residual) < 1e-5
    np.testing.assert_allclose(b @ b.T, np.eye(rank), atol=1e-5)  # whatever the scale


@pytest.mark.parametrize("shape", [TALL, WIDE], ids=["tall", "wide"])
@pytest.mark.parametrize(("rank", "scale"), [(3, 2.5), (4, 0.5)])
def test_milora_is_the_part_of_the_smallest_values(shape, rank, scale):
    weight = np.float32(np.random.default_rng(rank).standard_normal(shape))
    got, a, b = ours(weight, rank, scale, "milora")
    assert relative(got, np.float64(weight) - best(weight, 9 - rank)) < 1e-5
    sigma = np.linalg.svd(np.float64(weight), compute_uv=False)[-rank:]
    np.testing.assert_allclose(a.T @ a, np.diag(sigma / scale), atol=1e-5 * sigma[0] / scale)
    np.testing.assert_allclose(b @ b.T, np.diag(sigma / scale), atol=1e-5 * sigma[0] / scale)


def test_orthogonal_has_the_spread_of_peft_and_no_product():
    weight = np.ones((64, 48), np.float32)
    got, a, b = ours(weight, 8, 3.0, "orthogonal")
    want, residual = peft(weight, "orthogonal", r=8, lora_alpha=24)
    assert np.array_equal(residual, weight)  # PEFT leaves the base alone
    for product in (got, want):
        assert np.abs(product).max() < 1e-5
    linear = torch.nn.Sequential()
    linear.add_module("fc", torch.nn.Linear(64, 48))
    config = LoraConfig(r=8, target_modules=["fc"], init_lora_weights="orthogonal")
    layer = get_peft_model(linear, config).base_model.model.fc
    for mine, theirs in ((a, layer.lora_A), (b, layer.lora_B)):
        spread = theirs["default"].weight.detach().numpy().std()
        assert mine.std() == pytest.approx(spread, rel=0.2)
        assert mine.std() == pytest.approx(0.1 / np.sqrt(2), rel=0.2)  # half of a rotation's rows
        assert np.linalg.matrix_rank(mine, tol=1e-4) == 4
    _, again, _ = ours(weight, 8, 3.0, "orthogonal", key=1)
    assert relative(again, a) > 0.5


def test_orthogonal_halves_the_rank():
    modules = [module(0, rank=4), module(1, rank=3)]
    with pytest.raises(InputError) as caught:
        start_adapters(modules, {}, start=STARTS["orthogonal"], key=jax.random.key(0))
    assert str(caught.value) == (
        "adapter.rank: expected an even rank with the start 'orthogonal', got 3 for "
        "model.layers.1.fc. Choose an even rank, or another start."
    )
    STARTS["orthogonal"].check_ranks(modules[:1])
    STARTS["olora"].check_ranks(modules)


def with_method(method, *modules):
    return [replace(one, method=METHODS[method]) for one in modules]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("start", ["lora", "pissa"])
def test_dora_begins_with_the_lengths_of_the_weights(start, dtype):
    rng = np.random.default_rng(0)
    kernels = {"layers.fc.kernel": jnp.asarray(rng.standard_normal((3, *TALL)), dtype)}
    modules = with_method("dora", module(0), module(2))
    adapters, origin = start_adapters(modules, kernels, start=STARTS[start], key=jax.random.key(0))
    want = np.linalg.norm(np.float64(kernels["layers.fc.kernel"].astype(jnp.float32)), axis=1)
    magnitude, squares = adapters["layers.fc.lora_magnitude"], origin["layers.fc.origin_norm"]
    assert magnitude.dtype == squares.dtype == jnp.float32
    np.testing.assert_allclose(magnitude, want, rtol=1e-6)  # the layer between them as well
    np.testing.assert_allclose(squares, want**2, rtol=1e-6)
    plain, _ = start_adapters(
        [module(0), module(2)], kernels, start=STARTS[start], key=jax.random.key(0)
    )
    for name, value in plain.items():
        assert np.array_equal(value, adapters[name])
    assert set(adapters) - set(plain) == {"layers.fc.lora_magnitude"}


@pytest.mark.parametrize("start", ["lora", "olora"])
def test_frozen_a_lies_with_the_constants(start):
    kernels = {"layers.fc.kernel": jnp.asarray(decaying(TALL, 0.8), jnp.bfloat16)[None]}
    key = jax.random.key(0)
    plain, start_of = start_adapters([module()], kernels, start=STARTS[start], key=key)
    adapters, origin = start_adapters(
        with_method("lora_fa", module()), kernels, start=STARTS[start], key=key
    )
    assert set(adapters) == {"layers.fc.lora_b"}
    assert set(origin) == set(start_of) - {"layers.fc.origin_a"} | {"layers.fc.lora_a"}
    a = origin["layers.fc.lora_a"]
    assert a.dtype == jnp.float32
    assert np.array_equal(a, plain["layers.fc.lora_a"])


@pytest.mark.parametrize("given", [True, False], ids=["magnitudes", "norms"])
def test_dora_from_factors(given):
    rng = np.random.default_rng(0)
    kernels = {"layers.fc.kernel": jnp.asarray(rng.standard_normal((3, *TALL)), jnp.float32)}
    modules = with_method("dora", module(0, rank=2, scale=0.5), module(2, rank=3, scale=3.0))
    factors = {
        m.name: (rng.standard_normal((14, m.rank)), rng.standard_normal((m.rank, 9)))
        for m in modules
    }
    sizes = {m.name: np.float32(1 + rng.random(9)) for m in modules}
    adapters, origin = start_from_factors(modules, kernels, factors, sizes if given else None)
    whole = np.float64(kernels["layers.fc.kernel"])
    squares = np.sum(whole**2, axis=1)
    np.testing.assert_allclose(origin["layers.fc.origin_norm"], squares, rtol=1e-6)
    for m in modules:
        a, b = factors[m.name]
        whole[m.layer] += m.scale * a @ b
    want = np.linalg.norm(whole, axis=1)
    if given:
        want[0], want[2] = sizes[modules[0].name], sizes[modules[1].name]
    np.testing.assert_allclose(adapters["layers.fc.lora_magnitude"], want, rtol=1e-5)


def test_given_factors_and_magnitudes_need_only_shapes():
    rng = np.random.default_rng(0)
    modules = with_method("dora", module(2))
    factors = {modules[0].name: (rng.standard_normal((14, 3)), rng.standard_normal((3, 9)))}
    sizes = {modules[0].name: np.float32(rng.random(9))}
    shapes = {"layers.fc.kernel": jax.ShapeDtypeStruct((3, *TALL), jnp.bfloat16)}
    stacks = given_factors(modules, shapes, factors, sizes)
    assert {n: v.shape for n, v in stacks.items()} == {
        "layers.fc.lora_a": (3, 14, 3),
        "layers.fc.lora_b": (3, 3, 9),
        "layers.fc.lora_magnitude": (3, 9),
    }
    assert np.array_equal(stacks["layers.fc.lora_magnitude"][2], sizes[modules[0].name])
    assert "layers.fc.lora_magnitude" not in given_factors(modules, shapes, factors)


@pytest.mark.parametrize("start", ["lora", "pissa_niter_1", "milora", "olora", "orthogonal"])
def test_starts_compile(start):
    rng = np.random.default_rng(0)
    kernels = {"layers.fc.kernel": jnp.asarray(rng.standard_normal((2, *TALL)), jnp.float32)}
    modules, key = with_method("dora", module(0, rank=2), module(1, rank=4)), jax.random.key(0)

    def make(kernels):
        return start_adapters(modules, kernels, start=STARTS[start], key=key)

    for got, want in zip(jax.jit(make)(kernels), make(kernels), strict=True):
        assert set(got) == set(want)
        for name, value in got.items():
            np.testing.assert_allclose(value, want[name], rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("pisa", "Did you mean 'pissa'?"),
        ("pissa_niter", "Did you mean 'pissa_niter_N'?"),
        ("pissa_niter_x", "Did you mean 'pissa_niter_N'?"),
        ("pissa_niter_-1", "Did you mean 'pissa_niter_N'?"),
        ("pissa_niter_N", "Write a number in place of its last letter."),
        ("LoRA", "Choose one of these."),
    ],
)
def test_unknown_start(name, advice):
    assert name not in STARTS
    with pytest.raises(InputError) as caught:
        STARTS[name]
    assert str(caught.value) == (
        "adapter.start: expected 'lora', 'pissa', 'pissa_niter_N', 'milora', 'olora', 'orthogonal' "
        f"or the folder of a PEFT adapter, got {name!r}. {advice}"
    )


@pytest.mark.parametrize(
    "name",
    ["lora", "pissa", "pissa_niter_0", "pissa_niter_16", "milora", "olora", "orthogonal"],
)
def test_known_starts(name):
    assert name in STARTS
    start = STARTS[name]
    assert start.name == name
    assert start.has_origin == (name != "lora")
    assert start.allows_dropout == (name == "lora")
    assert start == STARTS[name]  # the same program is compiled once
    assert hash(start) == hash(STARTS[name])
