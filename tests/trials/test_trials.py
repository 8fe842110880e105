"""A few of the kills, signals and overlaps; the commands of this folder do hundreds.

``BALORA_KILL_TRIALS=100`` does so many of each kind, ``BALORA_SEAL_BYTES=all`` alters every byte of a
checkpoint, in minutes.
"""

import os
import shutil

import numpy as np
import pytest

from tests.trials import kills, overlaps
from tests.trials.alterations import all_bytes, missed
from tests.trials.subject import STEPS

TRIALS = int(os.environ.get("BALORA_KILL_TRIALS", "1"))
SAMPLE = 200
"""Bytes of a checkpoint that the default tests alter."""


@pytest.mark.parametrize("name", ["KILL", "TERM"])
@pytest.mark.parametrize("number", range(TRIALS))
def test_a_run_that_is_ended_goes_on_to_the_same_bytes(undisturbed, tmp_path, name, number):
    # The first is told by a change of the folder, which no clock can miss.
    found = kills.trial(undisturbed, tmp_path, number + 3, name)
    assert found["wrong"] == []


@pytest.mark.parametrize("number", range(TRIALS))
def test_of_two_live_commands_one_wins(undisturbed, tmp_path, number):
    assert overlaps.trial(undisturbed, tmp_path, number)["wrong"] == []


def test_every_byte_of_a_checkpoint(undisturbed, tmp_path):
    there = undisturbed.expected / "checkpoints" / str(STEPS)
    folder = shutil.copytree(there, tmp_path / str(STEPS))
    places, rng = all_bytes(folder), np.random.default_rng(0)
    if os.environ.get("BALORA_SEAL_BYTES") != "all":
        places = [places[i] for i in rng.choice(len(places), SAMPLE, replace=False)]
    assert missed(folder, STEPS, places, rng) == []
