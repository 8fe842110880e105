"""``python train.py CONFIG --workdir DIR``: the same code as ``balora train``."""

import sys

from balora_jax.cli import command

if __name__ == "__main__":
    command(["train", *sys.argv[1:]])
