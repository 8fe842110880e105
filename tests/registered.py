"""What is registered, put back as it was: a user's file that one test loads is not another's."""

from contextlib import contextmanager

from balora_jax import extensions
from balora_jax.evals.tasks import BENCHMARKS
from balora_jax.models.families.base import FAMILIES
from balora_jax.models.methods import METHODS
from balora_jax.models.starts import STARTS
from balora_jax.numerics.schedules import SCHEDULES
from balora_jax.numerics.terms import TERMS
from balora_jax.training.trackers import TRACKERS

REGISTRIES = (TERMS, SCHEDULES, STARTS, METHODS, FAMILIES, BENCHMARKS, TRACKERS)


@contextmanager
def put_back():
    """Whatever is registered inside is gone outside."""
    before = [dict(registry._items) for registry in REGISTRIES]
    loaded = set(extensions._LOADED)
    try:
        yield
    finally:
        for registry, items in zip(REGISTRIES, before, strict=True):
            registry._items.clear()
            registry._items.update(items)
        extensions._LOADED.clear()
        extensions._LOADED.update(loaded)
