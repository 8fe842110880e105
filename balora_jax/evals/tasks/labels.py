"""The labels of the validation rows, by the metrics of their own task (accuracy, F1, …)."""

from balora_jax.evals.benchmark import Benchmark

LABELS = Benchmark(name="labels", task="labels")
