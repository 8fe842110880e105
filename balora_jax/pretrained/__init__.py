"""A checkpoint folder as a model: open it, load it, write adapters and merged weights."""
