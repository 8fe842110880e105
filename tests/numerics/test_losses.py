import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from balora_jax.errors import InputError
from balora_jax.numerics import losses

torch = pytest.importorskip("torch")


def test_cross_entropy_matches_torch_with_gradient(rng):
    logits = rng.standard_normal((7, 5)) * 3
    labels = np.array([0, 4, -100, 2, 2, -100, 1])
    tensor = torch.tensor(logits, requires_grad=True)
    expected = torch.nn.functional.cross_entropy(tensor, torch.tensor(labels), reduction="sum")
    expected.backward()

    def loss(z):
        return losses.cross_entropy(z, jnp.asarray(labels), jnp.asarray(labels != -100))

    (total, count), gradient = jax.value_and_grad(loss, has_aux=True)(
        jnp.asarray(logits, jnp.float32)
    )
    assert total.dtype == count.dtype == jnp.float32
    np.testing.assert_allclose(total, expected.item(), rtol=1e-6)
    assert count == 5
    np.testing.assert_allclose(gradient, tensor.grad.numpy(), atol=1e-6)


def test_cross_entropy_hand_values():
    logits = jnp.log(jnp.array([[0.25, 0.75], [0.5, 0.5]]))
    total, count = losses.cross_entropy(logits, jnp.array([1, 0]), jnp.array([True, True]))
    np.testing.assert_allclose(total, -np.log(0.75) - np.log(0.5), rtol=1e-6)
    assert count == 2


def test_masked_rows_may_hold_anything():
    logits = jnp.array([[1.0, 2.0], [jnp.nan, jnp.inf]])
    mask = jnp.array([True, False])

    def loss(z):
        return losses.cross_entropy(z, jnp.array([0, -100]), mask)[0]

    value, gradient = jax.value_and_grad(loss)(logits)
    np.testing.assert_allclose(value, np.log1p(np.e), rtol=1e-6)
    np.testing.assert_array_equal(gradient[1], 0)
    total, count = losses.cross_entropy(logits, jnp.array([0, 0]), jnp.array([False, False]))
    assert (float(total), float(count)) == (0.0, 0.0)


def test_large_logits_are_exact():
    logits = jnp.array([[1e4, -1e4, 0.0]], jnp.float32)
    rows = [
        float(losses.cross_entropy(logits, jnp.array([i]), jnp.array([True]))[0]) for i in range(3)
    ]
    assert rows == [0.0, 2e4, 1e4]


def test_bfloat16_is_widened(rng):
    logits = jnp.asarray(rng.standard_normal((3, 4)), jnp.bfloat16)
    labels, mask = jnp.array([0, 1, 2]), jnp.ones(3, bool)
    total, _ = losses.cross_entropy(logits, labels, mask)
    assert total.dtype == jnp.float32
    assert total == losses.cross_entropy(logits.astype(jnp.float32), labels, mask)[0]


def test_mean_squared_error_matches_torch_with_gradient(rng):
    predictions, targets = rng.standard_normal((2, 6))
    mask = np.array([True, True, False, True, False, True])
    tensor = torch.tensor(predictions, requires_grad=True)
    expected = torch.nn.functional.mse_loss(
        tensor[torch.tensor(mask)], torch.tensor(targets[mask]), reduction="sum"
    )
    expected.backward()
    spoiled = jnp.asarray(np.where(mask, targets, np.nan), jnp.float32)

    def loss(p):
        return losses.mean_squared_error(p, spoiled, jnp.asarray(mask))

    (total, count), gradient = jax.value_and_grad(loss, has_aux=True)(
        jnp.asarray(predictions, jnp.float32)
    )
    np.testing.assert_allclose(total, expected.item(), rtol=1e-6)
    assert count == 4
    np.testing.assert_allclose(gradient, tensor.grad.numpy(), atol=1e-6)


def test_gradients_match_finite_differences(x64, rng):
    logits = jnp.asarray(rng.standard_normal((4, 5)))
    labels, mask = jnp.array([1, 4, 0, 2]), jnp.array([True, True, False, True])
    check_grads(
        jax.jit(lambda z: losses.cross_entropy(z, labels, mask)[0]),
        (logits,),
        1,
        ["rev"],
        rtol=1e-6,
    )


def test_messages(type_checks_off):
    with pytest.raises(InputError) as error:
        losses.cross_entropy(jnp.ones((2, 3)), jnp.ones(3, int), jnp.ones(2, bool))
    assert str(error.value) == (
        "cross_entropy: expected logits [N, V], labels [N] and mask [N], got "
        "(2, 3), (3,) and (2,). Flatten batch and time first."
    )
    with pytest.raises(InputError) as error:
        losses.mean_squared_error(jnp.ones((2, 1)), jnp.ones(2), jnp.ones(2, bool))
    assert str(error.value) == (
        "mean_squared_error: expected predictions, targets and mask of one shape [N], got "
        "(2, 1), (2,) and (2,). Drop the last axis of a one-column head."
    )
