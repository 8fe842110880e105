"""Every family of decoders against transformers: logits, padding, packing; and what tells them apart."""

import jax
import numpy as np
import pytest
import torch

from tests.models import tiny
from tests.models.test_parity import TOLERANCE, ids_of, torch_logits
from tests.models.tiny_families import (
    FAMILIES,
    gemma2,
    gemma3,
    granite,
    mixtral,
    phi3,
    qwen2,
    qwen3_moe,
    smollm3,
)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    model = FAMILIES[request.param]()
    return request.param, model, *tiny.ours(model)


def test_logits_equal_transformers(family, record_property):
    name, model, skeleton, weights = family
    ids = ids_of(model)
    error = tiny.relative_error(tiny.logits(skeleton, weights, ids), torch_logits(model, ids))
    record_property("parity", f"{name}: {error:.1e}")
    assert error < TOLERANCE


def test_padding_left_and_right_equals_transformers(family):
    _, model, skeleton, weights = family
    ids = ids_of(model, batch=3)
    mask = np.ones_like(ids)
    mask[0, :6], mask[1, -6:] = 0, 0
    ids[mask == 0] = 0
    positions = np.maximum(np.cumsum(mask, axis=-1) - 1, 0)
    with torch.no_grad():
        want = model(
            torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            position_ids=torch.tensor(positions),
        ).logits.numpy()
    got = np.asarray(tiny.logits(skeleton, weights, ids, mask))
    assert np.isfinite(got).all()
    assert tiny.relative_error(got[mask == 1], want[mask == 1]) < TOLERANCE


def test_packed_segments_equal_separate_rows(family):
    name, model, skeleton, weights = family
    lengths = (7, 9, 4)
    ids = ids_of(model, batch=1, length=sum(lengths))
    segments = np.repeat([1, 2, 3], lengths)[None]
    positions = np.concatenate([np.arange(n) for n in lengths])[None]

    @jax.jit
    def forward(weights, *arrays):
        module = skeleton.bind(weights)
        return module.logits(module.hidden(*arrays))

    got = np.asarray(forward(weights, ids, positions, segments))[0]
    ends = np.cumsum(lengths)
    for start, end in zip(ends - lengths, ends, strict=True):
        want = torch_logits(model, ids[:, start:end])[0]
        assert tiny.relative_error(got[start:end], want) < TOLERANCE, name


DEPARTURES = {
    "qwen2 without its windows": (qwen2, {"use_sliding_window": False}),
    "gemma2 without the cap of its scores": (gemma2, {"attn_logit_softcapping": None}),
    "gemma2 without the cap of its logits": (gemma2, {"final_logit_softcapping": None}),
    "gemma2 with another query scale": (gemma2, {"query_pre_attn_scalar": 10}),
    "gemma3 with one kind of layer": (gemma3, {"layer_types": ["full_attention"] * 4}),
    "mixtral with fewer experts taken": (mixtral, {"num_experts_per_tok": 2}),
    "qwen3_moe with shares that sum to one": (qwen3_moe, {"norm_topk_prob": True}),
    "qwen3_moe without its window": (qwen3_moe, {"use_sliding_window": False}),
    "smollm3 with positions everywhere": (smollm3, {"no_rope_layers": [1] * 4}),
    "smollm3 whose layers follow from the interval": (
        smollm3,
        {"no_rope_layers": None, "no_rope_layer_interval": 2, "layer_types": None},
    ),
    "granite with other embeddings": (granite, {"embedding_multiplier": 1.0}),
    "granite with other scores": (granite, {"attention_multiplier": 1.0}),
    "granite with other residuals": (granite, {"residual_multiplier": 1.0}),
    "granite with other logits": (granite, {"logits_scaling": 1.0}),
    "phi3 that turns whole heads": (
        phi3,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 600.0}},
    ),
}


@pytest.mark.parametrize("case", DEPARTURES)
def test_options_change_the_logits_and_are_followed(case):
    """Else parity would also hold for code that ignores the option."""
    family, changes = DEPARTURES[case]
    usual, other = family(), family(**changes)
    ids = ids_of(usual)
    want = torch_logits(other, ids)
    assert tiny.relative_error(torch_logits(usual, ids), want) > 1e-3
    assert tiny.relative_error(tiny.logits(*tiny.ours(other), ids), want) < TOLERANCE


@pytest.mark.parametrize("length", [9, 16, 17, 40])
def test_longrope_within_and_beyond_the_original_context(length):
    model = phi3()
    ids = ids_of(model, length=length)
    got = tiny.logits(*tiny.ours(model), ids)
    assert tiny.relative_error(got, torch_logits(model, ids)) < TOLERANCE
