"""A checkpoint's config.json to our config: defaults, both styles of rope settings, messages."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from balora_jax.errors import InputError
from balora_jax.models import registry
from balora_jax.models.decoder import structure
from balora_jax.models.layers import RopeConfig
from tests.models import tiny

# What every config.json of these families states; all else has a default.
LEAST = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "max_position_embeddings": 128,
}
# Our field → the field of a transformers config.
FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "activation": "hidden_act",
    "tie_word_embeddings": "tie_word_embeddings",
    "max_length": "max_position_embeddings",
}
CLASSES = {"llama": LlamaConfig, "mistral": MistralConfig}


def read(model_type="llama", without=(), **changes):
    raw = {"model_type": model_type, **LEAST, **changes}
    raw = {key: value for key, value in raw.items() if key not in without}
    return registry.decoder_config(raw, "folder/config.json")


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("llama", {"num_key_value_heads": None, "head_dim": None}),
        ("mistral", {}),
        ("mistral", {"head_dim": None}),
    ],
)
def test_defaults_are_those_of_transformers(model_type, changes):
    ours, theirs = read(model_type, **changes), CLASSES[model_type](**LEAST, **changes)
    for field, name in FIELDS.items():
        assert getattr(ours, field) == getattr(theirs, name), field
    assert ours.model_type == model_type
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    assert ours.attention_bias == getattr(theirs, "attention_bias", False)
    assert ours.mlp_bias == getattr(theirs, "mlp_bias", False)
    assert ours.rope == RopeConfig(theta=theirs.rope_parameters["rope_theta"])


@pytest.mark.parametrize("model", [tiny.llama, tiny.mistral])
def test_every_field_off_its_default(model):
    theirs = model().config
    ours = registry.decoder_config(theirs.to_dict(), "config.json")
    for field, name in FIELDS.items():
        assert getattr(ours, field) == getattr(theirs, name), field
    llama = theirs.model_type == "llama"
    assert (ours.attention_bias, ours.mlp_bias) == (llama, llama)
    assert ours.sliding_window == (None if llama else 5)
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]


def test_mistral_without_a_window():
    assert read("mistral", sliding_window=None).sliding_window is None
    assert read("llama", sliding_window=16).sliding_window is None


ROPES = {
    "default": ({}, RopeConfig(theta=5e5)),
    "linear": ({"factor": 4}, RopeConfig(5e5, "linear", 4.0, 128)),
    "dynamic": (
        {"factor": 2.5, "original_max_position_embeddings": 16},
        RopeConfig(5e5, "dynamic", 2.5, 128),
    ),
    "llama3": (
        {
            "factor": 8.0,
            "low_freq_factor": 1.5,
            "high_freq_factor": 3.0,
            "original_max_position_embeddings": 16,
        },
        RopeConfig(5e5, "llama3", 8.0, 16, 1.5, 3.0),
    ),
    "yarn": (
        {"factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16, "beta_slow": 2},
        RopeConfig(5e5, "yarn", 4.0, 32, 1.0, 4.0, 16.0, 2.0, 1.138629436111989),
    ),
    "yarn with its own temperature": (
        {"factor": 4.0, "attention_factor": 0.8, "truncate": False},
        RopeConfig(5e5, "yarn", 4.0, 128, attention_factor=0.8, truncate=False),
    ),
    "yarn whose factor follows from the lengths": (
        {"original_max_position_embeddings": 32},
        RopeConfig(5e5, "yarn", 4.0, 32, attention_factor=1.138629436111989),
    ),
}


@pytest.mark.parametrize("case", ROPES)
def test_old_and_new_rope_settings_mean_the_same(case):
    options, want = ROPES[case]
    kind = case.split()[0]
    styles = [
        {"rope_parameters": {"rope_type": kind, "rope_theta": 5e5, **options}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": kind, **options}},
        {"rope_theta": 500000, "rope_scaling": {"type": kind, **options}},
    ]
    if kind == "default":
        styles += [{"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": None}]
    for style in styles:
        got = read(**style).rope
        assert got.attention_factor == pytest.approx(want.attention_factor, rel=1e-12)
        assert got == RopeConfig(**{**vars(want), "attention_factor": got.attention_factor})


MESSAGES = {
    "family": (
        {"model_type": "gpt2"},
        "folder/config.json: expected model_type to be one of llama, mistral, got 'gpt2'. "
        "Use a checkpoint of one of these families.",
    ),
    "no family": (
        {"model_type": None},
        "one of llama, mistral, got None",
    ),
    "activation": (
        {"hidden_act": "gelu_new"},
        "folder/config.json: expected hidden_act to be one of silu, gelu, gelu_pytorch_tanh, relu, "
        "got 'gelu_new'. This checkpoint cannot be run exactly.",
    ),
    "rope type": (
        {"rope_scaling": {"type": "longrope", "factor": 2.0}},
        "folder/config.json: expected the rope type to be one of default, linear, dynamic, llama3, "
        "yarn, got 'longrope'. This checkpoint cannot be run exactly.",
    ),
    "rope factor": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
        "folder/config.json: expected a 'factor' in the rope scaling of type 'linear', got none. "
        "Correct the config.",
    ),
    "partial rotation": (
        {"partial_rotary_factor": 0.5},
        "folder/config.json: expected partial_rotary_factor to be 1, got 0.5. "
        "This checkpoint cannot be run exactly.",
    ),
    "partial rotation, new style": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
        "folder/config.json: expected partial_rotary_factor to be 1, got 0.25.",
    ),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_messages(case):
    changes, message = MESSAGES[case]
    with pytest.raises(InputError) as caught:
        read(**changes)
    assert message in str(caught.value)


def test_rope_settings_for_each_kind_of_layer_are_refused():
    nested = {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_theta": 1e4}}
    with pytest.raises(InputError, match=r"one set of rope parameters, got one for each kind"):
        read(rope_parameters=nested)


@pytest.mark.parametrize("key", LEAST)
def test_missing_key(key):
    with pytest.raises(InputError) as caught:
        read(without=(key,))
    assert str(caught.value) == (
        f"folder/config.json: expected the key {key!r}, got none. Use the config.json that was "
        "saved with the weights."
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", CLASSES)
def test_weight_names_and_shapes_are_those_of_the_checkpoint(model_type, tied, bias):
    options = {**LEAST, "tie_word_embeddings": tied, "head_dim": 6, "num_key_value_heads": 4}
    if model_type == "llama":
        options |= {"attention_bias": bias, "mlp_bias": bias}
    model = {"llama": LlamaForCausalLM, "mistral": MistralForCausalLM}[model_type]
    with torch.device("meta"):
        state = model(CLASSES[model_type](**options)).state_dict()
    config = registry.decoder_config({"model_type": model_type, **options}, "config.json")
    frozen = structure(config).frozen
    named = {}
    for rule in registry.weight_rules(config):
        shape = frozen[rule.path].shape
        layers = range(config.num_layers) if rule.stacked else (0,)
        for i in layers:
            one = shape[1:] if rule.stacked else shape
            named[rule.name.format(i=i)] = one[::-1] if rule.transpose else one
        assert not rule.stacked or shape[0] == 2
    stored = {name: tuple(value.shape) for name, value in state.items()}
    if tied:
        stored.pop("lm_head.weight", None)
        assert r"lm_head\.weight" in registry.ignored_weights(config)
    assert named == stored
    assert {rule.path for rule in registry.weight_rules(config)} == set(frozen)
