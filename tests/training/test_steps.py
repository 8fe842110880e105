"""One optimizer step: accumulation, metrics, what is in the program, shares of the gradient."""

import hashlib
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balora_jax.config import MeshConfig
from balora_jax.parallel import sharding
from balora_jax.training import steps
from tests.training import tiny_loss
from tests.training.tiny_loss import LAYERS, Tiny

TERMS = {"consistency": 0.7, "diversity": 0.3, "spectral": 0.4, "top_k": 5, "k": 3}
KEY = jax.random.key(0)


def softmax(logits):
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def entropy(p):
    return -(p * np.log(p)).sum(-1)


def expected_metrics(student, teacher, batch, weights, temperature=2.0):
    """Task loss and terms from [M, B, T, V] logits in float64, straight from the definitions."""
    vocabulary = student.shape[-1]
    task, kl, negative_entropy, spectral, lambdas = [], [], [], [], []
    shares = []  # λ1 · Σ KL of each micro-batch, as λ1 is its own
    for i in range(student.shape[0]):
        rows, teacher_rows = [], []
        for j, t in np.ndindex(student.shape[1], student.shape[2] - 1):
            arrays = {name: value[i, j] for name, value in batch.items()}
            segments = arrays["segment_ids"]
            if arrays["loss_mask"][t + 1] and segments[t] == segments[t + 1]:
                rows.append(student[i, j, t])
                teacher_rows.append(teacher[i, j, t])
                task.append(-np.log(softmax(student[i, j, t])[arrays["input_ids"][t + 1]]))
        p, q = softmax(np.array(teacher_rows) / temperature), softmax(np.array(rows) / temperature)
        divergence = temperature**2 * (p * np.log(p / q)).sum(-1)
        kl.extend(divergence)
        top = np.sort(np.array(rows), axis=-1)[:, -5:]
        negative_entropy.extend(-entropy(softmax(top)))
        sigma = np.linalg.svd(np.array(rows), compute_uv=False)
        spectral.append(-sigma[:3].sum() / np.sqrt((sigma**2).sum()))
        sure = 1 - np.clip(entropy(p).mean() / np.log(vocabulary), 0, 1)
        lambdas.append(0.1 * weights[0] + 0.9 * weights[0] * sure)
        shares.append(lambdas[-1] * divergence.sum())
    values = {
        "task_loss": np.mean(task),
        "consistency": np.mean(kl),
        "diversity": np.mean(negative_entropy),
        "spectral": np.mean(spectral),
        "lambda1": np.mean(lambdas),
        "lambda2": weights[1],
        "lambda3": weights[2],
        "tokens": len(task),
    }
    values["loss"] = (
        values["task_loss"]
        + sum(shares) / len(kl)
        + weights[1] * values["diversity"]
        + weights[2] * values["spectral"]
    )
    return values


@pytest.fixture(scope="module")
def full():
    """All terms, adaptive λ1, schedules; two micro-batches."""
    return Tiny(
        **TERMS,
        consistency_schedule="adaptive",
        diversity_schedule="linear_warmup",
        warmup_fraction=0.5,
        training={"optimizer": "adamw", "warmup": 0.2, "weight_decay": 0.01},
    )


@pytest.fixture(scope="module")
def run(full):
    """Four steps on four batches: the compiled step, adapters before each, metrics, batches."""
    mesh = sharding.make_mesh(MeshConfig())
    layout = sharding.Layout(full.parts.loss.student.axes, mesh)
    # Copies: the step is given these arrays for good.
    adapters = layout.placed({path: jnp.array(value) for path, value in full.adapters.items()})
    frozen = {path: digest(value) for path, value in full.constants.frozen.items()}
    state = steps.initial_state(adapters, full.parts.optimizer, mesh)
    step = steps.compile_step(full.parts, state, mesh)
    history, metrics, batches = [], [], []
    for seed in range(4):
        batches.append(tiny_loss.batch(2, seed=seed))
        history.append({path: np.array(value) for path, value in state.adapters.items()})
        placed = steps.place_batch(batches[-1], mesh)
        state, found = step(state, full.constants, placed, KEY)
        metrics.append({name: float(value) for name, value in found.items()})
    history.append({path: np.array(value) for path, value in state.adapters.items()})
    after = {path: digest(value) for path, value in full.constants.frozen.items()}
    return step, history, metrics, batches, (frozen, after), int(state.step)


def digest(value):
    return hashlib.sha256(np.asarray(value).tobytes()).hexdigest()


def test_one_compilation_for_a_run(run):
    step, _, metrics, _, _, done = run
    assert step._cache_size() == 1
    assert done == len(metrics) == 4


def test_frozen_weights_are_bit_identical_after_training(run):
    before, after = run[4]
    assert before == after
    for path, first in run[1][0].items():
        assert (run[1][-1][path] != first).any(), path


def test_metrics_equal_numpy(full, run):
    _, history, metrics, batches, _, _ = run

    @jax.jit
    def logits(adapters, constants, batch):
        arrays = [batch[k].reshape(4, -1) for k in ("input_ids", "positions", "segment_ids")]
        student = full.student.bind(constants.frozen, constants.origin, adapters)
        teacher = full.plain.bind(constants.frozen)
        return tuple(module.logits(module.hidden(*arrays)) for module in (student, teacher))

    for i in (0, 3):
        student, teacher = (
            np.float64(z).reshape(2, 2, 10, -1)
            for z in logits(history[i], full.constants, batches[i])
        )
        # Ten steps: λ2 rises over five, λ3 is constant, the learning rate warms up over two.
        want = expected_metrics(student, teacher, batches[i], (0.7, 0.3 * i / 5, 0.4))
        want["learning_rate"] = [0.0, 0.0, 0.0, 0.1 * (1 + np.cos(np.pi / 8)) / 2][i]
        for name, value in want.items():
            assert metrics[i][name] == pytest.approx(value, rel=2e-5, abs=1e-7), name
        rest = {"grad_norm", "spectral_residual", "skipped", "skipped_in_a_row"}
        assert set(metrics[i]) == {*want, *rest}
        assert 0.07 < want["lambda1"] < 0.7
        assert want["consistency"] > 1e-3


def test_a_learning_rate_of_zero_moves_nothing(run):
    """The first step of a warm-up from 0."""
    history = run[1]
    assert all(np.array_equal(history[0][path], history[1][path]) for path in history[0])


def test_accumulation_does_not_change_the_step():
    """One global token count: 1, 2 and 4 micro-batches give one loss, gradient and update."""
    tiny = Tiny(**{**TERMS, "spectral": 0.0}, training={"clip_norm": None})
    step = jax.jit(partial(steps.train_step, tiny.parts))
    results = [step(tiny.state(), tiny.constants, tiny_loss.batch(n), KEY) for n in (1, 2, 4)]
    (state, metrics), *others = results
    assert float(metrics["consistency"]) > 1e-3
    for other, found in others:
        for name in ("loss", "task_loss", "consistency", "diversity", "grad_norm", "tokens"):
            assert float(found[name]) == pytest.approx(float(metrics[name]), rel=1e-5), name
        assert float(found["lambda1"]) == pytest.approx(0.7)
        for path, value in state.adapters.items():
            moved = np.abs(value - tiny.adapters[path]).max()
            assert moved > 1e-4
            np.testing.assert_allclose(other.adapters[path], value, atol=1e-5 * moved, err_msg=path)


def primitives(tiny):
    """How often each operation is in the traced step; scans are counted by their length."""
    counts = Counter()

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            name = equation.primitive.name
            counts[f"scan {equation.params['length']}" if name == "scan" else name] += 1
            for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
                if is_jaxpr(value):
                    walk(getattr(value, "jaxpr", value))

    def is_jaxpr(value):
        return hasattr(value, "eqns") or hasattr(value, "jaxpr")

    step = partial(steps.train_step, tiny.parts)
    batch = {name: jnp.asarray(value) for name, value in tiny_loss.batch(1).items()}
    walk(jax.make_jaxpr(step)(tiny.state(), tiny.constants, batch, KEY).jaxpr)
    return counts


@pytest.fixture(scope="module")
def programs():
    off = {
        "everything": {},
        "no consistency": {"consistency": 0.0},
        "no diversity": {"diversity": 0.0},
        "no spectral": {"spectral": 0.0},
        "task only": {"consistency": 0.0, "diversity": 0.0, "spectral": 0.0},
    }
    return {name: primitives(Tiny(**{**TERMS, **change})) for name, change in off.items()}


DECOMPOSITIONS = ("svd", "qr", "geqrf", "eigh")


def test_a_zero_weight_takes_the_teacher_out_of_the_program(programs):
    """The scan over the layers: student forward, student backward, and the teacher's forward."""
    scans = {name: found[f"scan {LAYERS}"] for name, found in programs.items()}
    assert scans["everything"] == 3
    assert scans["no diversity"] == scans["no spectral"] == 3
    assert scans["no consistency"] == scans["task only"] == 2


def test_a_zero_weight_takes_its_term_out_of_the_program(programs):
    top_k = {name: found["top_k"] > 0 for name, found in programs.items()}
    assert top_k["everything"]
    assert top_k["no spectral"]
    assert not top_k["no diversity"]
    assert not top_k["task only"]
    decomposed = {n: sum(found[p] for p in DECOMPOSITIONS) for n, found in programs.items()}
    assert decomposed["everything"] > 0
    assert decomposed["no diversity"] > 0
    assert decomposed["no spectral"] == decomposed["task only"] == 0
    # The head's products: the teacher's logits are gone as well.
    products = {name: found["dot_general"] for name, found in programs.items()}
    assert products["task only"] < products["no consistency"] <= products["everything"] - 8


def test_random_numbers_are_drawn_for_dropout_only(programs):
    def draws(found):
        return sum(count for name, count in found.items() if name.startswith("random_bits"))

    assert draws(programs["everything"]) == 0
    assert draws(primitives(Tiny(**TERMS, start="lora", dropout=0.1))) > 0


def test_gradient_shares_equal_separate_gradients():
    tiny = Tiny(**TERMS)
    batch = {name: jnp.asarray(value) for name, value in tiny_loss.batch(2).items()}
    measure = jax.jit(steps.gradient_shares(tiny.parts))
    found = measure(tiny.state(), tiny.constants, batch, KEY)
    found = {name: float(value) for name, value in found.items()}
    first = {name: value[0] for name, value in batch.items()}
    counts = tiny.parts.counts({name: value[:1] for name, value in batch.items()})
    scales = {"task_loss": 1.0, "consistency": 0.7, "diversity": 0.3, "spectral": 0.4}
    reference = Tiny(**TERMS, head="plain").parts.loss
    weights = tiny.parts.weights(jnp.int32(0))

    @jax.jit
    @jax.grad
    def gradient(adapters, constants, chosen):
        """By automatic derivatives through all logits, one term at a time."""
        found = reference(adapters, constants, first, counts, weights, None)[1]
        return sum(chosen[name] * found[name] for name in scales)

    norms = {}
    for name, scale in scales.items():
        chosen = {other: jnp.float32(other == name) for other in scales}
        grads = gradient(tiny.adapters, tiny.constants, chosen)
        squares = sum((np.float64(g) ** 2).sum() for g in grads.values())
        norms[name] = scale * np.sqrt(squares)
    for name, norm in norms.items():
        assert norm > 1e-4
        assert found[f"gradient_norm_{name}"] == pytest.approx(norm, rel=5e-5)
        share = norm / sum(norms.values())
        assert found[f"gradient_share_{name}"] == pytest.approx(share, rel=5e-5)
    assert sum(found[f"gradient_share_{name}"] for name in scales) == pytest.approx(1.0, rel=1e-6)
    assert len(found) == 8


def test_consistency_is_exactly_zero_at_the_start():
    """From PiSSA's start the student is the teacher, bit for bit."""
    tiny = Tiny(**{**TERMS, "diversity": 0.0, "spectral": 0.0})
    batch = {name: jnp.asarray(value[0]) for name, value in tiny_loss.batch(1).items()}
    counts = tiny.parts.counts({n: jnp.asarray(v) for n, v in tiny_loss.batch(1).items()})
    weights = tiny.parts.weights(jnp.int32(0))

    @jax.jit
    def consistency(adapters, constants):
        return tiny.parts.loss(adapters, constants, batch, counts, weights, None)[1]["consistency"]

    assert float(consistency(tiny.start, tiny.constants)) == 0.0
    assert float(consistency(tiny.adapters, tiny.constants)) > 1e-3
