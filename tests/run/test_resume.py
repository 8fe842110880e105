"""Is a run that stopped and went on the same run, bit for bit?"""

import json
import shutil

import jax
import numpy as np
import pytest

from balora_jax.training import loop
from tests.run.conftest import invoke, settings
from tests.tiny_run import (
    LAYERS,
    LINEAR,
    adapter_bytes,
    checkpoint_steps,
    metrics_of,
    random_weights,
    tree_digest,
    write_config,
    write_inputs,
)

pytestmark = pytest.mark.usefixtures("no_curves")

HALF, WHOLE = 3, 6
CONSTANT = {
    "consistency_schedule": "constant",
    "diversity_schedule": "constant",
    "spectral_schedule": "constant",
}
VARIANTS = {
    "pissa, packed rows": {
        "data": {"packing": True},
        "training": {"optimizer": "adamw"},
    },
    "lora, dropout, adaptive": {
        "adapter": {"start": "lora", "dropout": 0.25},
        "regularizers": {"consistency_schedule": "adaptive"},
        "training": {"optimizer": "lion", "learning_rate": 0.003, "lora_plus_ratio": 2.0},
    },
}


def train(config, workdir, *more, **overrides):
    outcome = invoke("train", config, "--workdir", workdir, *more, *settings(overrides))
    assert outcome.code == 0, outcome.err
    return outcome


def same_runs(left, right):
    assert metrics_of(left) == metrics_of(right)
    assert adapter_bytes(left) == adapter_bytes(right)


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, tmp_path_factory, inputs):
    """A config, and the folder of its uninterrupted run."""
    folder = tmp_path_factory.mktemp("straight")
    sections = {"training": {}, **VARIANTS[request.param]}
    sections["training"] = {"max_steps": WHOLE, "checkpoint_every": 0, **sections["training"]}
    config = write_config(folder / "config.yaml", inputs, **sections)
    train(config, folder / "run")
    assert len(metrics_of(folder / "run")) == WHOLE
    return config, folder / "run"


def test_two_halves_are_the_whole(variant, tmp_path):
    config, straight = variant
    first = train(config, tmp_path / "run", **{"training.stop_at": HALF})
    assert "resumed" not in first.out
    assert metrics_of(tmp_path / "run") == metrics_of(straight)[:HALF]
    assert adapter_bytes(tmp_path / "run") != adapter_bytes(straight)
    second = train(config, tmp_path / "run", "--resume")
    assert (
        f"resumed at step {HALF} from {tmp_path / 'run' / 'checkpoints' / str(HALF)}" in second.out
    )
    same_runs(tmp_path / "run", straight)


def test_the_halves_need_not_agree_on_what_is_computed_nowhere(variant, tmp_path):
    """Remat, chunks of the head and how often to save are free on resume."""
    config, straight = variant
    train(config, tmp_path / "run", **{"training.stop_at": HALF, "training.checkpoint_every": 2})
    assert checkpoint_steps(tmp_path / "run") == [2, 3]
    train(config, tmp_path / "run", "--resume", **{"training.keep_checkpoints": 5})
    assert checkpoint_steps(tmp_path / "run") == [2, 3, 6]
    same_runs(tmp_path / "run", straight)


def test_resume_of_a_finished_run_changes_nothing(variant, tmp_path):
    config, straight = variant
    shutil.copytree(straight, tmp_path / "run")
    train(config, tmp_path / "run", "--resume")
    same_runs(tmp_path / "run", straight)
    assert checkpoint_steps(tmp_path / "run") == [WHOLE]


def test_resume_without_a_checkpoint_starts(variant, tmp_path):
    """Of a first save that was killed, only a part may lie there."""
    config, straight = variant
    part = tmp_path / "run" / "checkpoints" / "3.orbax-checkpoint-tmp-1" / "state"
    part.mkdir(parents=True)
    (part / "half").write_text("half")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "lo')
    found = train(config, tmp_path / "run", "--resume")
    assert "resumed" not in found.out
    same_runs(tmp_path / "run", straight)
    assert checkpoint_steps(tmp_path / "run") == [WHOLE]


def test_metrics_are_repaired(variant, tmp_path):
    """Rows after the checkpoint, and a last line that a kill cut short, are written anew."""
    config, straight = variant
    train(config, tmp_path / "run", **{"training.stop_at": HALF})
    file = tmp_path / "run" / "metrics.jsonl"
    lines = (straight / "metrics.jsonl").read_text().splitlines(keepends=True)
    late = {**json.loads(lines[HALF]), "loss": 1234.5}
    file.write_text(file.read_text() + json.dumps(late) + "\n" + lines[HALF + 1][:40])
    train(config, tmp_path / "run", "--resume")
    same_runs(tmp_path / "run", straight)


def test_a_base_that_moved_is_the_same_base(variant, tmp_path, inputs):
    config, straight = variant
    train(config, tmp_path / "run", **{"training.stop_at": HALF})
    moved = shutil.copytree(inputs / "model", tmp_path / "elsewhere")
    train(config, tmp_path / "run", "--resume", **{"model.name_or_path": moved})
    same_runs(tmp_path / "run", straight)
    settings_file = tmp_path / "run" / "adapter" / "adapter_config.json"
    assert json.loads(settings_file.read_text())["base_model_name_or_path"] == str(moved)


@pytest.mark.parametrize("consistency", ["constant", "adaptive"])
def test_a_run_without_schedules_may_be_lengthened(tmp_path, inputs, consistency):
    config = write_config(
        tmp_path / "config.yaml",
        inputs,
        regularizers={**CONSTANT, "consistency_schedule": consistency},
        training={"max_steps": HALF, "schedule": "constant", "warmup": 0.0, "checkpoint_every": 0},
    )
    train(config, tmp_path / "straight", **{"training.max_steps": WHOLE})
    train(config, tmp_path / "run")
    assert len(metrics_of(tmp_path / "run")) == HALF
    train(config, tmp_path / "run", "--resume", **{"training.max_steps": WHOLE})
    same_runs(tmp_path / "run", tmp_path / "straight")


@pytest.mark.parametrize(
    "bound_to_the_length",
    [
        {"training": {"schedule": "cosine"}},
        {"training": {"schedule": "linear"}},
        {"training": {"warmup": 0.5}},
        {"regularizers": {"consistency_schedule": "cosine"}},
        {"regularizers": {"diversity_schedule": "linear_warmup"}},
        {"regularizers": {"spectral_schedule": "two_phase"}},
    ],
    ids=str,
)
def test_a_run_with_a_schedule_may_not(tmp_path, inputs, finished_constant, bound_to_the_length):
    """The config of the saved run is replaced, which is quicker than running each."""
    config, workdir = finished_constant
    shutil.copytree(workdir, tmp_path / "run")
    sections = {name: dict(values) for name, values in CONSTANT_RUN.items()}
    for name, values in bound_to_the_length.items():
        sections[name] |= values
    config = write_config(tmp_path / "config.yaml", inputs, **sections)
    (saved,) = (tmp_path / "run" / "checkpoints").glob("*/run/metadata")
    record = json.loads(saved.read_text())
    for name, values in bound_to_the_length.items():
        record["config"][name] |= values
    saved.write_text(json.dumps(record))
    before = tree_digest(tmp_path)
    code, _, err = invoke(
        "train", config, "--workdir", tmp_path / "run", "--resume",
        "--set", "training.max_steps=4",
    )  # fmt: skip
    assert code == 2
    assert err.startswith("balora: ")
    assert "expected training.max_steps to stay 2, got 4" in err
    assert tree_digest(tmp_path) == before


CONSTANT_RUN = {
    "regularizers": CONSTANT,
    "training": {"max_steps": 2, "schedule": "constant", "warmup": 0.0, "checkpoint_every": 0},
}


@pytest.fixture(scope="module")
def finished_constant(tmp_path_factory, inputs):
    folder = tmp_path_factory.mktemp("constant")
    config = write_config(folder / "config.yaml", inputs, **CONSTANT_RUN)
    train(config, folder / "run")
    return config, folder / "run"


def test_the_newest_checkpoints_are_kept(tmp_path, inputs):
    config = write_config(
        tmp_path / "config.yaml",
        inputs,
        training={"max_steps": 5, "checkpoint_every": 1, "keep_checkpoints": 3},
    )
    train(config, tmp_path / "run", **{"training.stop_at": 2})
    assert checkpoint_steps(tmp_path / "run") == [1, 2]
    train(config, tmp_path / "run", "--resume")
    assert checkpoint_steps(tmp_path / "run") == [3, 4, 5]


@pytest.mark.parametrize("start", ["pissa", "lora"])
def test_only_the_adapters_change(tmp_path, start, monkeypatch):
    inputs = write_inputs(tmp_path / "inputs", seed=3)
    files = tree_digest(inputs)
    seen = []

    class Watched(loop.Training):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            seen.append((self, snapshot(self)))

    def snapshot(training):
        groups = (training.constants.frozen, training.constants.origin, training.state.adapters)
        return [jax.device_get(group) for group in groups]

    monkeypatch.setattr(loop, "Training", Watched)
    config = write_config(
        tmp_path / "config.yaml", inputs, adapter={"start": start}, training={"warmup": 0.0}
    )
    train(config, tmp_path / "run")
    ((training, before),) = seen
    after = snapshot(training)
    for group in (0, 1):
        assert before[group].keys() == after[group].keys()
        for path, value in before[group].items():
            assert value.tobytes() == after[group][path].tobytes(), path
    assert any("origin_a" in path for path in before[1]) == (start == "pissa")
    for path, value in before[2].items():
        for layer in range(LAYERS):
            assert not np.array_equal(value[layer], after[2][path][layer]), (path, layer)
    # The frozen arrays are those of the file, and the file is as it was.
    for name in LINEAR:
        for layer in range(LAYERS):
            stored = random_weights(3)[f"model.layers.{layer}.{name}.weight"]
            assert np.array_equal(after[0][f"layers.{name}.kernel"][layer], stored.T)
    assert tree_digest(inputs) == files
