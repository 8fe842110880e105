"""Does every file in configs/ say a run that can be built, with the figures it promises?"""

import dataclasses
from pathlib import Path

import pytest

from balora_jax.config import load_config
from balora_jax.evals.run import example_settings
from balora_jax.models import registry
from balora_jax.models.adapters import trainable_parameters
from balora_jax.models.decoder import structure
from balora_jax.models.weight_names import linear_shapes, weight_rules
from balora_jax.training import assemble, optim

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FILES = sorted(CONFIGS.glob("*.yaml"))
NO_TERMS = [f"regularizers.{name}=0" for name in ("consistency", "diversity", "spectral")]

# The keys of each base's config.json that shapes depend on, as published with the weights.
BASES = {
    "llama2_7b_metamath": {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096,
        "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "max_position_embeddings": 4096, "tie_word_embeddings": False,
    },
    "gemma_7b_metamath": {
        "model_type": "gemma", "vocab_size": 256000, "hidden_size": 3072,
        "intermediate_size": 24576, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 16, "head_dim": 256, "max_position_embeddings": 8192,
    },
    "mistral_7b_metamath": {
        "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "max_position_embeddings": 32768, "tie_word_embeddings": False,
    },
}  # fmt: skip
PUBLISHED_COUNTS = {
    "llama2_7b_metamath": 319_815_680,
    "mistral_7b_metamath": 167_772_160,
    "gemma_7b_metamath": 200_015_872,
}


def test_there_are_configs():
    assert {"quickstart", *BASES} <= {file.stem for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
@pytest.mark.parametrize("overrides", [[], NO_TERMS, [*NO_TERMS, "adapter.start=lora"]],
                         ids=["ba-lora", "pissa", "lora"])  # fmt: skip
def test_every_config_builds(file, overrides):
    config = load_config(file, overrides)
    objective = assemble.objective_of(config.regularizers)
    assert objective.needs_teacher == (not overrides)
    assert not (overrides and (objective.term_spec.diversity or objective.term_spec.spectral))
    optim.make_optimizer(config.training, 100)
    example_settings(config.data)


@pytest.mark.parametrize("name", BASES)
def test_the_published_settings(name):
    config = load_config(CONFIGS / f"{name}.yaml")
    objective = dataclasses.asdict(assemble.objective_of(config.regularizers))
    published = {
        "consistency": 0.025, "diversity": 0.005, "spectral": 0.005, "k": 10, "top_k": 20,
        "temperature": 2.0, "consistency_schedule": "cosine", "diversity_schedule": "two_phase",
        "spectral_schedule": "two_phase", "norm": "frobenius", "mask_alignment": "shifted",
    }  # fmt: skip
    assert {key: objective[key] for key in published} == published
    training = config.training
    assert (training.optimizer, training.learning_rate, training.schedule) == (
        "adamw", 2e-5, "cosine",
    )  # fmt: skip
    assert (training.warmup, training.weight_decay, training.seed) == (0.03, 0.0, 42)
    assert (training.batch_size, training.epochs, config.data.train_limit) == (32, 1, 100_000)
    assert (config.data.max_length, config.data.template) == (512, "alpaca")
    assert config.model.dtype == "bfloat16"
    assert config.adapter.alpha == config.adapter.rank


@pytest.mark.parametrize("name", BASES)
def test_trainable_parameters_are_those_published(name):
    """From shapes alone: no weight of a 7B model is made."""
    config = load_config(CONFIGS / f"{name}.yaml")
    decoder = registry.decoder_config(BASES[name], name)
    _, modules = assemble.plan(
        config.adapter,
        linear_shapes(weight_rules(decoder), structure(decoder, dtype="bfloat16").frozen),
    )
    assert trainable_parameters(modules) == PUBLISHED_COUNTS[name]
