"""Bytes of a sealed folder, each altered once."""

from balora_jax.io import seals


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def all_bytes(folder):
    return [(file, place) for file in files_of(folder) for place in range(file.stat().st_size)]


def missed(folder, step, places, rng):
    """Places whose byte can be another one, unnoticed."""
    found = []
    for file, place in places:
        whole = file.read_bytes()
        changed = bytearray(whole)
        changed[place] ^= int(rng.integers(1, 256))
        file.write_bytes(changed)
        if seals.damage(folder, step) is None:
            found.append((file.name, place, whole[place], changed[place]))
        file.write_bytes(whole)
    assert seals.damage(folder, step) is None
    return found
