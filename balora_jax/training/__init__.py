"""Training: where arrays lie, how they are updated, and the loop that wires a run."""
