"""No score at all, for any task."""

from balora_jax.evals.benchmark import Benchmark

NONE = Benchmark(name="none")
