"""Runs on text whose teacher is computed once: the same losses, one file, who may use it.

``BALORA_SAMPLES=all`` stops runs and goes on with them.
"""

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from balora_jax.config_file import parse_config
from balora_jax.tasks.text import run as text_run
from balora_jax.tasks.text import teacher_rows
from balora_jax.training import steps as training_steps
from balora_jax.training.workdir import TEACHER_ROWS
from tests.run.conftest import invoke, settings
from tests.run.test_teacher import text_adapter
from tests.tiny_run import FEW, WIDTH, adapter_bytes, config_tree, metrics_of, write_config

pytestmark = pytest.mark.usefixtures("no_curves")

ALL = os.environ.get("BALORA_SAMPLES") == "all"
COUNTED = 95  # characters of the answers, and the end of each
FOLDER = "regularizers.teacher_cache_folder"
SECTIONS = {
    "adapter": FEW,
    "regularizers": {"consistency": 0.5, "diversity": 0.0, "spectral": 0.0, "top_k": 20},
    "training": {"max_steps": 5, "checkpoint_every": 0},
}


def train(config, workdir, *more, **overrides):
    outcome = invoke("train", config, "--workdir", workdir, *more, *settings(overrides))
    assert outcome.code == 0, outcome.err
    return outcome


def opened(inputs, **regularizers):
    """A checked run on ``inputs``, and its constants."""
    tree = config_tree(inputs, **SECTIONS)
    tree["adapter"] |= regularizers.pop("adapter", {})
    tree["data"] |= regularizers.pop("data", {})
    tree["model"] |= regularizers.pop("model", {})
    tree["regularizers"] |= {"teacher_cache": True, **regularizers}
    run = text_run.check(parse_config(tree, "here"))
    return run, run.constants(run.load())


def steps_of(run, constants, kept, count=5):
    """Metrics of the first steps of a run."""
    parts = run.step_parts(count)
    state = training_steps.initial_state(run.load().trainable, parts.optimizer, run.mesh)
    step = training_steps.compile_step(parts, state, run.mesh)
    batches, key, found = run.batches(), jax.random.key(run.config.training.seed), []
    for _ in range(count):
        batch = training_steps.place_batch(run.prepare(next(batches), kept), run.mesh)
        state, values = step(state, constants, batch, key)
        found.append({name: float(value) for name, value in values.items()})
    return found


def test_the_losses_are_those_of_a_teacher_in_each_step(inputs, tmp_path, capsys, monkeypatch):
    each = opened(inputs, teacher_cache=None)
    assert each[0].teacher(each[1], tmp_path) is None
    wanted = steps_of(*each, None)
    assert wanted[-1]["consistency"] > 1e-2
    shared = str(tmp_path / "shared")
    run, constants = opened(inputs, teacher_cache_folder=shared)
    kept = run.teacher(constants, tmp_path / "run")
    (file,) = (tmp_path / "shared").iterdir()
    assert capsys.readouterr().out == f"teacher: wrote {file} (6.3 kB)\n"
    assert any(line.endswith(f"{COUNTED} positions x {WIDTH} x 4 bytes = 6.1 kB")
               for line in run.describe())  # fmt: skip
    # Three steps are an epoch.
    for a, b in zip(steps_of(run, constants, kept), wanted, strict=True):
        for name in ("loss", "task_loss", "consistency"):
            assert abs(a[name] - b[name]) <= 2e-7 * max(1, abs(b[name])), name
    monkeypatch.setattr(teacher_rows.TeacherRows, "blocks", None)  # no forward of the teacher
    tree = config_tree(inputs, **SECTIONS)
    tree["training"]["seed"], tree["regularizers"]["consistency"] = 7, 0.1
    tree["regularizers"] |= {"teacher_cache": True, "teacher_cache_folder": shared}
    other = text_run.check(parse_config(tree, "here"))
    other.teacher(other.constants(other.load()), tmp_path / "run")
    assert f"teacher: {file} serves" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not ALL, reason="four runs: BALORA_SAMPLES=all")
@pytest.mark.parametrize("more", [{"teacher_cache": True}, {"teacher_fraction": 0.5}])
def test_two_halves_are_the_whole(inputs, tmp_path, more):
    sections = {**SECTIONS, "regularizers": {**SECTIONS["regularizers"], **more}}
    config = write_config(tmp_path / "config.yaml", inputs, **sections)
    train(config, tmp_path / "straight")
    train(config, tmp_path / "half", **{"training.stop_at": 2})
    files = list((tmp_path / "half").glob(TEACHER_ROWS))
    written = [file.stat().st_mtime_ns for file in files]
    assert len(files) == ("teacher_cache" in more)
    train(config, tmp_path / "half", "--resume")
    assert [file.stat().st_mtime_ns for file in files] == written
    assert metrics_of(tmp_path / "half") == metrics_of(tmp_path / "straight")
    assert adapter_bytes(tmp_path / "half") == adapter_bytes(tmp_path / "straight")


@pytest.mark.parametrize("case", ["base, packed, bfloat16", "start, official"])
def test_batches_bring_what_the_teacher_says(inputs, tmp_path, case):
    more = {
        "base, packed, bfloat16": {"data": {"packing": "rows"}, "model": {"dtype": "bfloat16"}},
        "start, official": {"teacher": "start", "mask_alignment": "official"},
    }[case]
    if "start" in case:
        more["adapter"] = {"start": str(text_adapter(tmp_path / "adapter"))}
    run, constants = opened(inputs, **more)
    kept = run.teacher(constants, tmp_path)
    assert (constants.start is not None) == ("start" in case)
    batches, forward = run.batches(), jax.jit(run.taught.bind(*constants.of_teacher).hidden)
    for _ in range(2):
        batch = next(batches)
        found = run.prepare(batch, kept)
        assert set(found) == set(batch) - {"example_ids"} | {"teacher_hidden"}
        for i in range(2):
            arrays = (batch[name][i] for name in ("input_ids", "positions", "segment_ids"))
            wanted = np.asarray(forward(*map(jnp.asarray, arrays)))
            segments, marked = batch["segment_ids"][i], batch["loss_mask"][i] > 0
            if "official" not in case:
                marked = np.roll(marked, -1, axis=1) & (np.roll(segments, -1, axis=1) == segments)
            assert found["teacher_hidden"].dtype == wanted.dtype
            np.testing.assert_allclose(
                np.float32(found["teacher_hidden"][i]),
                np.float32(np.where(marked[..., None], wanted, 0)),
                rtol=2e-6 if wanted.dtype == np.float32 else 0.02,
                atol=2e-6 if wanted.dtype == np.float32 else 0.02,
            )
            assert marked.any()


def test_what_is_damaged_or_of_another_is_written_anew(inputs, tmp_path, capsys):
    run, constants = opened(inputs)
    run.teacher(constants, tmp_path)
    file = tmp_path / TEACHER_ROWS
    whole = file.read_bytes()
    with safe_open(file, "np") as stored:
        assert stored.get_tensor("rows").shape[1] == WIDTH
        assert set(stored.metadata()) == {"key", "sha256"}
    other, others = opened(inputs, mask_alignment="official")
    (tmp_path / f".{TEACHER_ROWS}.abcdefgh.partial").write_bytes(b"half")  # of a killed run
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    capsys.readouterr()
    for damage, why in (
        (lambda: file.write_bytes(whole[:-5]), "it is cut short"),
        (lambda: file.write_bytes(flipped), "it is damaged"),
        (lambda: file.write_bytes(b"x" * len(whole)), "of another teacher or other data"),
        (lambda: other.teacher(others, tmp_path), "of another teacher or other data"),
        (file.unlink, f"teacher: wrote {file} ("),
    ):
        damage()
        capsys.readouterr()
        run.teacher(constants, tmp_path)
        assert why in capsys.readouterr().out
        assert file.read_bytes() == whole
        assert [path.name for path in tmp_path.iterdir()] == [TEACHER_ROWS]
    run.teacher(constants, tmp_path)
    assert "serves" in capsys.readouterr().out


def test_no_room_and_no_place_are_refused(place, monkeypatch):
    usage = shutil.disk_usage(place.folder)._replace(free=100)
    monkeypatch.setattr(teacher_rows.shutil, "disk_usage", lambda folder: usage)
    once = {"regularizers.teacher_cache": "true"}
    place.refused(
        "regularizers.teacher_cache: expected room for",
        f"x {WIDTH} x 4 bytes",
        "Make room, name another folder in regularizers.teacher_cache_folder, or leave it out.",
        overrides=once,
    )
    monkeypatch.undo()
    (place.folder / "file").write_text("")
    place.refused(
        f"{FOLDER}: expected a folder that can be written, got",
        overrides=once | {FOLDER: place.folder / "file"},
    )


@pytest.mark.parametrize(
    ("key", "value", "more", "phrase"),
    [
        ("teacher_fraction", 0.5, {"consistency_schedule": "adaptive"}, "with consistency_schedule adaptive"),
        ("teacher_fraction", 1.5, {}, "teacher_fraction"),
        ("teacher_fraction", 0, {}, "teacher_fraction"),
    ],
)  # fmt: skip
def test_what_cannot_be_sampled_is_refused(place, key, value, more, phrase):
    config = place.config(regularizers=more)
    place.refused(phrase, config=config, overrides={f"regularizers.{key}": value})


def test_a_folder_without_the_cache_is_refused(place):
    place.refused(
        f"{FOLDER}: expected regularizers.teacher_cache true beside it, got it off: nothing is "
        "kept there. Set it to true, or leave the folder out.",
        overrides={FOLDER: place.folder / "shared"},
    )


def test_positions_that_grow_with_the_longest_row_are_refused(place):
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    model = place.model(rope_scaling=scaling, max_position_embeddings=8)
    config = place.config(model={"name_or_path": str(model)})
    for key, value in (("teacher_cache", "true"), ("teacher_fraction", 0.5)):
        place.refused(
            f"regularizers.{key}: expected",
            "with rope dynamic",
            config=config,
            overrides={f"regularizers.{key}": value},
        )


def test_a_share_that_leaves_out_no_row_is_named(inputs, capsys):
    opened(inputs, teacher_cache=None, teacher_fraction=0.9)
    assert "teacher_fraction 0.9 leaves out no row" in capsys.readouterr().err
