"""Every byte and every file of a sealed folder altered once: all of it is found."""

import os
import shutil

import numpy as np
import pytest

from balora_jax.io import seals
from tests.trials.alterations import all_bytes, files_of, missed

STEP = 12
CONTENT = {
    "_CHECKPOINT_METADATA": b'{"item": 1}',
    "data/metadata": b'{"epoch": 0}\n',
    "state/d/0a1b": bytes(range(40)),
    "state/manifest.ocdbt": b"\x00",
    "state/empty": b"",
    "state/\u00e4 b": b"a name of two words",
}


def write(folder):
    for name, content in CONTENT.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    seals.seal(folder, STEP)
    assert seals.damage(folder, STEP) is None
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / str(STEP))


def test_every_byte(folder):
    places = all_bytes(folder)
    assert len(places) > 600
    assert missed(folder, STEP, places, np.random.default_rng(0)) == []


def test_a_byte_more_or_less(folder):
    for file in files_of(folder):
        whole = file.read_bytes()
        for place in range(0, len(whole) + 1, 7):
            for changed in (
                whole[:place] + whole[place + 1 :],
                whole[:place] + b"7" + whole[place:],
            ):
                if changed != whole:
                    file.write_bytes(changed)
                    assert seals.damage(folder, STEP), (file.name, place)
        file.write_bytes(whole)
    assert seals.damage(folder, STEP) is None


@pytest.mark.parametrize("change", ["without", "twice", "blank", "moved"])
def test_every_line_of_the_seal(folder, change):
    file = folder / seals.NAME
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == len(CONTENT) + 1
    for i, line in enumerate(lines):
        others = lines[:i] + lines[i + 1 :]
        changed = {
            "without": others,
            "twice": [*lines[: i + 1], line, *lines[i + 1 :]],
            "blank": [*lines[:i], b"\n", *lines[i:]],
            "moved": [*others, line] if i < len(lines) - 1 else [line, *others],
        }[change]
        file.write_bytes(b"".join(changed))
        assert seals.damage(folder, STEP), line


def test_a_seal_cut_short_anywhere(folder):
    file = folder / seals.NAME
    whole = file.read_bytes()
    for end in range(0, len(whole), 5):
        file.write_bytes(whole[:end])
        assert seals.damage(folder, STEP), end


def _removed(file):
    file.unlink()


def _emptied(file):
    file.write_bytes(b"")


def _renamed(file):
    file.rename(file.with_name(file.name + "2"))


def _moved_up(file):
    file.rename(file.parents[1] / "elsewhere")


def _linked(file):
    """To a copy outside with the same bytes."""
    folder = next(parent for parent in file.parents if parent.name == str(STEP))
    copy = folder.with_name("copy")
    copy.write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to(copy)


def _linked_inside(file):
    copy = file.with_name("copy")
    file.rename(copy)
    file.symlink_to(copy.name)


def _folder_of_its_name(file):
    file.unlink()
    file.mkdir()


def _pipe_of_its_name(file):
    file.unlink()
    os.mkfifo(file)


def _neighbour(file):
    file.with_name("neighbour").write_bytes(b"")


def _hidden_neighbour(file):
    file.with_name(".hidden").write_bytes(b"x")


def _of_another(file):
    """The content of another file of the folder."""
    file.write_bytes(b"one\n" if file.read_bytes() != b"one\n" else b"two\n")


CHANGES = (
    *(_removed, _emptied, _renamed, _moved_up, _linked, _linked_inside, _folder_of_its_name),
    *(_pipe_of_its_name, _neighbour, _hidden_neighbour, _of_another),
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
@pytest.mark.parametrize("name", [*CONTENT, seals.NAME])
def test_every_file(folder, name, change):
    if (change, name) == (_emptied, "state/empty"):
        pytest.skip("it is empty")
    change(folder / name)
    # Without its seal a folder is not taken for a sealed one.
    assert not seals.is_sealed(folder) or seals.damage(folder, STEP)


def test_two_files_exchanged(folder):
    first, second = folder / "data/metadata", folder / "state/d/0a1b"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    assert seals.damage(folder, STEP)


@pytest.mark.parametrize("name", ["data", "state/d"])
def test_folders_within(folder, tmp_path, name):
    outside = tmp_path / "outside"
    (folder / name).rename(outside)
    assert seals.damage(folder, STEP)
    (folder / name).symlink_to(outside)
    assert seals.damage(folder, STEP)


@pytest.mark.parametrize("other", [0, 1, 2, 11, 13, 120, 121])
def test_another_step(folder, other):
    assert str(STEP) in seals.damage(folder, other)


def test_a_seal_of_another_folder(folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "state/empty").write_bytes(b"x")
    seals.seal(other, STEP)
    (other / seals.NAME).replace(folder / seals.NAME)
    assert seals.damage(folder, STEP)


def test_nothing_is_altered_by_looking(folder):
    def state():
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}

    before = state()
    seals.damage(folder, STEP)
    assert state() == before
