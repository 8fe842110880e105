"""A model without its arrays: its graph, and the shape and logical axes of every array it needs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from balora_jax.array_types import Array, Axes
from balora_jax.models.adapters import AdapterShape
from balora_jax.models.decoder_config import DecoderConfig
from balora_jax.models.encoder_config import EncoderConfig
from balora_jax.models.families.base import family_of
from balora_jax.models.options import AttentionKernel, Options, Remat
from balora_jax.models.quantized import Quantization
from balora_jax.models.variables import HeadParam, Origin, axes_of

Shapes = dict[str, jax.ShapeDtypeStruct]


@dataclass(frozen=True)
class Structure:
    """A module without its arrays.

    Attributes:
        graph: NNX graph definition (static, hashable).
        frozen, adapters, origin, head: shapes by dotted path: checkpoint weights as they are
            held, trainable factors, the constants of the adapters, and the trainable head of an
            encoder (empty for decoders).
        parameters: the checkpoint weights before any quantisation.
        quantization: of the linear layers.
        axes: the logical axes of each of these arrays, by dotted path.
    """

    graph: nnx.GraphDef
    frozen: Shapes
    adapters: Shapes
    origin: Shapes
    head: Shapes
    parameters: Shapes
    quantization: Quantization
    axes: dict[str, Axes]

    def bind(self, *parts: Mapping[str, Array]) -> Any:
        """The module with these arrays (flat dicts, merged; of two of one path the later).

        Weights that train in float32 are cast to the dtype of the frozen ones.
        """
        tree: dict = {}
        for part in parts:
            for path, value in part.items():
                *parents, leaf = path.split(".")
                node = tree
                for name in parents:
                    node = node.setdefault(name, {})
                dtype = self.frozen[path].dtype if path in self.frozen else value.dtype
                node[leaf] = value if value.dtype == dtype else value.astype(dtype)
        return nnx.merge(self.graph, nnx.State(tree))


def structure(
    config: DecoderConfig | EncoderConfig,
    *,
    adapters: Mapping[str, AdapterShape] | None = None,
    dtype: jnp.dtype | str = jnp.float32,
    remat: Remat = "none",
    kernel: AttentionKernel = "auto",
    quantization: Quantization = "none",
) -> Structure:
    """The model of a config, from shapes alone (no array is made).

    Args:
        config: what the checkpoint fixes.
        adapters: of stacked linear layers, by path.
        dtype: of frozen weights and activations.
        remat: what the backward computes anew.
        kernel: of a decoder's attention.
        quantization: of the linear layers.

    Raises:
        InputError: a layer that the quantisation cannot hold.
    """
    options = Options(adapters or {}, jnp.dtype(dtype), remat, kernel, quantization)
    return structure_of(lambda options: family_of(config).build(config, options), options)


def structure_of(make: Callable[[Options], nnx.Module], options: Options) -> Structure:
    """The structure of any module whose arrays were :func:`~.variables.declared`.

    Args:
        make: the module, built so.
        options: how.
    """

    def split(options: Options) -> Any:
        # Head and adapter variables are Params as well, so they are named first.
        module = nnx.eval_shape(lambda: make(options))
        return nnx.split(module, HeadParam, nnx.LoRAParam, Origin, nnx.Param)

    graph, *states = split(options)
    head, adapters, origin, frozen = (_shapes(state) for state in states)
    plain = frozen
    if options.quantization != "none":
        plain = _shapes(split(replace(options, quantization="none"))[-1])
    axes = {path: axes_of(leaf) for state in states for path, leaf in _leaves(state)}
    return Structure(graph, frozen, adapters, origin, head, plain, options.quantization, axes)


def _shapes(state: nnx.State) -> Shapes:
    return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in _leaves(state)}


def _leaves(state: nnx.State) -> list[tuple[str, Any]]:
    """Variables by dotted path."""
    return [(".".join(map(str, path)), leaf) for path, leaf in nnx.to_flat_state(state)]
