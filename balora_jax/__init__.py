"""BA-LoRA in JAX/Flax: LoRA-family fine-tuning with consistency, diversity and SVD regularizers."""

import os

# XLA's linear algebra on CPUs calls OpenBLAS, whose threads spin against XLA's own: on two busy
# cores an SVD of 2048 x 128 took 70 times longer with them. It is read when NumPy is first loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

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
