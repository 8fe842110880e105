"""A checkpoint's config.json to our config: defaults, both styles of rope settings, messages."""

import pytest
from safetensors import safe_open
from transformers import LlamaConfig, MistralConfig

from balora_jax.errors import InputError
from balora_jax.models.families.base import family_of, read_config, weight_rules
from balora_jax.models.rotary import RopeConfig
from balora_jax.models.structure import structure
from balora_jax.models.weight_names import (
    WeightRule,
    stored_names,
)
from tests.models import tiny
from tests.models.tiny_families import FAMILIES

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


GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 64,
    "n_embd": 16,
    "n_head": 2,
    "n_layer": 1,
    "n_positions": 8,
}


def read(model_type="llama", without=(), **changes):
    raw = {"model_type": model_type, **LEAST, **changes}
    raw = {key: value for key, value in raw.items() if key not in without}
    return read_config(raw, "folder/config.json", kind="decoder")


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
    assert ours.qkv_bias == ours.output_bias == getattr(theirs, "attention_bias", False)
    assert ours.mlp_bias == getattr(theirs, "mlp_bias", False)
    assert ours.rope == RopeConfig(theta=theirs.rope_parameters["rope_theta"])


@pytest.mark.parametrize("model", [tiny.llama, tiny.mistral])
def test_every_field_off_its_default(model):
    theirs = model().config
    ours = read_config(theirs.to_dict(), "config.json")
    for field, name in FIELDS.items():
        assert getattr(ours, field) == getattr(theirs, name), field
    llama = theirs.model_type == "llama"
    assert (ours.qkv_bias, ours.output_bias, ours.mlp_bias) == (llama, llama, llama)
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
        {"model_type": "t5"},
        "folder/config.json: expected model_type to be one of gemma, gemma2, gemma3_text, gemma3, "
        "gpt2, granite, llama, mistral, mixtral, olmo2, phi3, qwen2, qwen3, qwen3_moe, smollm3, got "
        "'t5'. Use a checkpoint of one of these families, or an encoder (bert, deberta-v2, "
        "distilbert, modernbert, roberta) with task: labels.",
    ),
    "no family": (
        {"model_type": None},
        "smollm3, got None",
    ),
    "attention to the future": (
        {"model_type": "gemma", "use_bidirectional_attention": True},
        "folder/config.json: expected a causal model, got use_bidirectional_attention=True. "
        "This checkpoint cannot be run exactly.",
    ),
    "kinds of layers": (
        {"model_type": "gemma2", "layer_types": ["full_attention", "linear_attention"]},
        "folder/config.json: expected layer_types to name one of sliding_attention, "
        "full_attention for each of 2 layers, got ['full_attention', 'linear_attention']. "
        "This checkpoint cannot be run exactly.",
    ),
    "scale by layer": (
        {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True},
        "folder/config.json: expected scale_attn_by_inverse_layer_idx to be false, got True. "
        "This checkpoint cannot be run exactly.",
    ),
    "activation": (
        {"hidden_act": "quick_gelu"},
        "folder/config.json: expected hidden_act to be one of silu, gelu, gelu_pytorch_tanh, "
        "gelu_new, relu, got 'quick_gelu'. This checkpoint cannot be run exactly.",
    ),
    "rope type": (
        {"rope_scaling": {"type": "ntk", "factor": 2.0}},
        "folder/config.json: expected the rope type to be one of default, linear, dynamic, llama3, "
        "yarn, longrope, got 'ntk'. This checkpoint cannot be run exactly.",
    ),
    "divisors": (
        {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0, 2.0]}},
        "folder/config.json: expected 1 numbers in 'long_factor' of the rope scaling, got 2. "
        "Correct the config.",
    ),
    "a share of each head": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "partial_rotary_factor": 0.5},
        "folder/config.json: expected partial_rotary_factor to be 1 beside a rope type of "
        "'linear', got 0.5: this family turns whole heads. This checkpoint cannot be run exactly.",
    ),
    "rope type of a family": (
        {"model_type": "phi3", "rope_scaling": {"type": "linear", "factor": 2.0}},
        "folder/config.json: expected the rope type to be default or longrope, got 'linear'. "
        "This checkpoint cannot be run exactly.",
    ),
    "one set of rope settings": (
        {"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 1e6}},
        "folder/config.json: expected rope_parameters to name full_attention and "
        "sliding_attention, got rope_theta. This checkpoint cannot be run exactly.",
    ),
    "rope factor": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
        "folder/config.json: expected a 'factor' in the rope scaling of type 'linear', got none. "
        "Correct the config.",
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


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_weight_names_and_shapes_are_those_of_the_checkpoint(name, tied, tmp_path):
    model = FAMILIES[name](tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="np") as file:
        stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    config = read_config(model.config.to_dict(), "config.json")
    frozen = structure(config).frozen
    named = {}
    for rule in weight_rules(config):
        shape = frozen[rule.path].shape
        one = shape[1:] if rule.stacked else shape
        for tensor in rule.names(shape[0]):
            named[tensor] = one[::-1] if rule.transpose else one
    if tied:
        stored.pop("lm_head.weight", None)
        assert r"lm_head\.weight" in family_of(config).ignored(config)
    assert named == stored
    assert {rule.path for rule in weight_rules(config)} == set(frozen)


def test_qwen_layers_with_a_window():
    options = {"use_sliding_window": True, "sliding_window": 9, "num_key_value_heads": 4}
    got = read("qwen2", max_window_layers=1, **options)
    assert (got.sliding_window, got.sliding_layers) == (9, (False, True))
    assert read("qwen2", **{**options, "use_sliding_window": False}).sliding_window is None


def test_gemma3_in_the_older_style():
    """As its first checkpoints were saved: one scaling, a base for the windows, a period."""
    raw = {"rope_theta": 2e6, "rope_local_base_freq": 3e4, "sliding_window_pattern": 2}
    got = read("gemma3_text", **raw, rope_scaling={"rope_type": "linear", "factor": 8.0})
    assert (got.rope.theta, got.rope.kind, got.rope.factor) == (2e6, "linear", 8.0)
    assert got.local_rope == RopeConfig(theta=3e4)
    assert got.sliding_layers == (True, False)
    assert got.query_scale == 256**-0.5


def test_checkpoints_of_a_bare_model_and_of_old_conversions_are_read():
    """The hub's ``gpt2`` lacks the prefix, and old BERTs call a norm's weight gamma."""
    rules = weight_rules(read_config(GPT2, "config.json"))
    bare = [name.removeprefix("transformer.") for rule in rules for name in rule.names(1)]
    assert stored_names(bare, rules) == {f"transformer.{name}": name for name in bare}
    old = "bert.embeddings.LayerNorm.gamma"
    bert = [WeightRule("x", "bert.embeddings.LayerNorm.weight", False)]
    assert stored_names([old], bert) == {"bert.embeddings.LayerNorm.weight": old}
