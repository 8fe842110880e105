"""How do text files become batches? Rows (sources), tokens (examples), arrays (batches)."""
