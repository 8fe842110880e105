"""Computations on plain arrays: linear algebra, terms, losses, head, objective."""
