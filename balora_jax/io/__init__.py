"""Edges: the only files that read or write checkpoints, adapters and run records."""
