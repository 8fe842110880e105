"""A model without its arrays: its graph, and the shape and logical axes of every array it needs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from balora_jax.array_types import Array, Axes
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


def structure_of(
    make: Callable[[Quantization], nnx.Module], quantization: Quantization = "none"
) -> Structure:
    """The structure of a module, from shapes alone (no array is made).

    Args:
        make: the module, with its linear layers quantised so.
        quantization: of the linear layers.

    Raises:
        InputError: a layer that the quantisation cannot hold.
    """

    def split(quantization: Quantization) -> Any:
        # Head and adapter variables are Params as well, so they are named first.
        module = nnx.eval_shape(lambda: make(quantization))
        return nnx.split(module, HeadParam, nnx.LoRAParam, Origin, nnx.Param)

    graph, *states = split(quantization)
    head, adapters, origin, frozen = (_shapes(state) for state in states)
    plain = states[-1] if quantization == "none" else split("none")[-1]
    axes = {path: axes_of(leaf) for state in (*states, plain) for path, leaf in _leaves(state)}
    return Structure(graph, frozen, adapters, origin, head, _shapes(plain), quantization, axes)


def _shapes(state: nnx.State) -> Shapes:
    return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in _leaves(state)}


def _leaves(state: nnx.State) -> list[tuple[str, Any]]:
    """Variables by dotted path."""
    return [(".".join(map(str, path)), leaf) for path, leaf in nnx.to_flat_state(state)]
