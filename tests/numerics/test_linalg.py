import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from balora_jax.errors import InputError
from balora_jax.numerics import linalg


def with_spectrum(rng, rows, columns, values):
    """Float64 matrix with given singular values, and its singular vectors."""
    u = np.linalg.qr(rng.standard_normal((rows, len(values))))[0]
    v = np.linalg.qr(rng.standard_normal((columns, len(values))))[0]
    return (u * values) @ v.T, u, v


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6), (1, 4)])
@pytest.mark.parametrize("k", [2, 50])
def test_top_k_sum_and_gradient_match_numpy(rng, shape, k):
    matrix = rng.standard_normal(shape)
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    value, gradient = jax.jit(jax.value_and_grad(lambda z: linalg.top_k_singular_sum(z, k)))(
        jnp.asarray(matrix, jnp.float32)
    )
    assert value.dtype == gradient.dtype == jnp.float32
    np.testing.assert_allclose(value, s[:k].sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient, u[:, :k] @ vt[:k], atol=1e-5)


def test_gradients_match_finite_differences(x64, rng):
    matrix = jnp.asarray(rng.standard_normal((5, 8)))
    assert matrix.dtype == jnp.float64
    check_grads(
        jax.jit(lambda z: linalg.top_k_singular_sum(z, 2)), (matrix,), 1, ["rev"], rtol=1e-6
    )
    check_grads(jax.jit(nuclear_norm), (matrix,), 1, ["rev"], rtol=1e-6)
    check_grads(jax.jit(linalg.frobenius_norm), (matrix,), 1, ["rev"], rtol=1e-6)
    weights = jnp.arange(3.0)
    check_grads(
        jax.jit(lambda z: linalg.singular_values(z, 3, method="iterative") @ weights),
        (matrix,),
        1,
        ["rev"],
        rtol=1e-6,
    )


def nuclear_norm(matrix):
    """The sum of all singular values."""
    return jnp.sum(linalg.singular_values(matrix, min(matrix.shape), method="exact"))


def residual(matrix, triplets):
    """How far computed triplets are from being singular, in float64."""
    u, s, v = (np.asarray(part, np.float64) for part in triplets)
    return np.linalg.norm(np.asarray(matrix, np.float64).T @ u - v * s) / np.linalg.norm(s)


@pytest.mark.parametrize("method", ["exact", "iterative"])
def test_zero_matrix_has_zero_value_and_gradient(method):
    zero = jnp.zeros((6, 4))
    for function in (
        lambda z: linalg.singular_values(z, 2, method=method).sum(),
        nuclear_norm,
        linalg.frobenius_norm,
    ):
        value, gradient = jax.jit(jax.value_and_grad(function))(zero)
        assert value == 0
        np.testing.assert_array_equal(gradient, np.zeros((6, 4)))


def test_no_rows():
    empty = jnp.zeros((0, 4))
    assert linalg.top_k_singular_sum(empty, 3) == 0
    assert linalg.frobenius_norm(empty) == 0
    assert jax.grad(linalg.frobenius_norm)(empty).shape == (0, 4)


@pytest.mark.parametrize("method", ["exact", "iterative"])
def test_equal_singular_values_give_the_whole_projector(method):
    # 3·Q has all singular values 3; with k = all the gradient U Vᵀ is Q itself.
    q = np.linalg.qr(np.random.default_rng(1).standard_normal((5, 5)))[0]
    value, gradient = jax.value_and_grad(
        lambda z: linalg.singular_values(z, 5, method=method).sum()
    )(jnp.asarray(3 * q, jnp.float32))
    np.testing.assert_allclose(value, 15, rtol=1e-6)
    np.testing.assert_allclose(gradient, q, atol=1e-5)


def test_equal_singular_values_at_the_edge_give_a_subgradient():
    # Any subgradient Gᵢ of the Ky Fan norm has spectral norm 1, trace k and <G, Z> = value.
    matrix = jnp.diag(jnp.array([5.0, 2.0, 2.0, 1.0]))
    gradient = np.asarray(jax.grad(linalg.top_k_singular_sum)(matrix, 2), np.float64)
    np.testing.assert_allclose(np.linalg.svd(gradient)[1], [1, 1, 0, 0], atol=1e-6)
    np.testing.assert_allclose((gradient * np.asarray(matrix)).sum(), 7, rtol=1e-6)


@pytest.mark.parametrize("method", ["exact", "iterative"])
def test_duplicated_and_zero_rows_are_finite_and_exact(rng, method):
    base = rng.standard_normal((4, 40))
    matrix = np.concatenate([base, base, np.zeros((32, 40))])
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    value, gradient = jax.value_and_grad(
        lambda z: linalg.singular_values(z, 3, method=method).sum()
    )(jnp.asarray(matrix, jnp.float32))
    np.testing.assert_allclose(value, s[:3].sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient, u[:, :3] @ vt[:3], atol=1e-5)


def test_nuclear_gradient_leaves_out_zero_singular_values(rng):
    matrix, u, v = with_spectrum(rng, 30, 20, np.array([100.0, 3.0, 0.5]))
    value, gradient = jax.value_and_grad(nuclear_norm)(jnp.asarray(matrix, jnp.float32))
    np.testing.assert_allclose(value, 103.5, rtol=1e-5)
    np.testing.assert_allclose(gradient, u @ v.T, atol=3e-5)


@pytest.mark.parametrize("ratio", [7, 202, 2000])
def test_iterative_gradient_under_a_dominant_direction(rng, ratio):
    values = (1.0 + np.arange(80)) ** -0.85
    values[0] = ratio * values[9]
    matrix, u, v = with_spectrum(rng, 230, 180, values)
    value, gradient = jax.jit(
        jax.value_and_grad(lambda z: linalg.singular_values(z, 10, method="iterative").sum())
    )(jnp.asarray(matrix, jnp.float32))
    np.testing.assert_allclose(value, values[:10].sum(), rtol=1e-6)
    exact = u[:, :10] @ v[:, :10].T
    assert np.linalg.norm(gradient - exact) < 1e-3 * np.linalg.norm(exact)


def test_auto_is_exact_up_to_the_limit_and_iterative_above(monkeypatch, rng):
    matrix = jnp.asarray(rng.standard_normal((90, 80)), jnp.float32)

    def program(method):
        return str(jax.make_jaxpr(lambda z: linalg.singular_values(z, 1, method=method))(matrix))

    assert "while" in program("iterative")
    assert "while" not in program("exact")
    assert "while" not in program("auto")
    monkeypatch.setattr(linalg, "EXACT_LIMIT", 79)
    assert "while" in program("auto")


def test_iteration_is_deterministic_and_converges(rng):
    steep = jnp.asarray(with_spectrum(rng, 190, 170, 2.0 ** -np.arange(30))[0], jnp.float32)
    flat = jnp.asarray(rng.standard_normal((690, 670)), jnp.float32)
    run = jax.jit(lambda z: linalg.top_k_svd(z, 5))
    first, second = run(steep), run(steep)
    np.testing.assert_array_equal(first.u, second.u)
    assert residual(steep, first) < 1e-5
    assert residual(flat, linalg.top_k_svd(flat, 5, cycles=1)) > 1e-3
    assert residual(flat, run(flat)) < 1e-5
    assert not np.any(run(0 * flat).s)


@pytest.mark.parametrize("shape", [(190, 160), (160, 190)])
def test_top_k_svd_vectors_are_orthonormal(rng, shape):
    matrix = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    u, s, v = linalg.top_k_svd(matrix, 4)
    assert (u.shape, s.shape, v.shape) == ((shape[0], 4), (4,), (shape[1], 4))
    np.testing.assert_allclose(u.T @ u, np.eye(4), atol=1e-5)
    np.testing.assert_allclose(v.T @ v, np.eye(4), atol=1e-5)
    np.testing.assert_allclose(
        s, np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)[:4], rtol=1e-5
    )


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (6, 6)])
def test_truncated_svd_is_the_best_approximation(rng, shape):
    matrix = rng.standard_normal(shape)
    u, s, vt = linalg.truncated_svd(jnp.asarray(matrix, jnp.bfloat16), 3)
    assert u.dtype == s.dtype == vt.dtype == jnp.float32
    rounded = np.asarray(jnp.asarray(matrix, jnp.bfloat16), np.float64)
    ue, se, vte = np.linalg.svd(rounded, full_matrices=False)
    np.testing.assert_allclose(s, se[:3], rtol=1e-6)
    np.testing.assert_allclose((u * s[None, :]) @ vt, (ue[:, :3] * se[:3]) @ vte[:3], atol=1e-5)


@pytest.mark.parametrize("shape", [(80, 50), (50, 80)])
def test_randomized_svd_finds_a_decaying_spectrum(rng, shape):
    values = 2.0 ** -np.arange(20)
    matrix, u, v = with_spectrum(rng, *shape, values)
    got_u, s, vt = linalg.randomized_svd(jnp.asarray(matrix, jnp.float32), 6, 16, jax.random.key(3))
    assert (got_u.shape, s.shape, vt.shape) == ((shape[0], 6), (6,), (6, shape[1]))
    np.testing.assert_allclose(s, values[:6], rtol=1e-5)
    np.testing.assert_allclose(
        (got_u * s[None, :]) @ vt, (u[:, :6] * values[:6]) @ v[:, :6].T, atol=1e-5
    )


def test_randomized_svd_improves_with_iterations_and_depends_on_the_key(rng):
    matrix = jnp.asarray(rng.standard_normal((60, 40)), jnp.float32)
    exact = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)[:5].sum()
    run = jax.jit(
        lambda n, key: linalg.randomized_svd(matrix, 5, n, key)[1].sum(), static_argnums=0
    )
    sums = [float(run(n, jax.random.key(0))) for n in (0, 2, 16)]
    assert sums[0] < sums[1] < sums[2] <= exact * (1 + 1e-6)
    assert float(run(0, jax.random.key(1))) != sums[0]


@pytest.mark.parametrize("vocabulary", [3, 30, 20000])
@pytest.mark.parametrize("center", [False, True])
def test_head_factor_keeps_singular_values(rng, vocabulary, center):
    head = rng.standard_normal((vocabulary, 6)) + 0.5
    hidden = rng.standard_normal((9, 6))
    factor = linalg.head_factor(head, center=center)
    logits = hidden @ head.T
    if center:
        logits = logits - logits.mean(1, keepdims=True)
    assert factor.dtype == np.float32
    assert factor.shape == (6, 6)
    np.testing.assert_array_equal(factor, np.triu(factor))
    assert (np.diagonal(factor) >= 0).all()
    expected = np.linalg.svd(logits, compute_uv=False)[:6]
    got = np.linalg.svd(hidden @ factor.T.astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(got[: len(expected)], expected, rtol=1e-6, atol=1e-5)


def test_head_factor_reads_bfloat16_device_arrays(rng):
    head = jnp.asarray(rng.standard_normal((50, 4)), jnp.bfloat16)
    exact = np.asarray(head, np.float64)
    factor = linalg.head_factor(head).astype(np.float64)
    np.testing.assert_allclose(factor.T @ factor, exact.T @ exact, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([(5, 3), (2, 6)]), st.sampled_from([1, 2, 8]), st.integers(0, 2**16))
def test_ky_fan_properties(shape, k, seed):
    matrix = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    ky_fan = jax.jit(linalg.top_k_singular_sum, static_argnums=1)
    top = float(ky_fan(jnp.asarray(matrix), k))
    nuclear = float(jax.jit(nuclear_norm)(jnp.asarray(matrix)))
    frobenius = float(jax.jit(linalg.frobenius_norm)(jnp.asarray(matrix)))
    assert top <= nuclear * (1 + 1e-5)
    assert top <= np.sqrt(k) * frobenius * (1 + 1e-5)
    flipped = float(ky_fan(jnp.asarray(matrix[::-1].copy()), k))
    np.testing.assert_allclose(flipped, top, rtol=1e-5)


def message(call):
    with pytest.raises(InputError) as error:
        call()
    return str(error.value)


def test_messages(type_checks_off):
    square = jnp.eye(3)
    assert message(lambda: linalg.singular_values(square, 0)) == (
        "singular values: expected k of at least 1, got 0. Raise k."
    )
    assert message(lambda: linalg.singular_values(square, 1, method="fast")) == (
        "singular values: expected method auto, exact or iterative, got 'fast'. "
        "Choose one of the three."
    )
    assert message(lambda: linalg.truncated_svd(square, 4)) == (
        "truncated_svd: expected a matrix and a rank between 1 and its shorter side, got shape "
        "(3, 3) and rank 4. Lower the rank."
    )
    assert message(lambda: linalg.randomized_svd(square, 2, -1, jax.random.key(0))) == (
        "randomized_svd: expected n_iter of at least 0, got -1. Raise it."
    )
    assert message(lambda: linalg.randomized_svd(square, 0, 1, jax.random.key(0))).startswith(
        "randomized_svd: expected a matrix and a rank between 1"
    )
    assert message(lambda: linalg.top_k_svd(square, 4)) == (
        "top_k_svd: expected k between 1 and 3 for shape (3, 3), got 4. Change k."
    )
    assert message(lambda: linalg.top_k_svd(square, 2, cycles=0)) == (
        "top_k_svd: expected cycles of at least 1, got 0. Raise them."
    )
    assert message(lambda: linalg.head_factor(np.array([[np.nan, 1.0]]))) == (
        "head_factor: expected a head of finite numbers, got NaN or infinity. Check the weights."
    )


def test_shape_messages(type_checks_off):
    assert message(lambda: linalg.singular_values(jnp.ones(3), 1)) == (
        "singular values: expected a matrix, got shape (3,). Flatten it to rows first."
    )
    assert message(lambda: linalg.head_factor(np.ones(3))) == (
        "head_factor: expected a head of shape [V, D], got (3,). Pass lm_head's weight."
    )


@pytest.mark.parametrize("center", [False, True])
def test_head_factor_in_blocks_is_that_of_the_whole_head(center):
    rng = np.random.default_rng(0)
    head = (1.0 + rng.standard_normal((20_000, 6))).astype(np.float32)
    asked = []

    def rows(first, count):
        asked.append((first, count))
        return head[first : first + count]

    found = linalg.head_factor_of_rows(rows, head.shape, center=center)
    once = [(0, 8192), (8192, 8192), (16384, 20_000 - 16384)]
    assert asked == once * (2 if center else 1)
    whole = np.float64(head)
    whole = whole - whole.mean(0) if center else whole
    np.testing.assert_allclose(found.T @ found, whole.T @ whole, rtol=1e-5, atol=1e-2)
    want = np.linalg.cholesky(whole.T @ whole).T
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-4)
    assert np.array_equal(found, linalg.head_factor(head, center=center))
