"""How do text files become batches? Sources (rows), examples (tokens and mask), batches (arrays)."""
