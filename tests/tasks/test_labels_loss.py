"""The loss on labels and its gradient against torch in float64, written from the definitions.

The student is ``transformers``' model with W + s·(A B − A₀ B₀) in place of every adapted weight,
the teacher the same model with W and with the head as it was.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional

from balora_jax.models.adapters import adapter_shapes, plan_adapters
from balora_jax.models.families.base import weight_rules
from balora_jax.models.starts import STARTS
from balora_jax.models.starts.stacks import start_adapters
from balora_jax.models.structure import structure
from balora_jax.models.weight_names import linear_shapes
from balora_jax.numerics.objective import objective_of
from balora_jax.numerics.terms.consistency import consistency_form
from balora_jax.tasks.labels import loss as labels_loss
from balora_jax.tasks.labels.loss import TEACHER, Constants, LabelsLoss
from tests.models import tiny_encoders as tiny

RANK, ALPHA = 3, 5.0
LAMBDAS = (0.7, 0.3, 0.4)
LENGTHS = np.array([[7, 5, 9, 6, 3], [4, 9, 8, 2, 9]])  # two micro-batches of five rows
HEADS = {
    "bert": {"head.dense": "bert.pooler.dense", "head.out": "classifier"},
    "deberta": {"head.dense": "pooler.dense", "head.out": "classifier"},
}
TARGETS = {"bert": ["query", "output.dense"], "deberta": ["query_proj", "output.dense"]}
SETTINGS = {
    "kl, nuclear": {"norm": "nuclear", "k": 1},
    "normalized_mse": {"variant": "arxiv_v1", "k": 2},
    "adaptive": {
        "norm": "nuclear",
        "k": 1,
        "consistency_schedule": "adaptive",
        "adaptive_min": 0.2,
        "adaptive_max": 0.9,
    },
    "frobenius, centred": {"norm": "frobenius", "k": 1, "center_rows": True, "temperature": 3.0},
    "regression": {},
}
CASES = [
    *(("bert", name) for name in SETTINGS),
    ("deberta", "kl, nuclear"),
]


@cache
def models(family, outputs):
    """Of a family: the torch model, its names, our structures and arrays some way off the start."""
    model = getattr(tiny, family)(num_labels=outputs, num_hidden_layers=2)
    with torch.no_grad():
        model.classifier.weight.mul_(3.0)  # so that no softmax is flat
    plain, weights = tiny.ours(model)
    config = tiny.config_of(model)
    head = {path: value for path, value in weights.items() if path.startswith("head.")}
    frozen = {path: value for path, value in weights.items() if path not in head}
    linears = linear_shapes(weight_rules(config), plain.frozen)
    modules = plan_adapters(linears, rank=RANK, alpha=ALPHA, target_modules=TARGETS[family])
    begin, origin = start_adapters(modules, frozen, start=STARTS["pissa"], key=jax.random.key(0))
    rng = np.random.default_rng(4)
    trainable = {
        path: jnp.asarray(value + 0.1 * rng.standard_normal(value.shape), jnp.float32)
        for path, value in {**begin, **head}.items()
    }
    student = structure(config, adapters=adapter_shapes(modules, origin=True))
    return model.double(), modules, plain, student, trainable, Constants(frozen, origin, head)


@cache
def batches(outputs):
    """Arrays [2, 5, 9] of random rows padded on the right."""
    rng = np.random.default_rng(5)
    mask = (np.arange(9) < LENGTHS[..., None]).astype(np.int32)
    labels = rng.integers(0, outputs, LENGTHS.shape).astype(np.int32)
    if outputs == 1:
        labels = (5 * rng.random(LENGTHS.shape)).astype(np.float32)
    return {
        "input_ids": np.where(mask == 1, rng.integers(3, 61, mask.shape), 2).astype(np.int32),
        "attention_mask": mask,
        "token_type_ids": (rng.integers(0, 2, mask.shape) * mask).astype(np.int32),
        "labels": labels,
    }


def micro_batch(outputs, index):
    return {name: jnp.asarray(value[index]) for name, value in batches(outputs).items()}


def torch_leaves(family, outputs):
    """Our trainable arrays as float64 leaves, and the student's weights made of them by name."""
    _, modules, _, _, trainable, constants = models(family, outputs)
    leaves = {
        path: torch.tensor(np.asarray(value, np.float64), requires_grad=True)
        for path, value in trainable.items()
    }
    tuned = {}
    for module in modules:
        a, b = (leaves[f"{module.path}.lora_{side}"][module.layer] for side in "ab")
        a0, b0 = (
            torch.tensor(np.asarray(constants.origin[f"{module.path}.origin_{side}"], np.float64))
            for side in "ab"
        )
        weight = np.asarray(constants.frozen[f"{module.path}.kernel"][module.layer], np.float64)
        delta = (ALPHA / RANK) * (a @ b - a0[module.layer] @ b0[module.layer])
        tuned[f"{module.name}.weight"] = (torch.tensor(weight) + delta).T
    for path, name in HEADS[family].items():
        tuned[f"{name}.weight"] = leaves[f"{path}.kernel"].T
        tuned[f"{name}.bias"] = leaves[f"{path}.bias"]
    return leaves, tuned


def torch_logits(family, outputs, index, tuned=None):
    names = ("input_ids", "attention_mask", "token_type_ids")
    arrays = {name: torch.tensor(batches(outputs)[name][index]).long() for name in names}
    if family == "deberta":  # it was made without token types
        arrays.pop("token_type_ids")
    model = models(family, outputs)[0]
    return torch.func.functional_call(model, tuned or {}, (), arrays).logits


def torch_terms(z, z_teacher, outputs, settings):
    """The three terms of one micro-batch and its λ1."""
    t = settings.get("temperature", 2.0)
    lambda1 = torch.tensor(LAMBDAS[0], dtype=torch.float64)
    zero = torch.zeros((), dtype=torch.float64)
    if outputs == 1:
        return ((z - z_teacher) ** 2).mean(), zero, zero, lambda1
    p, log_q = (z_teacher / t).softmax(-1), (z / t).log_softmax(-1)
    consistency = t**2 * (p * (p.log() - log_q)).sum(-1).mean()
    if settings.get("variant") == "arxiv_v1":
        unit = [x / (x**2).sum(-1, keepdim=True).sqrt() for x in (z, z_teacher)]
        consistency = ((unit[0] - unit[1]) ** 2).mean()
    if settings.get("consistency_schedule") == "adaptive":
        entropy = -(p * p.log()).sum(-1).mean() / np.log(outputs)
        lambda1 = 0.2 + (0.9 - 0.2) * (1 - entropy)
    covariance = torch.cov(z.T)
    off_diagonal = (covariance**2).sum() - (covariance.diagonal() ** 2).sum()
    rows = z - z.mean(-1, keepdim=True) if settings.get("center_rows") else z
    sigma = torch.linalg.svdvals(rows)
    size = sigma.sum() if settings.get("norm", "nuclear") == "nuclear" else (rows**2).sum().sqrt()
    return consistency, off_diagonal / outputs, -sigma[: settings["k"]].sum() / size, lambda1


def torch_loss(family, outputs, settings):
    """Loss of the step of two micro-batches, its parts, and the leaves with their gradients."""
    leaves, tuned = torch_leaves(family, outputs)
    labels = batches(outputs)["labels"]
    parts = dict.fromkeys(("task_loss", "consistency", "diversity", "spectral", "lambda1"), 0.0)
    total = 0.0
    for index in (0, 1):
        z = torch_logits(family, outputs, index, tuned)
        z_teacher = torch_logits(family, outputs, index).detach()
        if outputs == 1:
            task = ((z[:, 0] - torch.tensor(labels[index])) ** 2).mean()
        else:
            task = functional.cross_entropy(z, torch.tensor(labels[index]).long())
        *terms, lambda1 = torch_terms(z, z_teacher, outputs, settings)
        scaled = [s * term for s, term in zip((lambda1, *LAMBDAS[1:]), terms, strict=True)]
        total = total + (task + sum(scaled)) / 2
        for name, value in zip(parts, (task, *terms, lambda1), strict=True):
            parts[name] += value.item() / 2
    total.backward()
    return total.item(), parts, leaves


def our_loss(family, outputs, settings):
    """The same by two calls whose results add up."""
    _, _, plain, student, trainable, constants = models(family, outputs)
    on = LAMBDAS if outputs > 1 else (LAMBDAS[0], 0.0, 0.0)
    names = ("consistency", "diversity", "spectral")
    objective = objective_of(dict(zip(names, on, strict=True)) | settings, labels=True)
    loss_of = LabelsLoss(student, plain, objective, outputs)
    counts = labels_loss.counts_of({k: jnp.asarray(v) for k, v in batches(outputs).items()})
    assert (float(counts.task), float(counts.tokens), counts.micro_batches) == (
        10, LENGTHS.sum(), 2,
    )  # fmt: skip
    weights = {n: jnp.float32(value) for n, value in zip(names, LAMBDAS, strict=True)}

    @jax.jit
    def measure(trainable, constants, batch):
        both = jax.value_and_grad(loss_of, has_aux=True)
        return both(trainable, constants, batch, counts, weights, None)

    found = []
    for index in (0, 1):
        found.append(measure(trainable, constants, micro_batch(outputs, index)))
    return jax.tree.map(jnp.add, *found)


@pytest.mark.parametrize(("family", "case"), CASES)
def test_loss_parts_and_every_gradient(family, case):
    settings, outputs = SETTINGS[case], 1 if case == "regression" else 3
    want, want_parts, leaves = torch_loss(family, outputs, settings)
    (loss, parts), grads = our_loss(family, outputs, settings)
    assert float(loss) == pytest.approx(want, rel=2e-5)
    if "lambda1" not in parts:  # it is the plain weight, which the step logs
        assert want_parts.pop("lambda1") == pytest.approx(LAMBDAS[0])
    assert parts.keys() == want_parts.keys()
    assert ("lambda1" in parts) == (settings.get("consistency_schedule") == "adaptive")
    for name, value in want_parts.items():
        off = outputs == 1 and name in ("diversity", "spectral")
        assert (abs(value) > 1e-3) != off, name
        assert float(parts[name]) == pytest.approx(value, rel=5e-5), name
    assert grads.keys() == leaves.keys()
    largest = max(float(leaf.grad.abs().max()) for leaf in leaves.values())
    for path, leaf in leaves.items():
        right = leaf.grad.numpy()
        # A shift of all keys changes no attention, so a gradient may be zero: not here, all are A, B.
        assert np.abs(right).max() > 1e-6 * largest, path
        error = np.abs(np.asarray(grads[path]) - right).max()
        assert error <= 2e-4 * np.abs(right).max() + 1e-6 * largest, path


def test_logits_that_a_batch_brings_take_the_teachers_place():
    """With other logits the terms are those of other logits, and the encoder of the teacher idles."""
    _, _, plain, student, trainable, constants = models("bert", 3)
    objective = objective_of({"consistency": 1.0} | SETTINGS["adaptive"], labels=True)
    loss_of = LabelsLoss(student, plain, objective, 3)
    rng, batch = np.random.default_rng(8), micro_batch(3, 0)
    brought = rng.standard_normal((5, 3))
    batch[TEACHER] = jnp.asarray(brought, jnp.float32)
    nothing = constants._replace(teacher_head={})
    counts = labels_loss.Counts(jnp.float32(5), jnp.float32(30), 1)
    weights = dict.fromkeys(("consistency", "diversity", "spectral"), jnp.float32(1.0))
    measure = jax.jit(lambda *arrays: loss_of(*arrays, counts, weights, None)[1])
    parts = measure(trainable, nothing, batch)
    with torch.no_grad():
        z = torch_logits("bert", 3, 0, torch_leaves("bert", 3)[1])
    want = torch_terms(z, torch.tensor(brought), 3, SETTINGS["adaptive"])
    assert float(parts["consistency"]) == pytest.approx(want[0].item(), rel=2e-5)
    assert float(parts["lambda1"]) == pytest.approx(want[3].item(), rel=2e-5)


def test_the_teacher_is_absent_without_its_term():
    _, _, plain, student, trainable, constants = models("bert", 3)
    objective = objective_of({"diversity": 1.0, "spectral": 1.0, "k": 1}, labels=True)
    loss_of = LabelsLoss(student, plain, objective, 3)
    counts = labels_loss.Counts(jnp.float32(5), jnp.float32(30), 1)
    weights = dict.fromkeys(("consistency", "diversity", "spectral"), jnp.float32(0.5))
    nothing = constants._replace(teacher_head={})
    _, parts = jax.eval_shape(
        lambda trainable: loss_of(trainable, nothing, micro_batch(3, 0), counts, weights, None),
        trainable,
    )
    assert set(parts) == {"task_loss", "consistency", "diversity", "spectral"}


@pytest.mark.parametrize(
    ("variant", "outputs", "form"),
    [
        ("iclr2026", 2, "kl"),
        ("arxiv_v1", 2, "normalized_mse"),
        ("iclr2026", 1, "mse"),
        ("arxiv_v1", 1, "mse"),
    ],
)
def test_the_form_of_consistency(variant, outputs, form):
    assert consistency_form(variant, outputs) == form
