"""Values of a config.json are typed and bounded as they are read: what is refused, and how."""

import json
import re

import pytest

from balora_jax.errors import InputError
from balora_jax.models.families.base import FAMILIES, read_config
from tests.models import tiny_encoders
from tests.models.tiny_families import FAMILIES as DECODERS

TORCH = {
    **DECODERS,
    "bert": tiny_encoders.bert,
    "roberta": tiny_encoders.roberta,
    "deberta-v2": tiny_encoders.deberta,
    "distilbert": tiny_encoders.distilbert,
    "modernbert": tiny_encoders.modernbert,
}
LAYERS = "n_layer", "n_layers", "num_hidden_layers"
NUMBERS = r"a whole number from 1 to 8192"


@pytest.fixture(scope="module", params=TORCH)
def raw(request):
    """A family's config.json as it would be read from its file."""
    return json.loads(TORCH[request.param]().config.to_json_string(use_diff=False))


def test_all_families_are_here():
    assert {*TORCH, "gemma3"} == set(FAMILIES)  # whose sizes are in a section


@pytest.mark.parametrize("value", ["12", -1, 0, 10**9, True, float("nan"), 2.0, [2], {"a": 1}])
def test_an_absurd_number_of_layers(raw, value):
    key = next(key for key in LAYERS if key in raw)
    message = (
        f"folder/config.json: expected {key} to be {NUMBERS}, got {value!r}. Use the config.json "
        "that was saved with the weights."
    )
    with pytest.raises(InputError) as error:
        read_config({**raw, key: value}, "folder/config.json")
    assert str(error.value) == message


EPSILONS = "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"


@pytest.mark.parametrize("value", ["1e-5", -1e-5, 2, float("nan"), float("inf"), True])
def test_an_absurd_epsilon(raw, value):
    key = next((key for key in EPSILONS if key in raw), None)
    if key is None:
        assert raw["model_type"] == "distilbert"  # whose epsilon is fixed
        return
    message = rf"config.json: expected {key} to be a number of at least 0 and at most 1, got {re.escape(repr(value))}\."
    with pytest.raises(InputError, match=message):
        read_config({**raw, key: value}, "config.json")


@pytest.mark.parametrize("value", [7, None, ["gelu"], "mish"])
def test_an_absurd_activation(raw, value):
    keys = "activation_function", "hidden_activation", "hidden_act", "activation"
    key = next(key for key in keys if raw.get(key) is not None)
    if value is None and key == "hidden_activation":
        return  # the older key decides
    with pytest.raises(
        InputError, match=rf"config.json: expected (the key '{key}'|{key} to be one of silu)"
    ):
        read_config({**raw, key: value}, "config.json")


def read(model_type, **changes):
    raw = json.loads(TORCH[model_type]().config.to_json_string(use_diff=False))
    return read_config({**raw, **changes}, "config.json")


CASES = [
    ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings to be true or false, got 'no'"),
    ("llama", {"rope_parameters": [1]}, r"rope_parameters to be an object, got \[1\]"),
    ("llama", {"num_key_value_heads": 4}, "multiple of num_key_value_heads .* got 6, 4 and 24"),
    ("mistral", {"sliding_window": "wide"}, "sliding_window to be a whole number .* got 'wide'"),
    ("mixtral", {"num_experts_per_tok": 6}, "num_experts_per_tok of at most num_local_experts = 5"),
    ("qwen3_moe", {"num_experts_per_tok": 6}, "num_experts_per_tok of at most num_local_experts"),
    ("qwen3_moe", {"mlp_only_layers": [1]}, r"experts in every layer, got mlp_only_layers=\[1\]"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step to be 1, got 2"),
    ("smollm3", {"no_rope_layers": [1, 2, 1, 1]}, r"0 or 1 for each of 4 layers, got \[1, 2, 1"),
    ("smollm3", {"no_rope_layers": [1]}, r"0 or 1 for each of 4 layers, got \[1\]"),
    ("granite", {"logits_scaling": 0}, "logits_scaling to be a number of at least"),
    ("gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping to be a number of at least"),
    (
        "gemma3_text",
        {"layer_types": "full_attention"},
        "layer_types to name one of .* for each of 4",
    ),
    ("gpt2", {"n_head": 5}, "n_embd to be a multiple of n_head, got 24 and 5"),
    (
        "deberta-v2",
        {"pos_att_type": [1]},
        r"pos_att_type to name one or more of c2p, p2c, got \[1\]",
    ),
    ("bert", {"id2label": "a"}, "id2label to be an object, got 'a'"),
    ("bert", {"type_vocab_size": True}, "type_vocab_size to be a whole number .* got True"),
]


@pytest.mark.parametrize(("model_type", "changes", "message"), CASES)
def test_other_values_that_a_key_cannot_have(model_type, changes, message):
    with pytest.raises(InputError, match=rf"^config\.json: expected .*{message}"):
        read(model_type, **changes)


def test_rope_numbers_are_checked():
    rope = {"rope_type": "linear", "factor": "4", "rope_theta": 1e4}
    with pytest.raises(InputError, match=r"config\.json, rope: expected factor to be a number"):
        read("llama", rope_parameters=rope)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"original_max_position_embeddings": 1}, "whole number from 2 to"),
        (
            {"short_factor": [True] * 4},
            "expected 4 numbers in 'short_factor' of the rope scaling, got 0",
        ),
        ({"long_factor": [1.0, 1.0, 1.0, 10**400]}, "expected 4 numbers in 'long_factor' of the"),
        (
            {"long_factor": [1.0, 1.0, 1.0, float("nan")]},
            "numbers in 'long_factor' of the rope scal",
        ),
    ],
)
def test_divisors_of_longrope_are_numbers(changes, message):
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
        "long_factor": [1.0] * 4, "original_max_position_embeddings": 8,
    }  # fmt: skip
    with pytest.raises(InputError, match=message):
        read("llama", head_dim=8, rope_parameters=rope | changes)


@pytest.mark.parametrize("value", [["llama"], {"a": 1}, None, 7])
def test_a_model_type_that_is_no_word(value):
    with pytest.raises(InputError, match="expected model_type to be one of bert"):
        read_config({"model_type": value}, "config.json")


def test_labels_come_from_the_file_or_from_who_asks():
    assert read("bert").num_labels == 3
    assert read("bert", num_labels=5).num_labels == 5
    raw = TORCH["bert"]().config.to_dict()
    assert read_config(raw, "config.json", num_labels=7).num_labels == 7
