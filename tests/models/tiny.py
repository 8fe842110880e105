"""Tiny random torch models with every option off its default, and their weights as our arrays."""

import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from balora_jax.io.hf_weights import load_weights
from balora_jax.models.families.base import family_of, read_config, weight_rules
from balora_jax.models.structure import structure

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 5e3},
    "linear": {"rope_type": "linear", "factor": 3.0, "rope_theta": 2e4},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5, "rope_theta": 2e4},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.5,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 3e3,
    },
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "rope_theta": 3e3,
    },
    "yarn_mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        "mscale": 0.7,
        "mscale_all_dim": 0.4,
        "truncate": False,
        "rope_theta": 3e3,
    },
}


def llama(rope="llama3", **changes):
    options = {
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 32,
        "rms_norm_eps": 3e-3,
        "hidden_act": "gelu_pytorch_tanh",
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
        "rope_parameters": dict(ROPES[rope]),
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return randomised(LlamaForCausalLM(LlamaConfig(**{**options, **changes})))


def mistral(**changes):
    options = {
        "vocab_size": 53,
        "hidden_size": 20,
        "intermediate_size": 28,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 64,
        "rms_norm_eps": 2e-4,
        "sliding_window": 5,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return randomised(MistralForCausalLM(MistralConfig(**{**options, **changes})))


def randomised(model):
    """Every parameter random and of order one in effect, norms and biases included."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.3 if parameter.ndim > 1 else 1.0 + 0.3 * noise)
    return model.eval()


def ours(model, **options):
    """Our structure and float32 weights of a torch model, read from the files it is saved as."""
    config = read_config(model.config.to_dict(), "config.json")
    skeleton = structure(config, **options)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        ignore = family_of(config).ignored(config)
        weights = load_weights(folder, skeleton.frozen, weight_rules(config), ignore=ignore)
    return skeleton, weights


def logits(skeleton, weights, ids, mask=None):
    """Our logits by one compiled call: operation by operation it takes several times as long."""
    mask = np.ones_like(ids) if mask is None else mask
    forward = jax.jit(lambda weights, ids, mask: skeleton.bind(weights)(ids, mask))
    return forward(weights, jnp.asarray(ids, jnp.int32), jnp.asarray(mask, jnp.int32))


def relative_error(got, want):
    """Largest difference as a share of the reference's range."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.abs(got - want).max() / (want.max() - want.min())
