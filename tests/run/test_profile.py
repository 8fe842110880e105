"""Traces: the one that was asked for, and no other."""

import gzip
import json

import pytest

from tests.run.conftest import invoke
from tests.tiny_run import FEW, metrics_of, write_config

pytestmark = pytest.mark.usefixtures("no_curves")


def train(tmp_path, inputs, **training):
    config = write_config(tmp_path / "config.yaml", inputs, adapter=FEW, training=training)
    return invoke("train", config, "--workdir", tmp_path / "run")


def test_a_trace_of_two_steps(tmp_path, inputs):
    outcome = train(tmp_path, inputs, profile_steps=[2, 3])
    assert outcome.code == 0, outcome.err
    folder = tmp_path / "run" / "profile"
    assert f"profile: {folder} (steps 2 to 3)" in outcome.out
    (tensorboard,) = folder.rglob("*.xplane.pb")
    assert tensorboard.stat().st_size > 1000
    (perfetto,) = folder.rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(perfetto.read_bytes()))["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert names.count("train") == 2
    assert any("dot" in name for name in names)
    assert len(metrics_of(tmp_path / "run")) == 4


def test_a_trace_that_the_end_of_the_run_cuts_short(tmp_path, inputs):
    outcome = train(tmp_path, inputs, profile_steps=[4, 9])
    assert outcome.code == 0, outcome.err
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_first_after_last(tmp_path, inputs):
    outcome = train(tmp_path, inputs, profile_steps=[3, 2])
    assert outcome.code == 2
    assert "training.profile_steps: expected first <= last, got [3, 2]. Swap them." in outcome.err
