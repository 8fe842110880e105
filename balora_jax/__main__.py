"""``python -m balora_jax``: the same as ``balora``."""

from balora_jax.parallel import child

if __name__ == "__main__":
    child.divert_native_log()  # before other modules find a sys.stderr to keep
    from balora_jax.cli import command

    command()
