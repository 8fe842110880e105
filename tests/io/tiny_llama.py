"""A tiny random Llama written by transformers, and random adapters for it."""

from dataclasses import dataclass

import numpy as np

from balora_jax.models.adapters import AdaptedModule
from balora_jax.models.weight_names import WeightRule

LAYERS = 12  # more than ten: the name of layer 1 begins the name of layer 11
LINEAR = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (32, 16),
    "self_attn.v_proj": (32, 16),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (32, 48),
    "mlp.up_proj": (32, 48),
    "mlp.down_proj": (48, 32),
}


@dataclass
class Adapted:
    modules: list[AdaptedModule]
    adapters: dict[str, np.ndarray]
    origin: dict[str, np.ndarray]


def rules():
    table = [
        WeightRule("embed_tokens.embedding", "model.embed_tokens.weight", False),
        WeightRule("norm.scale", "model.norm.weight", False),
        WeightRule("lm_head.embedding", "lm_head.weight", False),
    ]
    for norm in ("input_layernorm", "post_attention_layernorm"):
        table.append(
            WeightRule(f"layers.{norm}.scale", "model.layers.{i}." + f"{norm}.weight", False)
        )
    for name in LINEAR:
        table.append(
            WeightRule(f"layers.{name}.kernel", "model.layers.{i}." + f"{name}.weight", True)
        )
    return table


def make_llama(dtype="float32"):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(getattr(torch, dtype)).eval()


def random_adapters(
    targets=("self_attn.q_proj", "mlp.down_proj"),
    layers=range(LAYERS),
    rank_of=lambda name, layer: 4,
    alpha_of=lambda name, layer: 6.0,
    origin=False,
    rslora=False,
    seed=0,
):
    """Random A and B for the layers named; padded to the largest rank with zeros."""
    rng = np.random.default_rng(seed)
    modules, adapters, start = [], {}, {}
    for target in targets:
        d_in, d_out = LINEAR[target]
        width = max(rank_of(target, layer) for layer in layers)
        path = f"layers.{target}"
        stacks = {
            "a": np.zeros((LAYERS, d_in, width), np.float32),
            "b": np.zeros((LAYERS, width, d_out), np.float32),
        }
        moves = {key: value.copy() for key, value in stacks.items()}
        for layer in layers:
            rank, alpha = rank_of(target, layer), alpha_of(target, layer)
            scale = alpha / (np.sqrt(rank) if rslora else rank)
            modules.append(
                AdaptedModule(
                    f"model.layers.{layer}.{target}",
                    path,
                    layer,
                    rank,
                    alpha,
                    float(scale),
                    d_in,
                    d_out,
                )
            )
            for stack, size in ((stacks, 0.3), (moves, 0.03)):
                stack["a"][layer, :, :rank] = size * rng.standard_normal((d_in, rank))
                stack["b"][layer, :rank] = size * rng.standard_normal((rank, d_out))
        for key in "ab":
            adapters[f"{path}.lora_{key}"] = stacks[key] + (moves[key] if origin else 0)
            if origin:
                start[f"{path}.origin_{key}"] = stacks[key]
    return Adapted(modules, adapters, start)


def float64_delta(adapted, module):
    """scale · (A B − A₀ B₀)ᵀ in float64, from the definition."""
    a = adapted.adapters[f"{module.path}.lora_a"][module.layer].astype(np.float64)
    b = adapted.adapters[f"{module.path}.lora_b"][module.layer].astype(np.float64)
    delta = a @ b
    if adapted.origin:
        a0 = adapted.origin[f"{module.path}.origin_a"][module.layer].astype(np.float64)
        b0 = adapted.origin[f"{module.path}.origin_b"][module.layer].astype(np.float64)
        delta = delta - a0 @ b0
    return module.scale * delta.T


def tokens():
    import torch

    return torch.tensor(np.random.default_rng(1).integers(0, 64, (2, 9)))


def logits(model):
    import torch

    with torch.no_grad():
        return model(tokens()).logits.float().numpy()


def merged_logits(adapted, deltas=None):
    """Logits of a fresh model with each delta added to its weight in torch."""
    import torch

    model = make_llama()
    with torch.no_grad():
        for module in adapted.modules:
            delta = float64_delta(adapted, module) if deltas is None else deltas[module.name]
            weight = model.get_submodule(module.name).weight
            weight.copy_((weight.double() + torch.from_numpy(delta)).float())
    return logits(model)


def assert_close_in_range(actual, expected, tolerance=1e-5):
    spread = expected.max() - expected.min()
    assert np.abs(actual - expected).max() <= tolerance * spread
