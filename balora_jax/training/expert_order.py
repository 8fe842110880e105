"""The order of experts in a checkpoint: that of one device, whatever the mesh."""

import functools
from typing import Any

import jax

from balora_jax.array_types import Array
from balora_jax.models.decoder_config import DecoderConfig
from balora_jax.models.encoder_config import EncoderConfig

_STACK = ".experts."
"""Within the paths of stacks of experts."""


def as_stored(tree: Any, config: DecoderConfig | EncoderConfig) -> Any:
    """A run's arrays with stacks of experts in the order of one device, laid out as before.

    Args:
        tree: arrays under paths of the model, at any depth.
        config: of the model, with its ``expert_groups``.
    """
    return _ordered(tree, config, stored=True)


def as_held(tree: Any, config: DecoderConfig | EncoderConfig) -> Any:
    """The reverse of :func:`as_stored`."""
    return _ordered(tree, config, stored=False)


def _ordered(tree: Any, config: DecoderConfig | EncoderConfig, *, stored: bool) -> Any:
    groups = getattr(config, "expert_groups", 1)
    if groups == 1:
        return tree
    sizes = (groups, config.num_layers) if stored else (config.num_layers, groups)
    leaves, shape = jax.tree_util.tree_flatten_with_path(tree)
    moved = [
        _swap(sizes, leaf.sharding)(leaf) if _STACK in jax.tree_util.keystr(path) else leaf
        for path, leaf in leaves
    ]
    return jax.tree.unflatten(shape, moved)


@functools.cache
def _swap(sizes: tuple[int, int], sharding: Any) -> Any:
    """A program that swaps the first two of the axes that lie in the leading one."""

    def swap(leaf: Array) -> Array:
        apart = leaf.reshape(*sizes, -1, *leaf.shape[1:])
        return apart.swapaxes(0, 1).reshape(leaf.shape)

    return jax.jit(swap, out_shardings=sharding)
