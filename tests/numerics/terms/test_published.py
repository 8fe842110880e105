import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from balora_jax.errors import InputError
from balora_jax.numerics.terms.consistency import consistency_nlg, consistency_nlu
from balora_jax.numerics.terms.diversity import diversity_nlg, diversity_nlu
from balora_jax.numerics.terms.spectral import center_rows, spectral_nlg, spectral_nlu

torch = pytest.importorskip("torch")

ROWS, COLUMNS = 6, 9
MASK = np.array([True, False, True, True, False, True])


def softmax(row):
    weight = np.exp(row - row.max())
    return weight / weight.sum()


def kl(teacher, student, temperature):
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True))


def entropy(row, top_k):
    kept = np.sort(row)[::-1][: top_k or len(row)]
    return -sum(p * np.log(p) for p in softmax(kept))


def ratio(matrix, k, norm):
    s = np.linalg.svd(matrix, compute_uv=False)
    return s[:k].sum() / (np.sqrt((s**2).sum()) if norm == "frobenius" else s.sum())


def f32(array):
    return jnp.asarray(array, jnp.float32)


@pytest.fixture
def logits(rng):
    return rng.standard_normal((2, ROWS, COLUMNS)) * 2


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
def test_consistency_nlg(logits, temperature):
    student, teacher = logits
    rows = [kl(teacher[i], student[i], temperature) for i in range(ROWS) if MASK[i]]
    got = consistency_nlg(f32(student), f32(teacher), MASK, temperature=temperature)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, temperature**2 * np.mean(rows), rtol=1e-6)


def test_consistency_matches_torch_with_gradient(logits):
    student, teacher = logits
    tensor = torch.tensor(student, requires_grad=True)
    kept = torch.tensor(MASK)
    loss = 4 * torch.nn.functional.kl_div(
        torch.log_softmax(tensor[kept] / 2, -1),
        torch.softmax(torch.tensor(teacher)[kept] / 2, -1),
        reduction="batchmean",
    )
    loss.backward()
    value, gradient = jax.value_and_grad(
        lambda z: consistency_nlg(z, f32(teacher), MASK, temperature=2.0)
    )(f32(student))
    np.testing.assert_allclose(value, loss.item(), rtol=1e-6)
    expected = tensor.grad.numpy()
    np.testing.assert_allclose(gradient, expected, atol=1e-5 * abs(expected).max())
    np.testing.assert_array_equal(np.asarray(gradient)[~MASK], 0)


def test_consistency_has_no_gradient_into_the_teacher(logits):
    for function in (
        lambda t: consistency_nlg(f32(logits[0]), t, MASK, temperature=2.0),
        lambda t: consistency_nlu(f32(logits[0]), t, temperature=2.0, form="kl"),
        lambda t: consistency_nlu(f32(logits[0]), t, temperature=2.0, form="normalized_mse"),
    ):
        np.testing.assert_array_equal(jax.grad(function)(f32(logits[1])), 0)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_equal_logits_have_exactly_zero_divergence(logits, scale):
    z = f32(logits[0] * scale)
    value, gradient = jax.value_and_grad(lambda s: consistency_nlg(s, z, MASK, temperature=2.0))(z)
    assert value == 0.0
    np.testing.assert_array_equal(gradient, 0)
    assert consistency_nlu(z, z, temperature=2.0, form="kl") == 0.0
    assert consistency_nlu(z, z, temperature=2.0, form="normalized_mse") == 0.0


@pytest.mark.parametrize("top_k", [0, 1, 4, COLUMNS])
def test_diversity_nlg(logits, top_k):
    z = logits[0]
    expected = -np.mean([entropy(z[i], top_k) for i in range(ROWS) if MASK[i]])
    got = diversity_nlg(f32(z), MASK, top_k=top_k)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)


def test_diversity_nlg_gradient_matches_torch(logits):
    tensor = torch.tensor(logits[0], requires_grad=True)
    log_p = torch.log_softmax(torch.topk(tensor[torch.tensor(MASK)], 4).values, -1)
    (log_p.exp() * log_p).sum(-1).mean().backward()
    gradient = jax.grad(lambda z: diversity_nlg(z, MASK, top_k=4))(f32(logits[0]))
    expected = tensor.grad.numpy()
    np.testing.assert_allclose(gradient, expected, atol=1e-5 * abs(expected).max())


def test_top_k_ties_keep_the_lower_index():
    # Four logits of 1 compete for two places: only columns 0 and 1 may receive a gradient.
    z = jnp.array([[1.0, 1.0, 1.0, 1.0, 2.0]])
    gradient = jax.grad(lambda z: diversity_nlg(z, jnp.array([True]), top_k=3))(z)
    assert (np.asarray(gradient)[0] != 0).tolist() == [True, True, False, False, True]


@pytest.mark.parametrize("norm", ["frobenius", "nuclear"])
@pytest.mark.parametrize("k", [1, 3, 40])
def test_spectral(logits, k, norm):
    z = logits[0]
    got = spectral_nlg(f32(z), MASK, k=k, norm=norm)
    np.testing.assert_allclose(got, -ratio(z[MASK], k, norm), rtol=1e-6)
    got = spectral_nlu(f32(z), k=k, norm=norm)
    np.testing.assert_allclose(got, -ratio(z, k, norm), rtol=1e-6)


@pytest.mark.parametrize("norm", ["frobenius", "nuclear"])
def test_spectral_gradient_matches_torch(logits, norm):
    tensor = torch.tensor(logits[0], requires_grad=True)
    s = torch.linalg.svdvals(tensor[torch.tensor(MASK)])
    (-s[:2].sum() / (s.norm() if norm == "frobenius" else s.sum())).backward()
    gradient = jax.grad(lambda z: spectral_nlg(z, MASK, k=2, norm=norm))(f32(logits[0]))
    expected = tensor.grad.numpy()
    np.testing.assert_allclose(gradient, expected, atol=1e-5 * abs(expected).max())


def test_consistency_nlu_forms(logits):
    student, teacher = logits[:, :, :3]
    expected = 4 * np.mean([kl(t, s, 2.0) for s, t in zip(student, teacher, strict=True)])
    got = consistency_nlu(f32(student), f32(teacher), temperature=2.0, form="kl")
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    expected = torch.nn.functional.mse_loss(
        torch.nn.functional.normalize(torch.tensor(student)),
        torch.nn.functional.normalize(torch.tensor(teacher)),
    ).item()
    got = consistency_nlu(f32(student), f32(teacher), temperature=2.0, form="normalized_mse")
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    huge = consistency_nlu(
        f32(student * 1e25), f32(teacher * 1e-25), temperature=2.0, form="normalized_mse"
    )
    np.testing.assert_allclose(huge, expected, rtol=1e-5)


def test_normalized_mse_of_zero_rows_is_finite():
    zero, one = jnp.zeros((2, 3)), jnp.ones((2, 3))
    value, gradient = jax.value_and_grad(
        lambda z: consistency_nlu(z, one, temperature=1.0, form="normalized_mse")
    )(zero)
    np.testing.assert_allclose(value, 1 / 3, rtol=1e-6)
    assert np.isfinite(gradient).all()


def test_diversity_nlu(logits):
    z = logits[0]
    covariance = np.cov(z, rowvar=False)
    expected = sum(covariance[i, j] ** 2 for i in range(COLUMNS) for j in range(COLUMNS) if i != j)
    np.testing.assert_allclose(diversity_nlu(f32(z)), expected / COLUMNS, rtol=1e-6)


def test_nlu_terms_that_are_undefined_are_zero():
    one_row, one_class = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[1.0], [3.0], [4.0]])
    for z in (one_row, one_class):
        value, gradient = jax.value_and_grad(diversity_nlu)(z)
        assert value == 0
        np.testing.assert_array_equal(gradient, 0)
    no_rows = jnp.zeros((0, 3))
    assert diversity_nlu(no_rows) == 0
    assert spectral_nlu(no_rows, k=2) == 0
    assert consistency_nlu(no_rows, no_rows, temperature=2.0, form="kl") == 0
    assert consistency_nlu(no_rows, no_rows, temperature=2.0, form="normalized_mse") == 0


def test_published_k_does_nothing_on_three_classes(logits):
    z = f32(logits[0][:, :3])
    value, gradient = jax.value_and_grad(lambda z: spectral_nlu(z, k=5))(z)
    np.testing.assert_allclose(value, -1, rtol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


NLG_TERMS = {
    "consistency": lambda z, t, m: consistency_nlg(z, t, m, temperature=2.0),
    "diversity": lambda z, t, m: diversity_nlg(z, m, top_k=4),
    "diversity_full": lambda z, t, m: diversity_nlg(z, m, top_k=0),
    "frobenius": lambda z, t, m: spectral_nlg(z, m, k=2, norm="frobenius"),
    "nuclear": lambda z, t, m: spectral_nlg(z, m, k=2, norm="nuclear"),
}


@pytest.mark.parametrize("term", NLG_TERMS)
def test_all_masked_is_zero_with_zero_gradient(logits, term):
    student = f32(logits[0]).at[0].set(jnp.nan)
    value, gradient = jax.value_and_grad(NLG_TERMS[term])(
        student, f32(logits[1]), jnp.zeros(ROWS, bool)
    )
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("term", NLG_TERMS)
def test_masked_rows_change_nothing_even_if_nan(logits, term):
    function = jax.value_and_grad(NLG_TERMS[term])
    student, teacher = f32(logits[0]), f32(logits[1])
    value, gradient = function(student, teacher, jnp.asarray(MASK))
    spoiled = jnp.where(MASK[:, None], student, jnp.nan)
    again, spoiled_gradient = function(
        spoiled, jnp.where(MASK[:, None], teacher, jnp.inf), jnp.asarray(MASK)
    )
    assert value == again
    np.testing.assert_array_equal(gradient, spoiled_gradient)


@pytest.mark.parametrize("term", NLG_TERMS)
def test_logits_up_to_1e4_are_finite(rng, term):
    student, teacher = f32(rng.uniform(-1e4, 1e4, (2, ROWS, COLUMNS)))
    value, gradient = jax.value_and_grad(NLG_TERMS[term])(student, teacher, jnp.asarray(MASK))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_a_common_offset_costs_no_accuracy():
    # 4096 is exact in float32, so the shifted rows are the same distributions to the last bit.
    student, teacher = jnp.array([[0.0, 1.0, 2.5]]), jnp.array([[0.5, 1.0, 0.25]])
    mask = jnp.array([True])
    near = consistency_nlg(student, teacher, mask, temperature=2.0)
    far = consistency_nlg(student + 4096, teacher - 4096, mask, temperature=2.0)
    np.testing.assert_allclose(far, near, rtol=1e-6)


def test_duplicated_rows_and_one_row(logits):
    row = logits[0][:1]
    many = f32(np.repeat(row, 4, 0))
    value, gradient = jax.value_and_grad(
        lambda z: spectral_nlg(z, jnp.ones(4, bool), k=1, norm="frobenius")
    )(many)
    np.testing.assert_allclose(value, -1, rtol=1e-6)
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
    one = spectral_nlg(f32(row), jnp.ones(1, bool), k=3, norm="nuclear")
    np.testing.assert_allclose(one, -1, rtol=1e-6)


def test_gradients_match_finite_differences(x64, rng):
    student, teacher = jnp.asarray(rng.standard_normal((2, ROWS, COLUMNS)))
    mask = jnp.asarray(MASK)
    labels = (
        lambda z: consistency_nlu(z, teacher, temperature=2.0, form="kl"),
        lambda z: consistency_nlu(z, teacher, temperature=2.0, form="normalized_mse"),
        diversity_nlu,
        lambda z: spectral_nlu(z, k=2),
        lambda z: spectral_nlg(center_rows(z), mask, k=2, norm="frobenius"),
    )

    # One compiled sum with distinct weights: a wrong gradient of any term shows in it.
    def total(z):
        values = [term(z, teacher, mask) for term in NLG_TERMS.values()] + [f(z) for f in labels]
        return sum((1 + i) * value for i, value in enumerate(values))

    check_grads(jax.jit(total), (student,), 1, ["rev"], rtol=1e-6)


def test_bfloat16_logits_are_widened_first(logits):
    z = jnp.asarray(logits[0], jnp.bfloat16)
    for got, expected in (
        (diversity_nlg(z, MASK, top_k=4), diversity_nlg(f32(z), MASK, top_k=4)),
        (diversity_nlu(z), diversity_nlu(f32(z))),
        (center_rows(z), center_rows(f32(z))),
    ):
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, expected)


def test_center_rows_against_numpy(logits):
    z = logits[0] + 5
    np.testing.assert_allclose(center_rows(f32(z)), z - z.mean(1, keepdims=True), atol=1e-6)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**20), st.floats(0.01, 30), st.integers(1, COLUMNS), st.floats(-50, 50))
def test_properties(seed, scale, top_k_seed, shift):
    generator = np.random.default_rng(seed)
    student, teacher = f32(generator.standard_normal((2, ROWS, COLUMNS)) * scale)
    mask = jnp.asarray(MASK)
    divergence = float(consistency_nlg(student, teacher, mask, temperature=2.0))
    assert divergence >= -1e-5
    moved = float(consistency_nlg(student + shift, teacher - shift, mask, temperature=2.0))
    np.testing.assert_allclose(moved, divergence, rtol=1e-4, atol=1e-4)

    top_k = 1 + top_k_seed % 3  # few static values: each one compiles
    diversity = float(diversity_nlg(student, mask, top_k=top_k))
    assert -np.log(top_k) - 1e-6 <= diversity <= 1e-6
    moved = float(diversity_nlg(student + shift, mask, top_k=top_k))
    np.testing.assert_allclose(moved, diversity, rtol=1e-4, atol=1e-4)

    frobenius = float(spectral_nlg(student, mask, k=3, norm="frobenius"))
    nuclear = float(spectral_nlg(student, mask, k=3, norm="nuclear"))
    assert 0 < -frobenius <= np.sqrt(3) + 1e-5
    assert 0 < -nuclear <= 1 + 1e-5

    order = generator.permutation(ROWS)
    for term in NLG_TERMS.values():
        permuted = term(student[order], teacher[order], mask[order])
        np.testing.assert_allclose(permuted, term(student, teacher, mask), rtol=1e-5, atol=1e-6)


def message(call):
    with pytest.raises(InputError) as error:
        call()
    return str(error.value)


def test_messages(type_checks_off):
    z, mask = jnp.ones((2, 3)), jnp.ones(2, bool)
    for temperature in (0.0, -1.0, float("nan")):
        assert message(lambda t=temperature: consistency_nlg(z, z, mask, temperature=t)) == (
            f"consistency_nlg: expected a temperature above 0, got {temperature}. "
            "The published value is 2."
        )
    assert message(lambda: diversity_nlg(z, mask, top_k=4)) == (
        "diversity_nlg: expected top_k between 0 (all) and the 3 columns of the logits, got 4. "
        "Lower it."
    )
    assert "got -1" in message(lambda: diversity_nlg(z, mask, top_k=-1))
    assert message(lambda: spectral_nlg(z, mask, k=0, norm="nuclear")) == (
        "spectral_nlg: expected k of at least 1, got 0. The published value is 10."
    )
    assert message(lambda: spectral_nlu(z, k=1, norm="spectral")) == (
        "spectral_nlu: expected norm frobenius or nuclear, got 'spectral'. Choose one of them."
    )
    assert message(lambda: consistency_nlu(z, z, temperature=1.0, form="l2")) == (
        "consistency_nlu: expected form kl, normalized_mse or mse, got 'l2'. Choose one of them."
    )


def test_shape_messages(type_checks_off):
    z, mask = jnp.ones((2, 3)), jnp.ones(2, bool)
    assert message(lambda: consistency_nlg(z, z[:, :2], mask, temperature=1.0)) == (
        "consistency_nlg: expected teacher logits of the student's shape (2, 3), got (2, 2). "
        "Run both models on one batch and one vocabulary."
    )
    assert message(lambda: diversity_nlg(z, mask[:1], top_k=0)) == (
        "diversity_nlg: expected a mask of shape (2,), one entry per row, got (1,). "
        "Flatten the mask like the logits."
    )
    assert message(lambda: diversity_nlu(z[None])) == (
        "diversity_nlu: expected logits of two axes with at least one column, got shape "
        "(1, 2, 3). Flatten batch and time into one axis of rows."
    )
