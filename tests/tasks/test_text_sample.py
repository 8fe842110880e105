"""The consistency term on a sample of rows: on average that of all rows, with either head.

``BALORA_SAMPLES=all`` has the plain head, and a mesh, too.
"""

import json
import os
import subprocess
import sys
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balora_jax.tasks.text.sample import RowSample
from tests.tasks.sample_program import ON, Given, compute
from tests.training import tiny_loss

ALL = os.environ.get("BALORA_SAMPLES") == "all"
CASES = {"fused": ("fused", ON)}
if ALL:
    CASES |= {"plain": ("plain", ON)}
TAKEN = 2
SUBSETS = tuple(combinations(range(4), TAKEN))
EACH = Given(4, TAKEN, table=tuple((chosen,) for chosen in SUBSETS))


@pytest.mark.parametrize("case", CASES)
def test_the_mean_over_all_samples_is_the_term_on_all_rows(case):
    head, on = CASES[case]
    (loss, parts), gradient = compute(head, on=on)()
    each = compute(head, EACH, on=on)
    found = [each(number) for number in range(len(SUBSETS))]
    values = [float(f[0][1]["consistency"]) for f in found]
    assert max(values) - min(values) > 0.1 * float(parts["consistency"])  # they do differ
    mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *found)
    np.testing.assert_allclose(mean[0][0], loss, rtol=2e-6)
    for name, value in parts.items():
        np.testing.assert_allclose(mean[0][1][name], value, rtol=2e-6, err_msg=name)
        if name != "consistency":
            assert all(f[0][1][name] == pytest.approx(float(value), rel=2e-6) for f in found), name
    for path, value in gradient.items():
        np.testing.assert_allclose(mean[1][path], value, rtol=2e-4, atol=2e-6, err_msg=path)


def test_what_is_drawn():
    sample = RowSample(rows=5, taken=2, parts=3)
    keys = jax.random.split(jax.random.key(0), 400)
    drawn = np.asarray(jax.vmap(sample.draw)(keys))
    assert drawn.shape == (400, 3, 2)
    assert (np.diff(drawn, axis=2) > 0).all()
    for part in range(3):
        shares = np.bincount(drawn[:, part].ravel(), minlength=5) / 400
        assert np.abs(shares - 0.4).max() < 0.09  # 3.7 standard deviations
    assert len({tuple(row.ravel()) for row in drawn}) > 300  # devices do not draw alike
    mask = np.asarray(sample.mask(jnp.asarray(drawn[0])))
    assert np.flatnonzero(mask).tolist() == [5 * p + i for p in range(3) for i in drawn[0, p]]


def test_a_kept_teacher_runs_no_layers():
    shape = (*tiny_loss.batch(1)["input_ids"].shape, tiny_loss.MODEL.hidden_size)
    given = {"teacher_hidden": np.zeros(shape, np.float32)}
    each, once = (str(jax.make_jaxpr(compute(**more))(0)) for more in ({}, given))
    scans = f"length={tiny_loss.LAYERS}"
    assert each.count(scans) - once.count(scans) == 1


@pytest.mark.skipif(not ALL, reason="a process with four devices: BALORA_SAMPLES=all")
def test_a_mesh_of_rows_and_tokens_gives_what_one_device_does(tmp_path):
    program = [sys.executable, "-m", "tests.tasks.sample_program", str(tmp_path / "found.json")]
    subprocess.run(program, check=True)
    both = json.loads((tmp_path / "found.json").read_text())
    for case, wanted in both["wanted"].items():
        for name, value in wanted.items():
            assert both["found"][case][name] == pytest.approx(value, rel=2e-5, abs=2e-5), (
                case,
                name,
            )
