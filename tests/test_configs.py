"""Every file in configs/: a run that can be built, with the figures it promises."""

from pathlib import Path

import pytest

from balora_jax.config_file import load_config
from balora_jax.models.adapters import trainable_parameters
from balora_jax.models.families.base import read_config
from balora_jax.models.structure import structure
from balora_jax.study.run import plan_runs
from balora_jax.tasks import assemble
from balora_jax.tasks.text.score import example_settings
from balora_jax.training import optim
from balora_jax.training.adapters import adapters_of

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
    assert not (overrides and objective.active)
    optim.make_optimizer(config.training, 100)
    example_settings(config.data)


@pytest.mark.parametrize("name", BASES)
def test_the_published_settings(name):
    config = load_config(CONFIGS / f"{name}.yaml")
    objective = assemble.objective_of(config.regularizers)
    assert objective.mask_alignment == "shifted"
    assert {one.term.name: (one.weight, one.schedule.name) for one in objective.weighted} == {
        "consistency": (0.025, "cosine"),
        "diversity": (0.005, "two_phase"),
        "spectral": (0.005, "two_phase"),
    }
    assert objective["consistency"].term.temperature == 2.0
    assert objective["diversity"].term.top_k == 20
    spectral = objective["spectral"].term
    assert (spectral.k, spectral.norm, spectral.center_rows) == (10, "frobenius", False)
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
    decoder = read_config(BASES[name], name)
    adapters = adapters_of(config.adapter, decoder, structure(decoder, dtype="bfloat16"))
    assert trainable_parameters(adapters.modules) == PUBLISHED_COUNTS[name]


# Epochs, batch, learning rate and alpha of the published GLUE runs.
DEBERTA = {
    "mnli": (5, 16, 5e-4, 8), "sst2": (20, 16, 3e-5, 8), "mrpc": (20, 32, 2e-4, 8),
    "cola": (20, 16, 1e-4, 8), "qnli": (10, 32, 1e-4, 16), "qqp": (10, 16, 1e-4, 8),
    "rte": (50, 16, 1e-4, 8), "stsb": (20, 8, 3e-4, 8),
}  # fmt: skip
DEBERTA_V3_BASE = {
    "model_type": "deberta-v2", "vocab_size": 128100, "hidden_size": 768,
    "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "max_position_embeddings": 512, "relative_attention": True, "position_buckets": 256,
    "max_relative_positions": -1, "share_att_key": True, "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0,
    "pad_token_id": 0, "layer_norm_eps": 1e-7, "hidden_act": "gelu", "pooler_hidden_act": "gelu",
    "pooler_hidden_size": 768, "pooler_dropout": 0,
}  # fmt: skip


@pytest.mark.parametrize("task", DEBERTA)
def test_the_published_settings_of_glue(task):
    config = load_config(CONFIGS / f"deberta_v3_base_{task}.yaml")
    training, terms = config.training, config.regularizers
    found = (training.epochs, training.batch_size, training.learning_rate, config.adapter.alpha)
    assert found == DEBERTA[task]
    assert (config.task, config.data.glue, config.data.max_length) == ("labels", task, 128)
    assert (terms.consistency, terms.diversity, terms.spectral, terms.k) == (0.15, 0.03, 0.03, 5)
    assert (training.schedule, training.warmup, training.seed) == ("linear", 0.1, 42)
    base = read_config(DEBERTA_V3_BASE, task, num_labels=2)
    modules = adapters_of(config.adapter, base, structure(base, dtype="float32")).modules
    # 12 layers, Q, K and V, rank 8, from 768 to 768.
    assert trainable_parameters(modules) == 12 * 3 * 8 * (768 + 768) == 442_368


def test_the_study_is_45_runs_of_five_tasks():
    runs = plan_runs(load_config(CONFIGS / "study_minilm_glue.yaml"), CONFIGS)
    assert len({run.folder for run in runs}) == 45
    weights = {
        (run.variant, run.config.adapter.start, run.config.regularizers.consistency) for run in runs
    }
    assert weights == {("LoRA", "lora", 0), ("PiSSA", "pissa", 0), ("BA-LoRA", "pissa", 0.15)}
    tasks = {(run.config.data.glue, run.config.data.max_length) for run in runs}
    assert tasks == {("sst2", 48), ("mrpc", 64), ("rte", 64), ("cola", 32), ("stsb", 48)}
    assert all(run.dataset == run.config.data.glue for run in runs)
