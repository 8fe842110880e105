"""What is computed on plain arrays? Linear algebra, regularizers, losses, head, objective."""
