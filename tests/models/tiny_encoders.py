"""Tiny random torch encoders with every option off its default, and their weights as our arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from balora_jax.models.families.base import family_of, read_config, weight_rules
from balora_jax.models.structure import structure

COMMON = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "layer_norm_eps": 3e-3,
    "hidden_act": "gelu_new",
    "initializer_range": 0.05,
    "hidden_dropout_prob": 0.2,
    "attention_probs_dropout_prob": 0.3,
}
# Of DeBERTaV3; buckets are exact up to 4 and end at 39.
V3 = {
    "relative_attention": True,
    "position_buckets": 8,
    "max_relative_positions": -1,
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
}


def bert(**changes):
    options = {
        **COMMON,
        "max_position_embeddings": 33,
        "type_vocab_size": 3,
        "pad_token_id": 2,
        "num_labels": 3,
    }
    return randomised(BertForSequenceClassification(BertConfig(**{**options, **changes})))


def roberta(**changes):
    options = {
        **COMMON,
        "num_hidden_layers": 2,
        "max_position_embeddings": 36,
        "type_vocab_size": 2,
        "pad_token_id": 3,
        "num_labels": 2,
        "hidden_act": "relu",
    }
    return randomised(RobertaForSequenceClassification(RobertaConfig(**{**options, **changes})))


def deberta(**changes):
    options = {
        **COMMON,
        **V3,
        "max_position_embeddings": 40,
        "pad_token_id": 0,
        "pooler_hidden_act": "tanh",
        "pooler_dropout": 0.1,
        "num_labels": 3,
    }
    config = DebertaV2Config(**{**options, **changes})
    return randomised(DebertaV2ForSequenceClassification(config))


def distilbert(**changes):
    options = {
        "vocab_size": 61,
        "dim": 24,
        "hidden_dim": 40,
        "n_layers": 3,
        "n_heads": 4,
        "activation": "gelu_new",
        "initializer_range": 0.05,
        "max_position_embeddings": 40,
        "pad_token_id": 2,
        "num_labels": 3,
    }
    names = {
        "hidden_size": "dim",
        "intermediate_size": "hidden_dim",
        "num_hidden_layers": "n_layers",
        "hidden_act": "activation",
    }
    options |= {names.get(key, key): value for key, value in changes.items()}
    return randomised(DistilBertForSequenceClassification(DistilBertConfig(**options)))


def modernbert(**changes):
    """Windows short enough to cut rows of 29 tokens."""
    options = {
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "norm_eps": 3e-3,
        "hidden_activation": "gelu_pytorch_tanh",
        "initializer_range": 0.05,
        "max_position_embeddings": 40,
        "pad_token_id": 2,
        "eos_token_id": 1,
        "bos_token_id": 0,
        "cls_token_id": 0,
        "sep_token_id": 1,
        "attention_bias": True,
        "mlp_bias": True,
        "local_attention": 8,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 5e3},
            "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
        },
        "classifier_pooling": "mean",
        "classifier_activation": "silu",
        "num_labels": 3,
        "attn_implementation": "eager",
    }
    names = {"hidden_act": "hidden_activation", "layer_norm_eps": "norm_eps"}
    options |= {names.get(key, key): value for key, value in changes.items()}
    return randomised(ModernBertForSequenceClassification(ModernBertConfig(**options)))


def randomised(model):
    """Every parameter random and of order one in effect.

    Biases are centred on zero: a common shift in every layer would drown what tells texts apart.
    """
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            norm = name.lower().endswith("norm.weight")
            parameter.copy_(1.0 + noise if norm else noise)
    return model.eval()


def relative_error(got, want):
    """Largest difference as a share of the range over rows, what they have in common taken off."""
    got, want = (np.asarray(array, np.float64) for array in (got, want))
    common = want.mean(axis=0)
    return np.abs(got - want).max() / np.ptp(want - common)


def config_of(model):
    labels = model.config.num_labels
    return read_config(model.config.to_dict(), "config.json", num_labels=labels)


def ours(model, **options):
    """Our structure and float32 weights, head included, of a torch model."""
    config = config_of(model)
    rules = weight_rules(config) + family_of(config).head_rules()
    state = {name: value.detach().float().numpy() for name, value in model.state_dict().items()}
    weights = {}
    for rule in rules:
        array = np.stack([state[name] for name in rule.names(config.num_layers - rule.first)])
        array = array if rule.stacked else array[0]
        weights[rule.path] = jnp.asarray(np.swapaxes(array, -1, -2) if rule.transpose else array)
    return structure(config, **options), weights


def outputs(skeleton, weights, ids, mask=None, types=None):
    """Our logits and final hidden states by one compiled call."""

    def forward(weights, *arrays):
        module = skeleton.bind(weights)
        return module(*arrays), module.hidden(*arrays)

    arrays = [None if a is None else jnp.asarray(a, jnp.int32) for a in (ids, mask, types)]
    return jax.jit(forward)(weights, *arrays)


def torch_outputs(model, ids, mask=None, types=None):
    """The same two by transformers."""
    arrays = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    with torch.no_grad():
        out = model(
            **{name: torch.tensor(a) for name, a in arrays.items() if a is not None},
            output_hidden_states=True,
        )
    return out.logits.numpy(), out.hidden_states[-1].numpy()
