"""Time and memory of a training step, term by term and beside torch."""
