"""Runs on text whose teacher is computed once: the same losses, one file, who may use it."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from balora_jax.config_file import parse_config
from balora_jax.tasks.text import run as text_run
from balora_jax.tasks.text import teacher_rows
from balora_jax.training.workdir import TEACHER_ROWS
from tests.run.conftest import invoke, settings
from tests.run.test_teacher import text_adapter
from tests.tiny_run import FEW, WIDTH, adapter_bytes, config_tree, metrics_of, write_config

pytestmark = pytest.mark.usefixtures("no_curves")

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


@pytest.fixture(scope="module")
def both(tmp_path_factory, inputs):
    """A run that computes its teacher in each step; one that does once, stopped and gone on with."""
    folder = tmp_path_factory.mktemp("rows")
    config = write_config(folder / "config.yaml", inputs, **SECTIONS)
    train(config, folder / "each")
    once = {"regularizers.teacher_cache": "true", FOLDER: folder / "shared"}
    first = train(config, folder / "once", **once, **{"training.stop_at": 2})
    (file,) = (folder / "shared").iterdir()
    written = file.stat().st_mtime_ns
    later = train(config, folder / "once", "--resume", **once)
    assert file.stat().st_mtime_ns == written
    return folder, first, later, file


def test_the_losses_are_those_of_a_teacher_in_each_step(both):
    folder, first, later, file = both
    found, wanted = metrics_of(folder / "once"), metrics_of(folder / "each")
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5]  # of three steps in an epoch
    assert wanted[-1]["consistency"] > 1e-2
    for a, b in zip(found, wanted, strict=True):
        for name in ("loss", "task_loss", "consistency"):
            assert abs(a[name] - b[name]) <= 2e-7 * max(1, abs(b[name])), (a["step"], name)
    rows = sum(len(f"#{answer}") for answer in answers(folder))
    assert f"kept on disk are {rows + 24} positions x {WIDTH} x 4 bytes" in first.out
    assert f"teacher: wrote {file}" in first.out
    assert f"teacher: {file} serves" in later.out


def answers(folder):
    config = (folder / "config.yaml").read_text()
    file = config.split("train: ")[1].splitlines()[0]
    with open(file) as lines:
        return [json.loads(line)["answer"].removeprefix("#") for line in lines]


def test_a_run_of_another_seed_and_weight_uses_the_file(
    both, inputs, tmp_path, monkeypatch, capsys
):
    folder, _, _, file = both
    monkeypatch.setattr(teacher_rows.TeacherRows, "blocks", None)  # no forward of the teacher
    weighed, constants = opened(inputs, consistency=0.1, teacher_cache_folder=str(file.parent))
    weighed.teacher(constants, tmp_path)
    assert f"teacher: {file} serves" in capsys.readouterr().out
    config = str(folder / "config.yaml")
    other = {"regularizers.teacher_cache": "true", FOLDER: file.parent, "training.seed": 7,
             "training.stop_at": 1}  # fmt: skip
    outcome = train(config, tmp_path / "run", **other)
    assert f"teacher: {file} serves" in outcome.out
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert adapter_bytes(tmp_path / "run") != adapter_bytes(folder / "once")


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
        (file.unlink, "it is not there"),
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
