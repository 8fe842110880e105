"""The head's pass with rows and vocabulary split over devices equals the pass on one device."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.numerics import head_bounds, sharded_head


@pytest.fixture(scope="module")
def found():
    done = subprocess.run(
        [sys.executable, "-m", "tests.numerics.sharded_head"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@functools.cache
def computation(case):
    rows, embedding = sharded_head.arrays()
    return head_bounds.Case(
        rows, embedding, sharded_head.SCALES, sharded_head.ADAPTIVE, *sharded_head.CASES[case]
    )


@pytest.mark.parametrize("mesh", sharded_head.MESHES)
@pytest.mark.parametrize("case", sharded_head.CASES)
def test_equals_one_device(found, case, mesh):
    pair, bounds = found[f"{case} / {mesh}"], computation(case)
    # Each of the two may lie a bound away from the exact value.
    for name, bound in bounds.values.items():
        assert abs(pair["mesh"][name] - pair["one"][name]) <= 2 * bound, name
    assert pair["gradient"] <= 2 * bounds.gradient
    for side in ("one", "mesh"):
        assert pair[side].keys() - bounds.values.keys() == {"spectral_residual"}
        assert pair[side]["spectral_residual"] <= bounds.ratio.residual
    assert pair["one"]["spectral"] < -0.01


@pytest.mark.parametrize("case", sharded_head.CASES)
def test_bounds_are_far_below_what_a_device_adds(found, case):
    bounds = computation(case)
    device = bounds.used // (sharded_head.N // 8)
    for name, (rows, mask) in bounds.rows.items():
        by = bounds.spec.temperature**2 if name == "consistency_sum" else 1
        shares = by * np.bincount(device, np.where(mask, rows.values, 0))
        # The first device owns one row.
        assert 2 * bounds.values[name] < shares[1:].min() / 30, name
    parts = found[f"{case} / data"]["parts"]
    assert 2 * bounds.gradient < min(parts[1:]) / 50
