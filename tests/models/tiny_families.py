"""A tiny random torch model of every family of decoders, every option that we read off its default."""

import transformers as hf

from tests.models import tiny

SHARED = {
    "vocab_size": 59,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 2e-3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 600.0}}
# Soft caps are low enough to bend the scores, windows short enough to cut rows of 29 tokens.
GEMMA = {
    "head_dim": 10,
    "attention_bias": True,
    "query_pre_attn_scalar": 7,
    "sliding_window": 5,
    "final_logit_softcapping": 4.0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 600.0,
    "short_factor": [1.0, 1.3],
    "long_factor": [2.0, 5.0],
    "partial_rotary_factor": 0.5,
}


def qwen2(**changes):
    options = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}
    return build(hf.Qwen2Config, hf.Qwen2ForCausalLM, ROPE | options | changes)


def qwen3(**changes):
    options = {"head_dim": 10, "attention_bias": True, "tie_word_embeddings": True}
    windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    return build(hf.Qwen3Config, hf.Qwen3ForCausalLM, ROPE | options | windows | changes)


def gemma(**changes):
    options = {"head_dim": 10, "attention_bias": True, "hidden_act": "gelu"}
    return build(hf.GemmaConfig, hf.GemmaForCausalLM, ROPE | options | changes)


def gemma2(**changes):
    options = {"attn_logit_softcapping": 1.5}
    return build(hf.Gemma2Config, hf.Gemma2ForCausalLM, ROPE | GEMMA | options | changes)


def gemma3(**changes):
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    ropes = {
        "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 5e3},
        "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
    }
    options = {"layer_types": kinds, "rope_parameters": ropes, "tie_word_embeddings": False}
    return build(hf.Gemma3TextConfig, hf.Gemma3ForCausalLM, GEMMA | options | changes)


def phi3(**changes):
    options = {
        "hidden_size": 48,
        "sliding_window": 9,
        "hidden_act": "gelu",
        "original_max_position_embeddings": 16,
        "rope_parameters": dict(LONGROPE),
    }
    return build(hf.Phi3Config, hf.Phi3ForCausalLM, options | changes)


def olmo2(**changes):
    options = {"attention_bias": True, "hidden_act": "gelu", "tie_word_embeddings": False}
    return build(hf.Olmo2Config, hf.Olmo2ForCausalLM, ROPE | options | changes)


def mixtral(**changes):
    options = {
        "head_dim": 10,
        "sliding_window": 6,
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
        "hidden_act": "gelu",
    }
    return build(hf.MixtralConfig, hf.MixtralForCausalLM, ROPE | options | changes)


def qwen3_moe(**changes):
    options = {
        "head_dim": 10,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 6,
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 20,
        "norm_topk_prob": False,
        "hidden_act": "gelu",
    }
    return build(hf.Qwen3MoeConfig, hf.Qwen3MoeForCausalLM, ROPE | options | changes)


def smollm3(**changes):
    options = {
        "no_rope_layers": [1, 0, 0, 1],
        "layer_types": [*["sliding_attention", "full_attention"] * 2],
        "use_sliding_window": True,
        "sliding_window": 5,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
        "hidden_act": "gelu",
    }
    return build(hf.SmolLM3Config, hf.SmolLM3ForCausalLM, ROPE | options | changes)


def granite(**changes):
    options = {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.7,
        "logits_scaling": 6.0,
        "attention_bias": True,
        "mlp_bias": True,
        "hidden_act": "gelu",
    }
    return build(hf.GraniteConfig, hf.GraniteForCausalLM, ROPE | options | changes)


def gpt2(**changes):
    options = {
        "vocab_size": 59,
        "n_embd": 24,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "n_inner": 40,
        "activation_function": "relu",
        "layer_norm_epsilon": 2e-3,
        "scale_attn_weights": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return tiny.randomised(hf.GPT2LMHeadModel(hf.GPT2Config(**options | changes)))


def build(config, model, options):
    """Eager attention: the others leave out the soft cap of the scores."""
    return tiny.randomised(model(config(**SHARED | options, attn_implementation="eager")))


FAMILIES = {
    "llama": tiny.llama,
    "mistral": tiny.mistral,
    "mixtral": mixtral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "phi3": phi3,
    "olmo2": olmo2,
    "qwen3_moe": qwen3_moe,
    "smollm3": smollm3,
    "granite": granite,
    "gpt2": gpt2,
}
