"""The whole BA-LoRA loss and its gradient against torch: PEFT's own PiSSA model, in float64.

Nothing is shared with the package: the student is ``peft``'s model, the teacher the untouched
checkpoint, the terms are written here from their definitions.
"""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from balora_jax.models.adapters import adapter_shapes, plan_adapters
from balora_jax.models.families.base import weight_rules
from balora_jax.models.starts import STARTS
from balora_jax.models.starts.stacks import start_adapters
from balora_jax.models.structure import structure
from balora_jax.models.weight_names import linear_shapes
from balora_jax.numerics import linalg
from balora_jax.numerics.objective import objective_of
from balora_jax.tasks.text import loss as text_loss
from tests.models import tiny
from tests.models.tiny_families import FAMILIES

RANK, ALPHA = 3, 5.0
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAMBDAS = (0.7, 0.3, 0.4)
# Two packed examples, and one example with padding; below, the tokens to be predicted.
SEGMENTS = np.array([[1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]])
MARKED = np.array([[0, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0]])
POSITIONS = np.array([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7, 0, 0, 0]])

CASES = {
    "iclr2026": {"temperature": 2.0, "top_k": 20, "norm": "frobenius", "alignment": "shifted"},
    "arxiv_v1": {"temperature": 1.0, "top_k": 0, "norm": "nuclear", "alignment": "official"},
}


@pytest.fixture(scope="module")
def ids():
    return np.where(SEGMENTS > 0, np.random.default_rng(3).integers(3, 59, SEGMENTS.shape), 0)


@pytest.fixture(scope="module", params=["llama", "gemma2", "qwen3", "granite"])
def family(request):
    """A builder; of Gemma 2 with caps that bend less, as float32 loses digits where tanh is flat.

    And of Granite with logits large enough that the terms are at work.
    """
    changes = {
        "gemma2": {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 8.0},
        "granite": {"logits_scaling": 0.7},
    }
    return functools.partial(FAMILIES[request.param], **changes.get(request.param, {}))


@pytest.fixture(scope="module")
def ours(family):
    """Structures, frozen weights, PiSSA's start, and trained factors some way off it."""
    plain, frozen = tiny.ours(family())
    config = plain.bind(frozen).config
    modules = plan_adapters(
        linear_shapes(weight_rules(config), plain.frozen),
        rank=RANK,
        alpha=ALPHA,
        target_modules=TARGETS,
    )
    start, origin = jax.jit(
        lambda frozen: start_adapters(modules, frozen, start=STARTS["pissa"], key=jax.random.key(0))
    )(frozen)
    rng = np.random.default_rng(4)
    adapters = {
        path: jnp.asarray(value + 0.1 * rng.standard_normal(value.shape), jnp.float32)
        for path, value in start.items()
    }
    student = structure(config, adapters=adapter_shapes(modules, origin=True))
    head = plain.bind(frozen).head
    capped = config.logit_map.soft_cap is not None
    factor = None if capped else jnp.asarray(linalg.head_factor(np.asarray(head)))
    return plain, student, modules, adapters, text_loss.Constants(frozen, origin, factor)


@pytest.fixture(scope="module")
def torch_models(ours, family):
    """PEFT's PiSSA model holding our trained factors, and the checkpoint.

    Its residual is W less our start, in float64. PEFT's own is that of another float32
    decomposition, which makes it another function: the gradients of the two differ more than
    rounding explains.
    """
    _, _, modules, adapters, constants = ours
    options = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights="pissa"
    )
    student, teacher = get_peft_model(family(), options).double(), family().double()
    layers = dict(student.base_model.model.named_modules())
    weights = {name: parameter.detach().numpy() for name, parameter in teacher.named_parameters()}
    with torch.no_grad():
        for module in modules:
            start = [constants.origin[f"{module.path}.origin_{side}"] for side in "ab"]
            a, b = (np.asarray(factors[module.layer], np.float64) for factors in start)
            weight = weights[f"{module.name}.weight"]
            residual = weight - ALPHA / RANK * (a @ b).T
            base = layers[module.name].base_layer.weight
            distance = np.linalg.norm(residual - base.numpy(), 2)
            assert distance < accuracy_of_the_start(weight), module.name
            base.copy_(torch.tensor(residual))
            for side in "AB":
                value = adapters[f"{module.path}.lora_{side.lower()}"][module.layer]
                weight = getattr(layers[module.name], f"lora_{side}")["default"].weight
                weight.copy_(torch.tensor(np.asarray(value).T))
    return student, teacher


def accuracy_of_the_start(weight):
    """How far apart the best approximations of W may lie by two float32 decompositions.

    Each is exact for some W + E with ‖E‖ ≤ n ε σ1, and E turns the leading singular vectors by up
    to ‖E‖ / (σr − σr+1).
    """
    values = np.linalg.svd(weight, compute_uv=False)
    error = max(weight.shape) * np.finfo(np.float32).eps * values[0]
    return 2 * error * (1 + 2 * values[0] / (values[RANK - 1] - values[RANK]))


def torch_loss(models, ids, temperature, top_k, norm, alignment, k):
    """Loss and terms over segments that are run one by one, so that no mask is needed."""
    student, teacher = models
    task, kept, teacher_kept = [], [], []
    for row, segment in ((0, 1), (0, 2), (1, 1)):
        here = SEGMENTS[row] == segment
        tokens, marked = torch.tensor(ids[row][here]), torch.tensor(MARKED[row][here] == 1)
        logits = student(input_ids=tokens[None]).logits[0]
        with torch.no_grad():
            reference = teacher(input_ids=tokens[None]).logits[0]
        predicts = torch.cat([marked[1:], torch.tensor([False])])
        task.append(
            torch.nn.functional.cross_entropy(
                logits[predicts], tokens.roll(-1)[predicts], reduction="none"
            )
        )
        counted = marked if alignment == "official" else predicts
        kept.append(logits[counted])
        teacher_kept.append(reference[counted])
    z, z_teacher = torch.cat(kept), torch.cat(teacher_kept)
    p, log_q = (z_teacher / temperature).softmax(-1), (z / temperature).log_softmax(-1)
    consistency = temperature**2 * (p * (p.log() - log_q)).sum(-1).mean()
    leading = z if top_k == 0 else z.topk(top_k).values
    diversity = (leading.softmax(-1) * leading.log_softmax(-1)).sum(-1).mean()
    sigma = torch.linalg.svdvals(z)
    size = sigma.sum() if norm == "nuclear" else (z**2).sum().sqrt()
    spectral = -sigma[:k].sum() / size
    parts = {
        "task_loss": torch.cat(task).mean(),
        "consistency": consistency,
        "diversity": diversity,
        "spectral": spectral,
    }
    terms = sum(scale * parts[name] for scale, name in zip(LAMBDAS, list(parts)[1:], strict=True))
    return parts["task_loss"] + terms, parts, z.shape[0]


@pytest.mark.parametrize("variant", CASES)
def test_loss_and_gradient_of_every_factor(variant, ours, torch_models, ids):
    plain, student, modules, adapters, constants = ours
    case, k = CASES[variant], 4
    if case["norm"] == "nuclear" and constants.head_factor is None:
        pytest.skip("a nuclear ratio of capped logits is refused")
    weights = dict(zip(("consistency", "diversity", "spectral"), LAMBDAS, strict=True))
    how = {"variant": variant, "k": k, "mask_alignment": case["alignment"]}
    objective = objective_of(weights | how)
    loss_of = text_loss.TextLoss(student, plain, objective, text_loss.HeadPlan("fused", 5))
    batch = {
        "input_ids": ids,
        "positions": POSITIONS,
        "segment_ids": SEGMENTS,
        "loss_mask": MARKED,
    }
    batch = {name: jnp.asarray(value, jnp.int32) for name, value in batch.items()}
    counts = text_loss.counts_of({n: v[None] for n, v in batch.items()}, case["alignment"])
    weights = {name: jnp.float32(value) for name, value in weights.items()}

    @jax.jit
    def measure(adapters, constants, batch):
        both = jax.value_and_grad(loss_of, has_aux=True)
        return both(adapters, constants, batch, counts, weights, None)

    (loss, parts), grads = measure(adapters, constants, batch)

    torch_models[0].zero_grad()
    want, want_parts, rows = torch_loss(torch_models, ids, **case, k=k)
    want.backward()
    assert rows < 24  # fewer rows than the width, so that no singular value is zero
    assert float(loss) == pytest.approx(want.item(), rel=1e-5)
    for name, value in want_parts.items():
        assert abs(value.item()) > 1e-2
        assert float(parts[name]) == pytest.approx(value.item(), rel=1e-5), name

    # What float32 loses in torch is the yardstick: the order of sums is another, so not the same.
    expected = gradients(torch_models[0], modules)
    in_float32 = [copy.deepcopy(model).float() for model in torch_models]
    in_float32[0].zero_grad()
    torch_loss(in_float32, ids, **case, k=k)[0].backward()
    rounding = max(errors(gradients(in_float32[0], modules), expected).values())
    assert 1e-7 < rounding < 1e-5
    got = {
        (module.name, side): np.asarray(
            grads[f"{module.path}.lora_{side.lower()}"][module.layer], np.float64
        )
        for module in modules
        for side in "AB"
    }
    for place, error in errors(got, expected).items():
        assert np.abs(expected[place]).max() > 1e-5
        assert error < 4 * rounding, place


def gradients(model, modules):
    """[layer, side] → gradient of a factor of PEFT's model, in our orientation."""
    layers = dict(model.base_model.model.named_modules())
    return {
        (module.name, side): getattr(layers[module.name], f"lora_{side}")["default"]
        .weight.grad.numpy()
        .T.astype(np.float64)
        for module in modules
        for side in "AB"
    }


def errors(found, expected):
    """Largest error of each factor's gradient, as a share of its largest entry."""
    return {
        place: np.abs(found[place] - value).max() / np.abs(value).max()
        for place, value in expected.items()
    }


def test_the_regularizers_are_a_real_part_of_that_gradient(ours, torch_models, ids):
    """Else the comparison would also hold for code that forgets them."""
    student = torch_models[0]
    norms = {}
    for name in ("task_loss", "consistency", "diversity", "spectral"):
        student.zero_grad()
        torch_loss(torch_models, ids, **CASES["iclr2026"], k=4)[1][name].backward()
        found = [p.grad for p in student.parameters() if p.grad is not None]
        norms[name] = torch.sqrt(sum((g**2).sum() for g in found)).item()
    for scale, name in zip(LAMBDAS, list(norms)[1:], strict=True):
        assert scale * norms[name] > 1e-2 * norms["task_loss"], norms
