"""Models: NNX modules that define parameters and the forward, addressed as flat dicts of arrays."""
