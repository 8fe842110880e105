"""An encoder's config.json to our config, its weight names, counts from shapes, messages."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DebertaV2Model,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from balora_jax.errors import InputError
from balora_jax.models.adapters import plan_adapters, trainable_parameters
from balora_jax.models.disentangled import DisentangledConfig
from balora_jax.models.encoder import init_head
from balora_jax.models.families.base import family_of, read_config, weight_rules
from balora_jax.models.structure import structure
from balora_jax.models.weight_names import linear_shapes

# What every config.json of these families states; all else has a default.
LEAST = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p"]}
CLASSES = {
    "bert": (BertConfig, BertForSequenceClassification, {}),
    "roberta": (RobertaConfig, RobertaForSequenceClassification, {}),
    "deberta-v2": (DebertaV2Config, DebertaV2ForSequenceClassification, RELATIVE),
}
FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "norm_eps": "layer_norm_eps",
    "activation": "hidden_act",
    "max_positions": "max_position_embeddings",
    "type_vocab_size": "type_vocab_size",
    "pad_token_id": "pad_token_id",
    "initializer_range": "initializer_range",
}
V3_BASE = {
    "model_type": "deberta-v2",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "vocab_size": 128100,
    "max_position_embeddings": 512,
    "max_relative_positions": -1,
    "position_buckets": 256,
    "type_vocab_size": 0,
    "relative_attention": True,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "position_biased_input": False,
    "layer_norm_eps": 1e-7,
    "hidden_act": "gelu",
    "pad_token_id": 0,
    "pooler_dropout": 0,
    "pooler_hidden_act": "gelu",
    "pooler_hidden_size": 768,
    "initializer_range": 0.02,
}


def read(model_type="bert", without=(), labels=2, **changes):
    raw = {"model_type": model_type, **LEAST, **CLASSES.get(model_type, ({},) * 3)[2], **changes}
    raw = {key: value for key, value in raw.items() if key not in without}
    return read_config(raw, "folder/config.json", kind="encoder", num_labels=labels)


@pytest.mark.parametrize("model_type", CLASSES)
def test_defaults_are_those_of_transformers(model_type):
    kind, _, least = CLASSES[model_type]
    ours, theirs = read(model_type, labels=5), kind(**LEAST, **least)
    for field, name in FIELDS.items():
        assert getattr(ours, field) == getattr(theirs, name), field
    assert (ours.model_type, ours.num_labels) == (model_type, 5)
    pooler = theirs.pooler_hidden_act if model_type == "deberta-v2" else "tanh"
    assert ours.pooler_activation == pooler
    assert hash(ours) == hash(dataclasses.replace(ours))


def test_roberta_starts_its_positions_behind_the_padding_row():
    config = read("roberta", pad_token_id=4)
    assert (config.position_offset, config.max_positions, config.max_length) == (5, 40, 35)
    assert read("bert", pad_token_id=4).position_offset == 0
    assert read("bert").max_length == 40


def test_relative_positions():
    assert read("bert").disentangled is None
    assert read("deberta-v2").disentangled == DisentangledConfig(
        0, 40, False, ("c2p",), False, True
    )
    full = read(
        "deberta-v2",
        position_buckets=8,
        max_relative_positions=30,
        share_att_key=True,
        pos_att_type="P2C | c2p",
        norm_rel_ebd="Layer_Norm",
        position_biased_input=False,
    )
    assert full.disentangled == DisentangledConfig(8, 30, True, ("c2p", "p2c"), True, False)


def test_span_is_that_of_the_buckets_or_else_the_reach():
    buckets, plain = (DisentangledConfig(n, 40, True, ("c2p",), True, False) for n in (8, 0))
    assert (buckets.span, plain.span) == (8, 40)


OPTIONS = [
    ("bert", {}),
    ("roberta", {}),
    ("deberta-v2", {}),
    ("deberta-v2", {"position_buckets": 6, "share_att_key": True, "pos_att_type": ["p2c", "c2p"]}),
    ("deberta-v2", {"norm_rel_ebd": "layer_norm", "type_vocab_size": 2, "pos_att_type": ["p2c"]}),
    ("deberta-v2", {"position_biased_input": False, "pos_att_type": ["c2p", "p2c"]}),
]


@pytest.mark.parametrize(("model_type", "changes"), OPTIONS)
def test_weight_table_names_every_tensor_once_with_its_shape(model_type, changes):
    kind, model, least = CLASSES[model_type]
    options = {**LEAST, **least, **changes}
    with torch.device("meta"):
        theirs = model(kind(**options, num_labels=3)).state_dict()
    config = read(model_type, labels=3, **changes)
    skeleton = structure(config)
    encoder, head = weight_rules(config), family_of(config).head_rules()
    assert {rule.path for rule in encoder} == set(skeleton.frozen)
    assert {rule.path for rule in head} == set(skeleton.head)
    shapes = {**skeleton.frozen, **skeleton.head}
    named = []
    for rule in (*encoder, *head):
        shape = shapes[rule.path].shape
        shape = shape[1:] if rule.stacked else shape
        for name in rule.names(config.num_layers):
            named.append(name)
            assert tuple(theirs[name].shape) == (shape[::-1] if rule.transpose else shape), name
    assert sorted(named) == sorted(theirs)


@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        ("bert", ["cls.predictions.bias", "bert.embeddings.position_ids"]),
        ("roberta", ["lm_head.dense.weight", "roberta.pooler.dense.weight"]),
        ("deberta-v2", ["lm_predictions.lm_head.bias", "mask_predictions.dense.weight"]),
    ],
)
def test_leftovers_of_pretraining_are_ignored_and_no_weight_is(model_type, names):
    config = read(model_type)
    rules = (*weight_rules(config), *family_of(config).head_rules())
    patterns = family_of(config).ignored(config)

    def ignored(name):
        return any(re.fullmatch(pattern, name) for pattern in patterns)

    assert all(ignored(name) for name in names)
    assert not any(ignored(name) for rule in rules for name in rule.names(2))


def test_unused_absolute_positions_are_ignored():
    name = "deberta.embeddings.position_embeddings.weight"
    configs = [read("deberta-v2", position_biased_input=flag) for flag in (True, False)]
    used, unused = (family_of(config).ignored(config) for config in configs)
    assert not any(re.fullmatch(pattern, name) for pattern in used)
    assert any(re.fullmatch(pattern, name) for pattern in unused)


def test_counts_of_deberta_v3_base_from_shapes_alone(capsys):
    config = read_config(V3_BASE, "config.json", num_labels=2)
    skeleton = structure(config)
    linears = linear_shapes(weight_rules(config), skeleton.frozen)
    counts = {}
    for targets in (["query_proj", "key_proj", "value_proj"], "all-linear"):
        modules = plan_adapters(linears, rank=8, alpha=16, target_modules=targets)
        counts[str(targets)] = trainable_parameters(modules)
    assert list(counts.values()) == [442_368, 1_327_104]
    assert len(linears) == 6
    with torch.device("meta"):
        theirs = DebertaV2Model(DebertaV2Config(**V3_BASE))
    frozen = sum(math.prod(leaf.shape) for leaf in skeleton.frozen.values())
    assert frozen == sum(parameter.numel() for parameter in theirs.parameters())
    head = sum(math.prod(leaf.shape) for leaf in skeleton.head.values())
    assert head == 768 * 768 + 768 + 768 * 2 + 2
    with capsys.disabled():
        print(f"\ndeberta-v3-base, rank 8: {counts}, frozen {frozen:,}, head {head:,}")


def test_new_head_is_normal_with_the_configs_deviation():
    config = read("bert", labels=3, initializer_range=0.3, hidden_size=128)
    head = init_head(config, jax.random.key(3))
    shapes = structure(config).head
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in head.items()} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in shapes.items()
    }
    assert np.std(head["head.dense.kernel"]) == pytest.approx(0.3, rel=0.02)
    assert np.std(head["head.out.kernel"]) == pytest.approx(0.3, rel=0.15)
    assert abs(np.mean(head["head.dense.kernel"])) < 0.01
    assert not np.any(head["head.dense.bias"])
    assert not np.any(head["head.out.bias"])
    block = np.asarray(head["head.dense.kernel"])[:, :3]
    assert abs(np.corrcoef(block.ravel(), np.ravel(head["head.out.kernel"]))[0, 1]) < 0.3


EXACT = r"This checkpoint cannot be run exactly\."
ERRORS = [
    (
        "gpt2",
        {},
        r"model_type to be one of bert, deberta-v2, distilbert, modernbert, roberta, got 'gpt2'\. Use a",
    ),
    ("bert", {"hidden_size": None}, r"the key 'hidden_size', got none\. Use the config\.json"),
    ("roberta", {"pad_token_id": None}, r"the key 'pad_token_id', got none\."),
    ("bert", {"num_attention_heads": 5}, r"multiple of num_attention_heads, got 32 and 5\. Corr"),
    ("bert", {"hidden_act": "mish"}, rf"hidden_act to be one of silu, .*, got 'mish'\. {EXACT}"),
    ("bert", {"is_decoder": True}, rf"is_decoder to be False, got True\. {EXACT}"),
    ("roberta", {"add_cross_attention": True}, r"add_cross_attention to be False, got True\."),
    ("bert", {"position_embedding_type": "relative_key"}, r"to be 'absolute', got 'relative_key'"),
    ("deberta-v2", {"relative_attention": False}, r"relative_attention to be True, got False\."),
    ("deberta-v2", {"relative_attention": None}, r"relative_attention to be True, got None\."),
    ("deberta-v2", {"conv_kernel_size": 3}, rf"conv_kernel_size to be 0, got 3\. {EXACT}"),
    ("deberta-v2", {"embedding_size": 16}, r"embedding_size to be 32, got 16\."),
    ("deberta-v2", {"pooler_hidden_size": 64}, r"pooler_hidden_size to be 32, got 64\."),
    ("deberta-v2", {"attention_head_size": 4}, r"attention_head_size to be 8, got 4\."),
    ("deberta-v2", {"talking_head": True}, r"talking_head to be False, got True\."),
    ("deberta-v2", {"pooler_hidden_act": "mish"}, r"pooler_hidden_act to be one of .*'mish'"),
    ("deberta-v2", {"pos_att_type": "p2p|c2p"}, rf"one or more of c2p, p2c, got .*p2p.* {EXACT}"),
    ("deberta-v2", {"pos_att_type": None}, r"pos_att_type to name one or more of .*, got None\."),
    ("deberta-v2", {"norm_rel_ebd": "batch"}, r"norm_rel_ebd to name one or more of .*'batch'"),
    ("deberta-v2", {"position_buckets": 1}, r"position_buckets to be 0 or at least 2, .* got 1\."),
    ("deberta-v2", {"position_buckets": 78}, r"max_relative_positions - 1 = 39, got 78\. Correct"),
]


@pytest.mark.parametrize(("model_type", "changes", "message"), ERRORS)
def test_what_this_code_lacks_is_refused_by_name(model_type, changes, message):
    with pytest.raises(InputError, match=rf"^folder/config\.json: expected .*{message}"):
        read(model_type, **changes)


def test_relative_attention_is_off_where_it_is_not_named():
    with pytest.raises(InputError, match="relative_attention to be True, got False"):
        read("deberta-v2", without=["relative_attention"])
