"""A packed step is the padded step: losses, terms, gradient norms and what they leave.

``BALORA_PACKED_STEPS=50`` takes so many steps of every case, those on eight devices too.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import compiler
from tests.tasks.packed_steps import CASES, compared

MANY = os.environ.get("BALORA_PACKED_STEPS")
QUICK = ("text",)


def check(found, share=0.9):
    assert max(found["values"].values()) < 1e-5, found
    assert found["gradients"] < 1e-5, found
    assert min(found["terms"].values()) > 1e-5  # each is at work
    padded, packed = found["places"]
    assert packed < share * padded


@pytest.mark.parametrize("case", QUICK)
def test_a_packed_step_is_the_padded_step(case):
    check(compared(case, 2, shapes=2), share=1.0)


@pytest.mark.skipif(MANY is None, reason="minutes; asked for with BALORA_PACKED_STEPS")
@pytest.mark.parametrize("case", CASES)
def test_many_steps_of_every_case(case):
    devices = 8 if "mesh" in case else 1
    environment = os.environ | compiler.on_cpu(devices) | {"BALORA_DEVICES": str(devices)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.tasks.packed_steps", str(MANY), case],
        cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    check(found)
    assert found["shapes"] > 1
