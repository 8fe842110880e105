"""A whole run without torch and PEFT, on the oldest versions too.

``.ci/run`` runs this file a second time on the lower bounds of ``pyproject.toml``.
"""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from balora_jax.cli import main
from tests import tiny_run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One BA-LoRA run by the command line, with a score before and after."""
    folder = tmp_path_factory.mktemp("floor")
    inputs = tiny_run.write_inputs(folder)
    config = tiny_run.write_config(
        folder / "run.yaml",
        inputs,
        training={"max_steps": 30, "checkpoint_every": 15},
        eval={"task": "exact_match"},
    )
    code = main(["train", config, "--workdir", str(folder / "run")])
    assert code == 0
    return folder


def test_the_loss_falls_and_the_delta_starts_at_nothing(run):
    rows = tiny_run.metrics_of(run / "run")
    assert len(rows) == 30
    assert rows[0]["consistency"] == 0.0
    assert all(math.isfinite(row["loss"]) for row in rows)
    task = [row["task_loss"] for row in rows]
    assert np.mean(task[-5:]) < 0.8 * np.mean(task[:5])
    assert rows[-1]["consistency"] > 0.0


def test_the_run_leaves_what_it_promises(run):
    folder = run / "run"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 30
    assert {"exact_match", "answered", "rows"} <= set(summary["before"]) & set(summary["after"])
    assert tiny_run.checkpoint_steps(folder) == [15, 30]
    drawn = importlib.util.find_spec("matplotlib") is not None
    assert (folder / "curves.png").exists() == drawn
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * tiny_run.LAYERS
    # A PiSSA start leaves as twice the rank, on the untouched base.
    assert {min(tensor.shape) for tensor in tensors.values()} == {4}


def test_the_adapter_is_used_and_merged_without_torch(run, capsys):
    adapter, merged = str(run / "run" / "adapter"), str(run / "merged")
    config = str(run / "run.yaml")
    assert main(["export", config, "--workdir", str(run / "run"), "--format", "merged",
                 "--out", merged]) == 0  # fmt: skip
    before = load_file(run / "model" / "model.safetensors")
    after = load_file(run / "merged" / "model.safetensors")
    assert set(after) == set(before)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj" in name}
    texts = []
    for options in (["--adapter", adapter], ["--set", f"model.name_or_path={merged}"]):
        file = str(run / "texts.json")
        question = ["--prompt", "3+4", "--json", file]
        assert main(["generate", config, *question, *options]) == 0
        texts.append(json.loads(Path(file).read_text()))
    capsys.readouterr()
    assert texts[0] == texts[1]
    assert texts[0][0]["text"]
