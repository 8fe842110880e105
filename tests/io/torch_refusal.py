"""The one sentence about a file of torch's that is not read."""

import pytest

from balora_jax.errors import InputError
from balora_jax.io.torch_files import open_torch


def refused(file):
    """What the sentence says it got."""
    with pytest.raises(InputError) as caught, open_torch(file):
        pass
    said = str(caught.value)
    assert said.startswith(f"{file}: expected a complete file of tensors by name, as torch saves")
    assert said.endswith("Download it again, or use safetensors weights of somebody you trust.")
    assert said.isprintable()
    assert len(said) < len(str(file)) + 400
    return said.partition(", got ")[2]
