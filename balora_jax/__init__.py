"""BA-LoRA in JAX/Flax: LoRA-family fine-tuning with consistency, diversity and SVD regularizers."""

import os

from absl import logging as absl_logging

# XLA's linear algebra on CPUs calls OpenBLAS, whose threads spin against XLA's own: on two busy
# cores an SVD of 2048 x 128 took 70 times longer with them. It is read when NumPy is first loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# What libraries say while they load would stand before the one sentence of an error.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is not installed
absl_logging.get_absl_logger().addFilter(
    lambda record: (
        "Grain multiprocess worker profiling" not in record.getMessage()
        # What fails in a thread of orbax is raised again where it was asked for.
        and "orbax" not in record.pathname
    )
)

from balora_jax.config import RunConfig  # noqa: E402
from balora_jax.config_file import load_config  # noqa: E402
from balora_jax.errors import InputError, RunStoppedError  # noqa: E402
from balora_jax.finetune import fit  # noqa: E402
from balora_jax.pretrained.load import (  # noqa: E402
    PretrainedEncoder,
    PretrainedModel,
    load_pretrained,
)

__version__ = "0.1.0"

__all__ = [
    "InputError",
    "PretrainedEncoder",
    "PretrainedModel",
    "RunConfig",
    "RunStoppedError",
    "fit",
    "load_config",
    "load_pretrained",
]
