"""Graders of others, so that figures can be compared with theirs: how each reads, and compares."""

from balora_jax.evals.graders import authors, lm_eval

NUMBER_GRADERS = (authors.NUMBERS, lm_eval.STRICT_NUMBERS, lm_eval.FLEXIBLE_NUMBERS)
"""For benchmarks whose answers are numbers."""

MATH_GRADERS = (authors.MATHEMATICS, lm_eval.STRICT_MATHEMATICS, lm_eval.FLEXIBLE_MATHEMATICS)
"""For MATH."""
