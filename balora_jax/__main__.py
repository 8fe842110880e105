"""``python -m balora_jax``: the same as ``balora``."""

import sys

from balora_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
