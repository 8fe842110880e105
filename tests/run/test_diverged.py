"""Files that a run leaves behind when it diverges."""

import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.run.conftest import invoke
from tests.tiny_run import FEW, checkpoint_steps, metrics_of, write_config

pytestmark = pytest.mark.usefixtures("no_curves")


def diverge(tmp_path, inputs, last=None, **training):
    """Step 1 has the learning rate 0 (warm-up), step 2 one that no weight survives."""
    config = write_config(
        tmp_path / "config.yaml",
        inputs,
        adapter=FEW,
        training={
            "max_steps": 8,
            "optimizer": "sgd",
            "learning_rate": 1e30,
            "clip_norm": None,
            "weight_decay": 0.0,
            "schedule": "constant",
            "warmup": 0.5,
            "max_skipped": 0,
            **training,
        },
    )
    code, _, err = invoke("train", config, "--workdir", tmp_path / "run")
    message = err.splitlines()[-1]
    assert code == 3
    last = last or 3 + training.get("max_skipped", 0)
    assert message.startswith(f"balora: training diverged at step {last}: expected a finite loss")
    assert "Traceback" not in err
    rows = metrics_of(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, last + 1))
    assert all(math.isfinite(value) for row in rows[:2] for value in row.values())
    for i, row in enumerate(rows[2:], 1):
        assert row["loss"] is None
        assert (row["skipped"], row["skipped_in_a_row"]) == (i, i)
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # NaN and Infinity are no JSON
    assert not (tmp_path / "run" / "adapter").exists()
    assert not (tmp_path / "run" / "summary.json").exists()
    return message


def test_the_last_good_checkpoint_is_kept_and_named(tmp_path, inputs):
    """Checkpoint 2 holds the weights that gave the loss of step 3, so it is not a good one."""
    message = diverge(tmp_path, inputs, checkpoint_every=1)
    assert 1 in checkpoint_steps(tmp_path / "run")
    named = re.search(r"the last good checkpoint is (\S+?)[.;]? ", message)
    assert named, message
    assert Path(named[1]) == tmp_path / "run" / "checkpoints" / "1"
    restored = ocp.StandardCheckpointer().restore(Path(named[1]) / "state")
    assert int(restored["train"]["step"]) == 1
    adapters, origin = restored["train"]["adapters"], restored["origin"]
    for path, value in adapters.items():  # nothing was learnt yet
        assert np.array_equal(value, origin[path.replace(".lora_", ".origin_")]), path
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(restored))


@pytest.mark.parametrize("keep", [1, 2])
def test_later_steps_without_an_update_leave_checkpoints_alone(tmp_path, inputs, keep):
    """Three more steps without an update write none, so the last good one is not removed."""
    training = {"checkpoint_every": 1, "keep_checkpoints": keep, "max_skipped": 3}
    message = diverge(tmp_path, inputs, **training)
    assert " for 4 steps one after another; the last good checkpoint is " in message
    assert checkpoint_steps(tmp_path / "run") == [1, 2]
    assert str(tmp_path / "run" / "checkpoints" / "1") in message


def test_a_run_does_not_end_on_a_loss_that_is_not_finite(tmp_path, inputs):
    """One such step is allowed in a row, but not as the last."""
    config = {"max_steps": 3, "checkpoint_every": 1, "max_skipped": 1}
    message = diverge(tmp_path, inputs, last=3, **config)
    assert "the last good checkpoint is " in message


def test_weights_that_are_not_finite_are_never_saved(tmp_path, inputs):
    """Here the update itself is not finite, though loss and gradient are."""
    config = write_config(
        tmp_path / "config.yaml",
        inputs,
        adapter=FEW,
        training={
            "max_steps": 1,
            "optimizer": "sgd",
            "learning_rate": 1e38,
            "clip_norm": None,
            "schedule": "constant",
            "warmup": 0.0,
            "lora_plus_ratio": 1e38,
        },
    )
    code, _, err = invoke("train", config, "--workdir", tmp_path / "run")
    assert code == 3
    message = err.splitlines()[-1]
    assert message.startswith("balora: training diverged by step 1: expected finite weights")
    assert "there is no good checkpoint yet" in message
    assert checkpoint_steps(tmp_path / "run") == []


def test_no_checkpoint_yet(tmp_path, inputs):
    message = diverge(tmp_path, inputs, checkpoint_every=0)
    assert "the last good checkpoint is" not in message
    assert checkpoint_steps(tmp_path / "run") == []


def test_only_one_checkpoint_and_it_is_bad(tmp_path, inputs):
    message = diverge(tmp_path, inputs, checkpoint_every=2)
    assert "the last good checkpoint is" not in message
