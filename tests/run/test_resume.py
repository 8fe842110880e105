"""Runs that stop and go on: the same bytes as without the break."""

import json
import shutil
from typing import NamedTuple

import jax
import numpy as np
import pytest

from balora_jax import finetune
from balora_jax.io import seals
from tests.run.conftest import invoke, settings
from tests.tiny_run import (
    FEW,
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
VARIANTS = {
    "pissa, packed rows": {
        "adapter": FEW,
        "data": {"packing": True},
        "training": {"learning_rate": 0.02},
    },
    "lora, dropout, adaptive": {
        "model": {"remat": "full"},
        "adapter": {**FEW, "start": "lora", "dropout": 0.25},
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


class Variant(NamedTuple):
    """A config, its uninterrupted run, the same stopped half-way, and what that printed."""

    config: str
    straight: object
    half: object
    printed: str


def both_runs(folder, inputs, sections):
    training = {"max_steps": WHOLE, "checkpoint_every": 0, **sections["training"]}
    config = write_config(folder / "config.yaml", inputs, **{**sections, "training": training})
    train(config, folder / "straight")
    assert len(metrics_of(folder / "straight")) == WHOLE
    outcome = train(config, folder / "half", **{"training.stop_at": HALF})
    return Variant(config, folder / "straight", folder / "half", outcome.out)


@pytest.fixture(scope="module")
def packed(tmp_path_factory, inputs):
    folder = tmp_path_factory.mktemp("packed")
    return both_runs(folder, inputs, VARIANTS["pissa, packed rows"])


@pytest.fixture(scope="module")
def adaptive(tmp_path_factory, inputs):
    folder = tmp_path_factory.mktemp("adaptive")
    return both_runs(folder, inputs, VARIANTS["lora, dropout, adaptive"])


@pytest.mark.parametrize("name", ["packed", "adaptive"])
def test_two_halves_are_the_whole(request, tmp_path, name):
    config, straight, half, printed = request.getfixturevalue(name)
    assert "resumed" not in printed
    assert metrics_of(half) == metrics_of(straight)[:HALF]
    assert adapter_bytes(half) != adapter_bytes(straight)
    run = shutil.copytree(half, tmp_path / "run")
    second = train(config, run, "--resume")
    assert f"resumed at step {HALF} from {run / 'checkpoints' / str(HALF)}" in second.out
    same_runs(run, straight)


def test_how_often_to_save_is_free(packed, tmp_path):
    stop = {"training.stop_at": HALF, "training.checkpoint_every": 2}
    train(packed.config, tmp_path / "run", **stop)
    assert checkpoint_steps(tmp_path / "run") == [2, 3]
    train(packed.config, tmp_path / "run", "--resume", **{"training.keep_checkpoints": 5})
    assert checkpoint_steps(tmp_path / "run") == [2, 3, 6]
    same_runs(tmp_path / "run", packed.straight)


def test_resume_of_a_finished_run_changes_nothing(packed, tmp_path):
    run = shutil.copytree(packed.straight, tmp_path / "run")
    train(packed.config, run, "--resume")
    same_runs(run, packed.straight)
    assert checkpoint_steps(run) == [WHOLE]


def test_resume_without_a_checkpoint_starts(packed, tmp_path):
    """Of a first save that was killed, only a part may lie there."""
    part = tmp_path / "run" / "checkpoints" / "3.orbax-checkpoint-tmp-1" / "state"
    part.mkdir(parents=True)
    (part / "half").write_text("half")
    (part.parents[1] / "writing").write_text("3\n")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "lo')
    shutil.copy(packed.straight / "config.yaml", tmp_path / "run")
    found = train(packed.config, tmp_path / "run", "--resume")
    assert {path.name for path in part.parents[1].iterdir()} == {str(WHOLE)}
    assert "resumed" not in found.out
    same_runs(tmp_path / "run", packed.straight)
    assert checkpoint_steps(tmp_path / "run") == [WHOLE]


def test_metrics_are_repaired(packed, tmp_path):
    """Rows after the checkpoint, and a last line that a kill cut short, are written anew."""
    run = shutil.copytree(packed.half, tmp_path / "run")
    file = run / "metrics.jsonl"
    lines = (packed.straight / "metrics.jsonl").read_text().splitlines(keepends=True)
    late = {**json.loads(lines[HALF]), "loss": 1234.5}
    file.write_text(file.read_text() + json.dumps(late) + "\n" + lines[HALF + 1][:40])
    train(packed.config, run, "--resume")
    same_runs(run, packed.straight)


def test_lines_that_are_no_rows_are_set_aside_and_counted(packed, tmp_path):
    run = shutil.copytree(packed.half, tmp_path / "run")
    file = run / "metrics.jsonl"
    first, *rest = file.read_bytes().splitlines(keepends=True)
    unread = [
        b"", b"\0\0\0", b"\xff\xfe", b'{"step": 2, "lo', b"[1]", b'{"step": "2"}', b'{"loss": 1}',
        b'{"step": null}', b"[" * 100_000,
    ]  # fmt: skip
    file.write_bytes(first + b"".join(line + b"\n" for line in unread) + b"".join(rest) + b"\0\0")
    found = train(packed.config, run, "--resume")
    assert (
        f"metrics.jsonl: {len(unread) + 1} lines are no rows; moved to metrics.unread" in found.out
    )
    assert (run / "metrics.unread").read_bytes().split(b"\n") == [*unread, b"\0\0", b""]
    same_runs(run, packed.straight)


def test_a_base_that_moved_is_the_same_base(packed, tmp_path, inputs):
    run = shutil.copytree(packed.half, tmp_path / "run")
    moved = shutil.copytree(inputs / "model", tmp_path / "elsewhere")
    train(packed.config, run, "--resume", **{"model.name_or_path": moved})
    same_runs(run, packed.straight)
    exported = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert exported["base_model_name_or_path"] == str(moved)


# Nothing here depends on the length of the run.
UNSCHEDULED = {
    "adapter": FEW,
    "regularizers": {
        "consistency_schedule": "adaptive",
        "diversity_schedule": "constant",
        "spectral_schedule": "constant",
    },
    "training": {"max_steps": HALF, "schedule": "constant", "checkpoint_every": 0},
}


@pytest.fixture(scope="module")
def unscheduled(tmp_path_factory, inputs):
    folder = tmp_path_factory.mktemp("unscheduled")
    config = write_config(folder / "config.yaml", inputs, **UNSCHEDULED)
    train(config, folder / "run")
    assert len(metrics_of(folder / "run")) == HALF
    return config, folder / "run"


def test_a_run_without_schedules_may_be_lengthened(unscheduled, tmp_path):
    config, short = unscheduled
    train(config, tmp_path / "straight", **{"training.max_steps": WHOLE})
    run = shutil.copytree(short, tmp_path / "run")
    train(config, run, "--resume", **{"training.max_steps": WHOLE})
    same_runs(run, tmp_path / "straight")


def as_if_begun_with(settings, run, folder, inputs):
    """The config in the checkpoint is replaced, which is quicker than running each."""
    sections = {name: {**values, **settings.get(name, {})} for name, values in UNSCHEDULED.items()}
    (saved,) = (run / "checkpoints").glob("*/run/metadata")
    record = json.loads(saved.read_text())
    for name, values in settings.items():
        record["config"][name] |= values
    saved.write_text(json.dumps(record))
    seals.seal(saved.parents[1], HALF)
    return write_config(folder / "config.yaml", inputs, **sections)


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
def test_a_run_with_a_schedule_may_not(tmp_path, inputs, unscheduled, bound_to_the_length):
    run = shutil.copytree(unscheduled[1], tmp_path / "run")
    config = as_if_begun_with(bound_to_the_length, run, tmp_path, inputs)
    before = tree_digest(tmp_path)
    longer = settings({"training.max_steps": WHOLE})
    code, _, err = invoke("train", config, "--workdir", run, "--resume", *longer)
    assert code == 2
    assert err.startswith("balora: ")
    ((section, ((key, value),)),) = [(n, v.items()) for n, v in bound_to_the_length.items()]
    assert err.endswith(
        f"expected training.max_steps to stay {HALF}, got {WHOLE}. This changes {section}.{key} "
        f"{value}, which follow the length of the run: set it back, or set training.extend=true to "
        "go on with them over the new length.\n"
    )
    assert tree_digest(tmp_path) == before


def test_a_run_that_is_extended_follows_its_schedules_over_the_new_length(
    tmp_path, inputs, unscheduled
):
    run = shutil.copytree(unscheduled[1], tmp_path / "run")
    bound = {"training": {"schedule": "cosine"}, "regularizers": {"consistency_schedule": "cosine"}}
    config = as_if_begun_with(bound, run, tmp_path, inputs)
    longer = {"training.max_steps": WHOLE, "training.extend": "true"}
    out = train(config, run, "--resume", **longer).out
    assert (
        f"the run is longer: training.max_steps {HALF} -> {WHOLE}; over the new length now: "
        "training.schedule cosine, regularizers.consistency_schedule cosine\n"
    ) in out
    rows = metrics_of(run)
    assert [row["step"] for row in rows] == list(range(1, WHOLE + 1))
    for done, row in list(enumerate(rows))[HALF:]:
        falling = (1 + np.cos(np.pi * done / WHOLE)) / 2
        assert row["learning_rate"] == pytest.approx(0.05 * falling, rel=1e-5)
        assert row["lambda1"] == pytest.approx(0.5 * (0.1 + 0.9 * falling), rel=1e-5)


def test_the_newest_checkpoints_are_kept(tmp_path, inputs):
    config = write_config(
        tmp_path / "config.yaml",
        inputs,
        training={"checkpoint_every": 1, "keep_checkpoints": 2},
    )
    train(config, tmp_path / "run", **{"training.stop_at": 2})
    assert checkpoint_steps(tmp_path / "run") == [1, 2]
    train(config, tmp_path / "run", "--resume")
    assert checkpoint_steps(tmp_path / "run") == [3, 4]


@pytest.mark.parametrize("start", ["pissa", "lora"])
def test_only_the_adapters_change(tmp_path, start, monkeypatch):
    inputs = write_inputs(tmp_path / "inputs", seed=3)
    files = tree_digest(inputs)
    seen = []

    class Watched(finetune.Training):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            seen.append((self, snapshot(self)))

    def snapshot(training):
        groups = (training.constants.frozen, training.constants.origin, training.state.adapters)
        return [jax.device_get(group) for group in groups]

    monkeypatch.setattr(finetune, "Training", Watched)
    config = write_config(tmp_path / "config.yaml", inputs, adapter={"start": start})
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
