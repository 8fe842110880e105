"""Type checks of the package in the tests: wherever one of its functions is called."""

import functools

import beartype
import jaxtyping
from jax.sharding import AbstractMesh, Mesh

check = beartype.beartype(
    conf=beartype.BeartypeConf(
        is_pep484_tower=True,  # an int where a float is expected is what PEP 484 allows
        # A plan lays a step out over a mesh without devices; jax has no type for both.
        hint_overrides=beartype.FrozenDict({Mesh: Mesh | AbstractMesh}),
    )
)


@functools.cache
def switch_on() -> None:
    """Check what is imported of the package from now on."""
    jaxtyping.install_import_hook("balora_jax", f"{__name__}.check")
