"""Benchmarks, which models are scored on: one a file, each an object under its name."""

from balora_jax.evals.benchmark import Benchmark
from balora_jax.evals.tasks.asdiv import ASDIV
from balora_jax.evals.tasks.exact_match import EXACT_MATCH
from balora_jax.evals.tasks.gsm8k import GSM8K
from balora_jax.evals.tasks.gsm_hard import GSM_HARD
from balora_jax.evals.tasks.labels import LABELS
from balora_jax.evals.tasks.math import MATH
from balora_jax.evals.tasks.none import NONE
from balora_jax.evals.tasks.svamp import SVAMP
from balora_jax.registry import Registry

BENCHMARKS: Registry[Benchmark] = Registry("benchmark", "eval.task")
for _benchmark in (EXACT_MATCH, GSM8K, GSM_HARD, SVAMP, ASDIV, MATH, LABELS, NONE):
    BENCHMARKS.register(_benchmark)
