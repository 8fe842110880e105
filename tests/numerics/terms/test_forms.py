"""Every registered term: its chunk form against its own function, which training calls as well."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balora_jax.numerics import linalg
from balora_jax.numerics.head import head_loss
from balora_jax.numerics.head_types import LINEAR, LogitMap, Rows
from balora_jax.numerics.objective import objective_of
from balora_jax.numerics.terms import TERMS, consistency, diversity, spectral
from balora_jax.training import steps
from tests.training import tiny_loss
from tests.training.tiny_loss import Tiny

N, D, V, SCALE = 9, 5, 31, 1.7
COUNTED = np.array([1, 1, 0, 1, 1, 0, 1, 1, 1], bool)
MAPS = {"linear": LINEAR, "capped": LogitMap(soft_cap=3.0), "scaled": LogitMap(scale=0.4)}
FORMS = [(name, "iclr2026", kind) for name in TERMS for kind in MAPS] + [
    (name, "arxiv_v1", "linear") for name in TERMS
]


@pytest.mark.parametrize(("name", "variant", "kind"), FORMS)
def test_the_fused_head_is_the_terms_own_function(rng, name, variant, kind):
    """Values and gradients of chunks of four rows, and ``jax.grad`` of ``on_tokens``."""
    chosen = objective_of({name: 1.0, "variant": variant, "k": 2}).term_set
    (term,), logit_map = chosen.terms, MAPS[kind]
    student, teacher = jnp.asarray(rng.standard_normal((2, N, D)), jnp.float32)
    table = jnp.asarray(rng.standard_normal((V, D)), jnp.float32)
    mask, nothing = jnp.asarray(COUNTED), jnp.zeros(N, bool)
    rows = Rows(student, teacher, jnp.zeros(N, jnp.int32), nothing, mask)
    scales = {"task_loss": jnp.float32(0), name: jnp.float32(SCALE)}
    factor = jnp.asarray(linalg.head_factor(np.asarray(table)))

    def fused(hidden):
        moved = rows._replace(student=hidden)
        options = {"chunk": 4, "factor": factor, "logit_map": logit_map}
        return head_loss(moved, table, scales, chosen, **options)[0]

    def own(hidden):
        z, z_teacher = (logit_map(h @ table.T) for h in (hidden, teacher))
        value = term.on_tokens(z, z_teacher, mask)
        return SCALE * (value if term.couples_rows else value * COUNTED.sum())

    with jax.default_matmul_precision("highest"):
        (got, by_hidden), (want, expected) = (
            jax.jit(jax.value_and_grad(function))(student) for function in (fused, own)
        )
    assert abs(want) > 0.1
    np.testing.assert_allclose(got, want, rtol=2e-6)
    np.testing.assert_allclose(by_hidden, expected, atol=2e-5 * np.abs(expected).max())


def broken(*_, **__):
    raise AssertionError("called")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (consistency, "consistency_nlg"),
        (diversity, "diversity_nlg"),
        (spectral, "spectral_nlg"),
    ],
)
def test_the_plain_head_trains_by_the_public_function(monkeypatch, module, name):
    term = name.partition("_")[0]
    tiny = Tiny(head="plain", **{term: 0.5}, top_k=5, k=2)
    state, batch = tiny.state(), tiny_batch()
    step = jax.jit(lambda *given: steps.train_step(tiny.parts, *given))
    jax.eval_shape(step, state, tiny.constants, batch, jax.random.key(0))
    monkeypatch.setattr(module, name, broken)
    with pytest.raises(AssertionError, match="called"):
        jax.eval_shape(
            lambda *given: steps.train_step(tiny.parts, *given),
            state, tiny.constants, batch, jax.random.key(0),
        )  # fmt: skip


def tiny_batch():
    return {name: jnp.asarray(value) for name, value in tiny_loss.batch(1).items()}


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (consistency, "consistency_nlu"),
        (diversity, "diversity_nlu"),
        (spectral, "spectral_nlu"),
    ],
)
def test_labels_train_by_the_public_function(monkeypatch, module, name):
    term = name.partition("_")[0]
    settings = {term: 0.5, "k": 1}
    grad, arguments = labels_gradient(settings)
    jax.eval_shape(grad, *arguments)
    monkeypatch.setattr(module, name, broken)
    with pytest.raises(AssertionError, match="called"):
        jax.eval_shape(labels_gradient(settings)[0], *arguments)


def labels_gradient(settings):
    """The gradient of the loss of a tiny encoder, and arguments for it."""
    pytest.importorskip("torch")
    from balora_jax.tasks.labels import loss as labels
    from tests.tasks import test_labels_loss as tiny

    _, _, plain, student, trainable, constants = tiny.models("bert", 3)
    objective = objective_of(settings, labels=True)
    loss_of = labels.LabelsLoss(student, plain, objective, 3)
    counts = labels.Counts(jnp.float32(5), jnp.float32(30), 1)
    weights = {one.term.name: jnp.float32(one.weight) for one in objective.weighted}

    def gradient(trainable, constants, batch):
        def loss(trainable):
            return loss_of(trainable, constants, batch, counts, weights, None)[0]

        return jax.grad(loss)(trainable)

    return gradient, (trainable, constants, tiny.micro_batch(3, 0))
