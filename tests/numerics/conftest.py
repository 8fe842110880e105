"""Fixtures of the numerics tests."""

import jax
import numpy as np
import pytest


@pytest.fixture
def x64():
    """Float64 arithmetic in JAX for one test, so that finite differences mean something."""
    if hasattr(jax, "enable_x64"):
        context = jax.enable_x64(True)
    else:  # jax 0.7
        from jax.experimental import enable_x64

        context = enable_x64()
    with context:
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)
