"""Benchmarks, and the scores of written answers and of predicted labels."""
