"""A model without its arrays: its graph, and the shape and logical axes of every array it needs."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from balora_jax.array_types import Array, Axes
from balora_jax.models.adapters import AdapterShape
from balora_jax.models.decoder_config import EMBEDDING, DecoderConfig
from balora_jax.models.encoder_config import EncoderConfig
from balora_jax.models.families.base import family_of
from balora_jax.models.options import AttentionKernel, Options, Remat
from balora_jax.models.quantized import Quantization
from balora_jax.models.variables import HeadParam, Origin, axes_of
from balora_jax.models.whole import NOTHING, TOKEN_ROWS, Whole

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
        aliases: weights that the checkpoint has not → the one of it that they are.
        token_rows: ids of the rows of the token embeddings that train alone.
    """

    graph: nnx.GraphDef
    frozen: Shapes
    adapters: Shapes
    origin: Shapes
    head: Shapes
    parameters: Shapes
    quantization: Quantization
    axes: dict[str, Axes]
    aliases: Mapping[str, str] = field(default_factory=dict)
    token_rows: tuple[int, ...] = ()

    def bind(self, *parts: Mapping[str, Array]) -> Any:
        """The module with these arrays (flat dicts, merged; of two of one path the later).

        Weights that train in float32 are cast to the dtype of the frozen ones.
        """
        merged: dict[str, Array] = {}
        for part in parts:
            for path, value in part.items():
                dtype = self.frozen[path].dtype if path in self.frozen else value.dtype
                merged[path] = value if value.dtype == dtype else value.astype(dtype)
        for path, source in self.aliases.items():
            merged.setdefault(path, parts[0][source])
        if (rows := merged.pop(TOKEN_ROWS, None)) is not None:
            table = merged[EMBEDDING]
            at = jnp.asarray(self.token_rows)
            merged[EMBEDDING] = table.at[at].set(rows.astype(table.dtype))
        tree: dict = {}
        for path, value in merged.items():
            *parents, leaf = path.split(".")
            node = tree
            for name in parents:
                node = node.setdefault(name, {})
            node[leaf] = value
        return nnx.merge(self.graph, nnx.State(tree))


def structure(
    config: DecoderConfig | EncoderConfig,
    *,
    adapters: Mapping[str, AdapterShape] | None = None,
    dtype: jnp.dtype | str = jnp.float32,
    remat: Remat = "none",
    kernel: AttentionKernel = "xla",
    quantization: Quantization = "none",
    whole: Whole = NOTHING,
) -> Structure:
    """The model of a config, from shapes alone (no array is made).

    Args:
        config: what the checkpoint fixes.
        adapters: of stacked linear layers, by path.
        dtype: of frozen weights and activations.
        remat: what the backward computes anew.
        kernel: of a decoder's attention.
        quantization: of the linear layers.
        whole: weights of its own that the model has in place of the checkpoint's.

    Raises:
        InputError: a layer that the quantisation cannot hold.
    """
    options = Options(adapters or {}, jnp.dtype(dtype), remat, kernel, quantization)
    config = whole.of(config)
    found = structure_of(lambda options: family_of(config).build(config, options), options)
    axes = found.axes | ({TOKEN_ROWS: (None, "width")} if whole.tokens else {})
    return replace(found, aliases=whole.aliases, token_rows=whole.tokens, axes=axes)


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


def size_of(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    """Numbers in all arrays."""
    return sum(math.prod(leaf.shape) for leaf in shapes.values())


def _shapes(state: nnx.State) -> Shapes:
    return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in _leaves(state)}


def _leaves(state: nnx.State) -> list[tuple[str, Any]]:
    """Variables by dotted path."""
    return [(".".join(map(str, path)), leaf) for path, leaf in nnx.to_flat_state(state)]
