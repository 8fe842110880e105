"""``jax.jit`` for programs that a test runs a few times: compiled in about half the time."""

from functools import partial

import jax

OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

jit = partial(jax.jit, compiler_options=OPTIONS)
