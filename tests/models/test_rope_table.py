"""Rope settings × families × vintages of config.json against transformers' logits.

A part of the table by default, all of it with ``BALORA_ROPE_TABLE=all``.
"""

import copy
import functools
import os

import numpy as np
import pytest
import torch
import transformers as hf
from huggingface_hub.errors import StrictDataclassError

from balora_jax.errors import InputError
from balora_jax.models.families.base import read_config
from balora_jax.models.structure import structure
from tests.models import tiny

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 24,
}
OWN = {
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {
        "head_dim": 8,
        "moe_intermediate_size": 8,
        "num_experts": 2,
        "num_experts_per_tok": 2,
    },
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 5, "sliding_window_pattern": 2},
    "mixtral": {"head_dim": 8, "num_local_experts": 2},
    "phi3": {"pad_token_id": 0},
    "smollm3": {"no_rope_layer_interval": 2, "pad_token_id": 0},
}
FAMILIES = (
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"),
    *("olmo2", "qwen3_moe", "smollm3", "granite"),
)
KINDS = {
    "default": {},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 2.5},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.5, "high_freq_factor": 3.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 8},
    "longrope": {
        "short_factor": [1.0, 1.3, 1.5, 2.0], "long_factor": [2.0, 5.0, 6.0, 9.0],
        "original_max_position_embeddings": 12,
    },
}  # fmt: skip
# Of one kind each, beyond what every family is asked.
OPTIONS = {
    "yarn, all its options": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8,
        "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.4,
        "truncate": False,
    },
    "yarn, a temperature": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8,
        "attention_factor": 0.8,
    },
    "longrope, its factor": {**KINDS["longrope"], "rope_type": "longrope", "factor": 7.0},
    "longrope, a temperature": {
        **KINDS["longrope"], "rope_type": "longrope", "attention_factor": 1.4
    },
    "two names": {"rope_type": "linear", "type": "dynamic", "factor": 3.0},
    "a base": {"rope_type": "linear", "factor": 3.0, "rope_theta": 70.0},
    "half of a head": {"rope_type": "default", "partial_rotary_factor": 0.5},
    "half of a head, scaled": {
        "rope_type": "linear", "factor": 3.0, "partial_rotary_factor": 0.5
    },
    "unknown": {"rope_type": "stretched", "factor": 3.0},
}  # fmt: skip
WITH_OPTIONS = ("llama", "phi3", "gemma3_text")
FAILURES = (KeyError, ValueError, TypeError, RuntimeError, AttributeError)
THETA = {"rope_theta": 700.0}
SAVED = {"rope_parameters": {"rope_type": "default", "rope_theta": 3e3}}
YARN = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 3e3, **KINDS["yarn"]}}


def vintages(said):
    """The config.json of one setting as it was written over the years, or added by hand."""
    theta = {"rope_theta": said["rope_theta"]} if "rope_theta" in said else THETA
    kind = said["rope_type"]
    bare = {key: value for key, value in said.items() if key not in ("rope_type", "rope_theta")}
    return {
        "parameters": {"rope_parameters": {**theta, **said}},
        "scaling": {**theta, "rope_scaling": dict(said)},
        "first scaling": {**theta, "rope_scaling": {"type": kind, **bare}},
        "scaling by hand": {**SAVED, "rope_scaling": dict(said)},
        "scaling and base by hand": {**SAVED, **theta, "rope_scaling": dict(said)},
        "scaling over a scaling": {**YARN, "rope_scaling": dict(said)},
        "parameters, empty scaling": {"rope_parameters": {**theta, **said}, "rope_scaling": {}},
        "length outside": {**theta, "rope_scaling": dict(said), ORIGINAL: 10},
        "share outside": {**theta, "rope_scaling": dict(said), "partial_rotary_factor": 0.5},
    }


ORIGINAL = "original_max_position_embeddings"


def gemma3_vintages(said):
    """The same for a family with a set for each kind of layer."""
    local = {"rope_type": "default", "rope_theta": 30.0}
    nested = {"full_attention": {**THETA, **said}, "sliding_attention": local}
    saved = {"rope_parameters": {"full_attention": SAVED["rope_parameters"], "sliding_attention": local}}  # fmt: skip
    flat = vintages(said)
    return {
        "parameters": {"rope_parameters": nested},
        "scaling": {**flat["scaling"], "rope_local_base_freq": 30.0},
        "first scaling": flat["first scaling"],
        "scaling by hand": {**saved, "rope_scaling": dict(said)},
        "scaling and base by hand": {**saved, **THETA, "rope_scaling": dict(said)},
        "full alone": {"rope_parameters": {"full_attention": dict(said)}, **THETA},
        "local alone": {"rope_parameters": {"sliding_attention": {**said, **THETA}}},
        "local scaled": {"rope_parameters": {"full_attention": local, "sliding_attention": said}},
        "length outside": flat["length outside"],
    }


def rows():
    for family in FAMILIES:
        made = gemma3_vintages if family == "gemma3_text" else vintages
        settings = {kind: {"rope_type": kind, **own} for kind, own in KINDS.items()}
        settings |= OPTIONS if family in WITH_OPTIONS else {}
        for name, said in settings.items():
            for vintage, raw in made(said).items():
                yield family, name, vintage, raw


ALL = {f"{family}, {name}, {vintage}": (family, raw) for family, name, vintage, raw in rows()}


def default():
    """One row of each family and one of each option; kinds and vintages take turns."""
    kinds, vintage = list(KINDS), list(vintages({"rope_type": "default"}))
    pairs = [(family, kinds[(i + 3) % len(kinds)]) for i, family in enumerate(FAMILIES)]
    pairs += [(WITH_OPTIONS[i % 3], name) for i, name in enumerate(OPTIONS)]
    for i, (family, name) in enumerate(pairs):
        written = [f"{family}, {name}, {one}" for one in vintage]
        there = [case for case in written if case in ALL]
        yield there[(i + 1) % len(there)]


CASES = ALL if os.environ.get("BALORA_ROPE_TABLE") == "all" else list(default())
IDS = np.random.default_rng(0).integers(1, 32, (1, 30))


@pytest.fixture(scope="module")
def models():
    """From a family to its torch model, made once, and from our config of it to our logits."""

    @functools.cache
    def model(family):
        config = hf.AutoConfig.for_model(family, **SIZES, **OWN.get(family, {}))
        config._attn_implementation = "eager"
        torch_model = tiny.randomised(hf.AutoModelForCausalLM.from_config(config))
        weights = tiny.ours(torch_model)[1]
        # Many vintages are one config.
        ours = functools.cache(lambda config: tiny.logits(structure(config), weights, IDS))
        return torch_model, ours

    return model


def wanted(model, family, raw):
    """Logits of the same weights under another config; None where transformers fails."""
    base = model.model
    try:
        config = hf.AutoConfig.for_model(family, **SIZES, **OWN.get(family, {}), **raw)
        base.rotary_emb = type(base.rotary_emb)(config)
        with torch.no_grad():
            return model(torch.tensor(IDS)).logits.numpy()
    except (*FAILURES, StrictDataclassError):
        return None


@pytest.mark.parametrize("case", CASES)
def test_logits_under_these_settings_equal_transformers(models, case):
    family, raw = ALL[case]
    model, ours = models(family)
    want = wanted(model, family, copy.deepcopy(raw))
    config = {"model_type": family, **SIZES, **OWN.get(family, {}), **raw}
    if want is None:
        with pytest.raises(InputError):
            read_config(config, "config.json")
        return
    error = tiny.relative_error(ours(read_config(config, "config.json")), want)
    assert error < 1e-4
