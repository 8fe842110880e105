"""Low-rank adapters that are measured from their own start.

Every adapted layer computes ``y = x W + s·(x A B − x A₀ B₀)``: W is never changed, and at the start
the difference is exactly zero, whatever A₀ and B₀ are. So one set of weights serves the student and
its teacher, any start works the same way, and what was trained leaves as an ordinary adapter.

On a model of your own, :func:`adapt` is all that is needed: it gives the ``nnx.Linear`` layers that
you name their adapters. What trains are the variables of type ``nnx.LoRAParam``:

    model = adapt(model, rank=8, target_modules=["query", "value"], key=jax.random.key(0))
    graph, trainable, frozen = nnx.split(model, nnx.LoRAParam, ...)

``load_pretrained(...).with_adapters(...)`` is the same for a Hugging Face checkpoint.

The parts that both are made of, for layers of another kind:

- :class:`LinearShape` and :func:`plan_adapters`: which layers, by the names and patterns of PEFT,
  with the rank and the scale of each (:class:`AdaptedModule`);
- :data:`STARTS` and :func:`start_adapters`: where A and B begin (``lora``, ``pissa``,
  ``pissa_niter_N``, ``milora``, ``olora``, ``orthogonal``), as flat dicts of stacked arrays: what
  trains, and the constants that it is measured from;
- :data:`METHODS`: what trains and what a layer computes with it (``lora``, ``dora``, ``lora_fa``);
- :class:`Linear`: a stack of layers ``[L, D_in, D_out]`` for a ``jax.lax.scan``, with the arrays
  that an :class:`AdapterShape` asks for. The constants are :class:`Origin` variables.

>>> import jax
>>> shapes = [LinearShape("mlp.up", ("layers.0.up", "layers.1.up"), 4, 8)]
>>> [m.name for m in plan_adapters(shapes, rank=2, alpha=4, target_modules=["1.up"])]
['layers.1.up']
>>> sorted(STARTS)
['lora', 'milora', 'olora', 'orthogonal', 'pissa', 'pissa_niter_N']
"""

from balora_jax.models.adapt import adapt
from balora_jax.models.adapters import AdaptedModule, AdapterShape, LinearShape, plan_adapters
from balora_jax.models.linear import Linear
from balora_jax.models.methods import METHODS
from balora_jax.models.starts import STARTS
from balora_jax.models.starts.stacks import start_adapters
from balora_jax.models.variables import Origin

__all__ = [
    "METHODS",
    "STARTS",
    "AdaptedModule",
    "AdapterShape",
    "Linear",
    "LinearShape",
    "Origin",
    "adapt",
    "plan_adapters",
    "start_adapters",
]
