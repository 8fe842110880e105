"""Checkpoints from before ``data.packing`` had names: the same run, or refused by the key."""

import pytest

from balora_jax.errors import InputError
from balora_jax.io.same_run import Identity, check_same_run


def identity(packing, task="text"):
    return Identity({"task": task, "data": {"packing": packing, "train": "a"}}, "base", "")


@pytest.mark.parametrize(("saved", "now"), [(False, "none"), (True, "rows"), ("batch", "batch")])
def test_the_same_packing_goes_on(saved, now):
    check_same_run(identity(saved), identity(now), "run")


@pytest.mark.parametrize(
    ("saved", "now", "said"),
    [
        (False, "batch", "expected data.packing to stay 'none', got 'batch'"),
        (True, "batch", "expected data.packing to stay 'rows', got 'batch'"),
        ("none", "batch", "expected data.packing to stay 'none', got 'batch'"),
        ("batch", "none", "expected data.packing to stay 'batch', got 'none'"),
    ],
)
def test_another_packing_is_another_run(saved, now, said):
    with pytest.raises(InputError, match=said):
        check_same_run(identity(saved), identity(now), "run")


@pytest.mark.parametrize("now", ["batch", "none"])
def test_rows_with_labels_were_never_packed(now):
    check_same_run(identity(False, "labels"), identity(now, "labels"), "run")
