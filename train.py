"""``python train.py CONFIG --workdir DIR``: the same code as ``balora train``."""

import sys

from balora_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
