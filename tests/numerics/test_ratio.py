"""The spectral term and its gradient with respect to the hidden states, against exact float64 decompositions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balora_jax.numerics import krylov, linalg, ratio

K = 10


def gaussian(rng, rows, width):
    return rng.standard_normal((rows, width))


def decaying(rng, rows, width, dominance, equal=False):
    """Singular values i^-0.7 with σ1 = dominance · σ10, or with σ2 = σ1 (1 - 1e-7)."""
    values = (1.0 + np.arange(min(rows, width))) ** -0.7
    values[0] = dominance * values[9]
    if equal:
        values[0] = values[1] * (1 + 1e-7)
    u = np.linalg.qr(rng.standard_normal((rows, len(values))))[0]
    v = np.linalg.qr(rng.standard_normal((width, len(values))))[0]
    return 30 * (u * values) @ v.T


CASES = {
    # name: (hidden states [N, D] so that Z = H Wᵀ has this shape and rank, head [V, D])
    "gaussian 38 x 6000": lambda r: (gaussian(r, 38, 64), gaussian(r, 6000, 64)),
    "width 64, 200 x 6000": lambda r: (gaussian(r, 200, 64), gaussian(r, 6000, 64)),
    "width 512, 900 x 32000": lambda r: (gaussian(r, 900, 512), gaussian(r, 32000, 512)),
    "σ1/σ10 = 7": lambda r: (decaying(r, 600, 256, 7), np.eye(256)),
    "σ1/σ10 = 202": lambda r: (decaying(r, 600, 256, 202), np.eye(256)),
    "σ1/σ10 = 2000": lambda r: (decaying(r, 600, 256, 2000), np.eye(256)),
    "σ1 = σ2 to 1e-7": lambda r: (decaying(r, 600, 256, 1, equal=True), np.eye(256)),
}


def exact_gradient(hidden, head, norm):
    """Value, ``d value / d hidden`` and the part of it that is not the norm's, in float64."""
    factor = np.linalg.qr(head, mode="r")
    u, s, vt = np.linalg.svd(hidden @ factor.T, full_matrices=False)
    top = u[:, :K] @ vt[:K]
    if norm == "frobenius":
        size = np.sqrt((s**2).sum())
        inner = (u * s) @ vt / size
    else:
        size = s.sum()
        inner = u @ vt
    ratio = s[:K].sum() / size
    return -ratio, -(top - ratio * inner) @ factor / size


def from_width(hidden, head, norm):
    factor = jnp.asarray(linalg.head_factor(head))

    @jax.jit
    def run(hidden, factor):
        found = ratio.from_width(hidden, factor, K, norm)
        by_norm = found.shrink * jnp.matmul(
            hidden, jnp.matmul(factor.T, factor, precision="highest"), precision="highest"
        )
        return found, found.left @ found.right.T + by_norm

    return run(jnp.asarray(hidden, jnp.float32), factor)


@pytest.mark.parametrize("case", CASES)
def test_gradient_against_exact_decomposition(rng, case):
    hidden, head = CASES[case](rng)
    found, gradient = from_width(hidden, head, "frobenius")
    value, expected = exact_gradient(hidden, head, "frobenius")
    np.testing.assert_allclose(found.value, value, rtol=2e-6)
    gradient = np.asarray(gradient, np.float64)
    error = np.linalg.norm(gradient - expected) / np.linalg.norm(expected)
    cosine = (gradient * expected).sum() / np.linalg.norm(gradient) / np.linalg.norm(expected)
    assert error <= 1e-3, error
    assert cosine >= 0.9999, cosine
    assert 0 <= found.residual < 1e-4


@pytest.mark.parametrize("case", ["gaussian 38 x 6000", "width 64, 200 x 6000", "σ1/σ10 = 202"])
def test_nuclear_gradient_against_exact_decomposition(rng, case):
    hidden, head = CASES[case](rng)
    found, gradient = from_width(hidden, head, "nuclear")
    value, expected = exact_gradient(hidden, head, "nuclear")
    np.testing.assert_allclose(found.value, value, rtol=5e-6)
    assert np.linalg.norm(gradient - expected) <= 1e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("rows", [0, 1, 4, 300])
def test_few_equal_and_zero_rows(rng, rows):
    """Fewer rows than k, equal rows, no rows: finite, and the exact value."""
    hidden = np.zeros((400, 160))
    hidden[:rows] = rng.standard_normal((1, 160))
    found, gradient = from_width(hidden, np.eye(200, 160), "frobenius")
    np.testing.assert_allclose(found.value, -float(rows > 0), atol=1e-5)
    # All rows are one direction: the ratio is constant, whatever its length.
    np.testing.assert_allclose(gradient, 0, atol=1e-5)


def test_the_same_twice(rng):
    hidden, head = CASES["σ1/σ10 = 7"](rng)
    first, second = (from_width(hidden, head, "frobenius")[1] for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("shape", "dominance"), [((90, 700), 20), ((200, 300), 202), ((30, 500), 7), ((500, 30), 7)]
)
def test_from_products_against_exact_decomposition(rng, shape, dominance):
    """Iterated where the matrix is large enough, exact where one side is short."""
    matrix = decaying(rng, *shape, dominance)
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)

    @jax.jit
    def run(z):
        def product(a, b):
            return jnp.matmul(a, b, precision="highest")

        return ratio.from_products(
            lambda x: product(z, x), lambda y: product(z.T, y), jnp.sum(z * z), z.shape, K
        )

    found = run(jnp.asarray(matrix, jnp.float32))
    size = np.sqrt((s**2).sum())
    np.testing.assert_allclose(found.value, -s[:K].sum() / size, rtol=1e-5)
    np.testing.assert_allclose(found.shrink, s[:K].sum() / size**3, rtol=1e-5)
    expected = -u[:, :K] @ vt[:K] / size
    got = np.asarray(found.left, np.float64) @ np.asarray(found.right, np.float64).T
    assert np.linalg.norm(got - expected) <= 2e-3 * np.linalg.norm(expected)


def test_a_flat_spectrum_takes_more_cycles_and_a_steep_one_few(rng):
    def cycles(matrix):
        matrix = jnp.asarray(matrix, jnp.float32)
        start = jax.random.normal(jax.random.key(1), (matrix.shape[1], 16))
        return int(krylov.leading_triplets(krylov.operator_of(matrix), start, K).cycles)

    assert cycles(decaying(rng, 400, 300, 50)) <= 2
    assert cycles(rng.standard_normal((500, 400))) > 2
