"""DistilBERT's and ModernBERT's config.json to our config, weight names, a new head, messages."""

import re

import jax
import numpy as np
import pytest
import torch
import transformers as hf

from balora_jax.errors import InputError
from balora_jax.models.families.base import family_of, read_config, weight_rules
from balora_jax.models.modern_encoder import init_modern_head
from balora_jax.models.rotary import RopeConfig
from balora_jax.models.structure import structure

SIZES = {
    "distilbert": {
        "vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4,
        "activation": "gelu", "max_position_embeddings": 40,
    },
    "modernbert": {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5,
        "num_attention_heads": 4, "max_position_embeddings": 40, "pad_token_id": 0,
    },
}  # fmt: skip
MODELS = {
    "distilbert": (hf.DistilBertConfig, hf.DistilBertForSequenceClassification),
    "modernbert": (hf.ModernBertConfig, hf.ModernBertForSequenceClassification),
}


def read(model_type, labels=3, without=(), **changes):
    raw = {"model_type": model_type, **SIZES[model_type], **changes}
    raw = {key: value for key, value in raw.items() if key not in without}
    return read_config(raw, "folder/config.json", kind="encoder", num_labels=labels)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("distilbert", {}),
        ("modernbert", {}),
        ("modernbert", {"attention_bias": True, "mlp_bias": True}),
        ("modernbert", {"num_hidden_layers": 1}),
    ],
)
def test_weight_table_names_every_tensor_once_with_its_shape(model_type, changes):
    kind, model = MODELS[model_type]
    with torch.device("meta"):
        theirs = model(kind(**SIZES[model_type] | changes, num_labels=3)).state_dict()
    config = read(model_type, **changes)
    skeleton, family = structure(config), family_of(config)
    encoder, head = weight_rules(config), family.head_rules()
    assert {rule.path for rule in encoder} == set(skeleton.frozen)
    assert {rule.path for rule in head} == set(skeleton.head)
    shapes, named = {**skeleton.frozen, **skeleton.head}, []
    for rule in (*encoder, *head):
        shape = shapes[rule.path].shape
        one = shape[1:] if rule.stacked else shape
        for name in rule.names(shape[0]):
            named.append(name)
            assert tuple(theirs[name].shape) == (one[::-1] if rule.transpose else one), name
    assert sorted(named) == sorted(theirs)
    # PEFT saves whole modules: those that hold the head, and nothing of the encoder.
    ends = tuple(f".{name}" for name in family.head_modules())
    held = {name for name in theirs if f".{name}".rpartition(".")[0].startswith(ends)}
    assert held == {name for rule in head for name in rule.names(1)}


def test_what_modernbert_says_and_assumes():
    got = read("modernbert")
    assert got.modern is not None
    assert got.modern.sliding_layers == (False, True, True, False, True)
    assert (got.modern.window, got.norm_eps, got.activation) == (64, 1e-5, "gelu")
    assert (got.modern.rope, got.modern.local_rope) == (RopeConfig(1.6e5), RopeConfig(1e4))
    assert not got.modern.pools_mean
    assert not got.absolute_positions
    first = {"global_rope_theta": 9e4, "local_rope_theta": 7e3, "global_attn_every_n_layers": 2}
    got = read("modernbert", **first, classifier_pooling="mean", local_attention=9)
    assert got.modern.sliding_layers == (False, True, False, True, False)
    assert (got.modern.rope.theta, got.modern.local_rope.theta) == (9e4, 7e3)
    assert (got.modern.window, got.modern.pools_mean) == (4, True)


def test_what_distilbert_says_and_assumes():
    got = read("distilbert")
    assert (got.hidden_size, got.intermediate_size, got.num_layers, got.num_heads) == (32, 48, 2, 4)
    assert (got.norm_eps, got.pooler_activation, got.type_vocab_size) == (1e-12, "relu", 0)


def test_a_new_head_of_modernbert_is_cut_as_transformers_cuts_it():
    config = read(
        "modernbert", hidden_size=128, initializer_range=0.3, initializer_cutoff_factor=1.5
    )
    assert config.modern is not None
    head = init_modern_head(config, config.modern, jax.random.key(3))
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in head.items()} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in structure(config).head.items()
    }
    theirs = hf.ModernBertForSequenceClassification(
        hf.ModernBertConfig(
            **SIZES["modernbert"] | {"hidden_size": 128}, num_labels=3, initializer_range=0.3,
            initializer_cutoff_factor=1.5,
        )
    )  # fmt: skip
    for path, module in {"head.dense.kernel": theirs.head.dense, "head.out.kernel": theirs.classifier}.items():  # fmt: skip
        want = module.weight.detach().numpy()
        assert np.std(head[path]) == pytest.approx(np.std(want), rel=0.15), path
        assert np.abs(head[path]).max() == pytest.approx(np.abs(want).max(), rel=0.05), path
    assert np.all(head["head.norm.scale"] == 1)
    assert not np.any(head["head.out.bias"])


@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        ("distilbert", ["vocab_transform.weight", "vocab_projector.bias"]),
        ("modernbert", ["decoder.bias", "decoder.weight"]),
    ],
)
def test_leftovers_of_pretraining_are_ignored_and_no_weight_is(model_type, names):
    config = read(model_type)
    patterns = family_of(config).ignored(config)
    rules = (*weight_rules(config), *family_of(config).head_rules())

    def ignored(name):
        return any(re.fullmatch(pattern, name) for pattern in patterns)

    assert all(map(ignored, names))
    assert not any(ignored(name) for rule in rules for name in rule.names(2))


EXACT = r"This checkpoint cannot be run exactly\."
ERRORS = [
    ("distilbert", {"dim": None}, r"the key 'dim', got none\. Use the config\.json"),
    ("distilbert", {"n_heads": 5}, r"dim to be a multiple of n_heads, got 32 and 5\. Correct"),
    ("modernbert", {"norm_bias": True}, rf"norm_bias to be False, got True\. {EXACT}"),
    ("modernbert", {"classifier_bias": True}, rf"classifier_bias to be False, got True\. {EXACT}"),
    ("modernbert", {"classifier_pooling": "max"}, rf"one of cls, mean, got 'max'\. {EXACT}"),
    ("modernbert", {"hidden_size": 36}, r"an even width of the heads, .* got 9\. Use the config"),
    ("modernbert", {"layer_types": ["full_attention"]}, r"layer_types to name one of .* 5 layers"),
    ("modernbert", {"rope_parameters": {"rope_theta": 1e4}}, r"rope_parameters to name full_att"),
    ("modernbert", {"local_attention": "x"}, r"local_attention to be a whole number .* got 'x'"),
]


@pytest.mark.parametrize(("model_type", "changes", "message"), ERRORS)
def test_what_this_code_lacks_is_refused_by_name(model_type, changes, message):
    with pytest.raises(InputError, match=rf"^folder/config\.json: expected .*{message}"):
        read(model_type, **changes)
