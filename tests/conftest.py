import gc
import os

# Thousands of tests leave millions of objects, which a collection looks through each time.
gc.set_threshold(50_000, 20, 50)
# Before NumPy is loaded: two test workers with two BLAS threads each would spend their time waiting.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from tests import compiler

# Before JAX is, for this process and for those that tests start.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {compiler.flags()}".strip()
compiler.cache()
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")

from collections import Counter
from pathlib import Path

import hypothesis
import jaxtyping
import pytest

from tests import bucket, checked

checked.switch_on()  # before the package is imported
# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")


@pytest.fixture(scope="module", autouse=True)
def registries_as_they_were():
    """What a file of tests registers ends with it."""
    from tests.registered import put_back

    with put_back():
        yield


@pytest.fixture
def type_checks_off():
    """Let a wrong argument reach the function's own message."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture
def a_bucket(tmp_path):
    """A folder to which ``gs://`` leads."""
    with bucket.installed(tmp_path / "bucket") as root:
        yield root


@pytest.fixture(scope="session")
def shared():
    """Real data sets and a small real checkpoint beside the checkout; absent on most machines."""
    folder = Path(__file__).parents[1].parent / "shared"
    if not folder.is_dir():
        pytest.skip("no folder ../shared beside the checkout")
    return folder


def pytest_terminal_summary(terminalreporter):
    """The parity table: largest error of every family's logits, as a share of their range.

    And how many bad inputs had which outcome.
    """
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.getreports(kind)]
    rows = sorted({value for r in reports for key, value in r.user_properties if key == "parity"})
    said = [value for r in reports for key, value in r.user_properties if key == "bad_input"]
    if said:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in Counter(said).most_common())
        terminalreporter.section(f"{len(said)} bad inputs")
        terminalreporter.write_line(counts)
    if rows:
        terminalreporter.section("logits against transformers, float32, share of their range")
        terminalreporter.write_line("\n".join(rows))
