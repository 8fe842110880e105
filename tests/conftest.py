import os

# Before NumPy is loaded: two test workers with two BLAS threads each would spend their time waiting.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared():
    """Real data sets and a small real checkpoint beside the checkout; absent on most machines."""
    folder = Path(__file__).parents[1].parent / "shared"
    if not folder.is_dir():
        pytest.skip("no folder ../shared beside the checkout")
    return folder
