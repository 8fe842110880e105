"""BA-LoRA in JAX/Flax: LoRA-family fine-tuning with consistency, diversity and SVD regularizers.

The names below make whole runs, as ``balora`` does. The parts to build with lie in
:mod:`balora_jax.regularizers`, :mod:`balora_jax.heads`, :mod:`balora_jax.adapters` and
:mod:`balora_jax.generation`. Each is loaded when it is first used, with what it needs of JAX,
``transformers`` and the rest.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for readers and tools; `_HOMES` says the same to Python
    from balora_jax.config import RunConfig
    from balora_jax.config_file import load_config
    from balora_jax.errors import InputError, RunStoppedError
    from balora_jax.finetune import fit
    from balora_jax.pretrained.load import PretrainedEncoder, PretrainedModel, load_pretrained

# XLA's linear algebra on CPUs calls OpenBLAS, whose threads spin against XLA's own: on two busy
# cores an SVD of 2048 x 128 took 70 times longer with them. It is read when NumPy is first loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# What libraries say while they load would stand before the one sentence of an error.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is not installed

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

_HOMES = {
    "InputError": "errors",
    "PretrainedEncoder": "pretrained.load",
    "PretrainedModel": "pretrained.load",
    "RunConfig": "config",
    "RunStoppedError": "errors",
    "fit": "finetune",
    "load_config": "config_file",
    "load_pretrained": "pretrained.load",
}


def __getattr__(name: str) -> Any:
    """A public name, from its module, when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
