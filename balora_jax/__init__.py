"""BA-LoRA in JAX/Flax: LoRA-family fine-tuning with consistency, diversity and SVD regularizers."""

from balora_jax.config import RunConfig, load_config
from balora_jax.errors import InputError, RunStoppedError
from balora_jax.io.pretrained import PretrainedModel, load_pretrained
from balora_jax.training.loop import fit

__version__ = "0.1.0"

__all__ = [
    "InputError",
    "PretrainedModel",
    "RunConfig",
    "RunStoppedError",
    "fit",
    "load_config",
    "load_pretrained",
]
