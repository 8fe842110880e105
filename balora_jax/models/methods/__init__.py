"""Adapter methods: one a file, each an object under its name in ``METHODS``.

``method.py`` says what a method is: its arrays, what a layer computes with them, how they begin.
"""

from balora_jax.models.methods.dora import DORA
from balora_jax.models.methods.full import FULL
from balora_jax.models.methods.lora import LORA
from balora_jax.models.methods.lora_fa import LORA_FA
from balora_jax.models.methods.method import Method
from balora_jax.registry import Registry

METHODS: Registry[Method] = Registry("method", "adapter.method")
for _method in (LORA, DORA, LORA_FA, FULL):
    METHODS.register(_method)
