"""A start's name and folders of that name: the name wins, and a path means the folder."""

import shutil

import pytest

from balora_jax.errors import InputError
from balora_jax.models.starts import STARTS
from balora_jax.pretrained.peft_start import PeftStart
from balora_jax.training.adapters import start_of
from tests.run.conftest import invoke
from tests.tiny_run import adapter_bytes, metrics_of

NAMES = [name.replace("_N", "_2") for name in STARTS]


@pytest.fixture
def here(tmp_path, monkeypatch, finished):
    """A working directory with an adapter in a folder of every start's name."""
    for name in NAMES:
        shutil.copytree(finished.workdir / "adapter", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_package_has_these_starts():
    assert NAMES == ["lora", "pissa", "pissa_niter_2", "milora", "olora", "orthogonal"]


@pytest.mark.parametrize("name", NAMES)
def test_a_named_start_wins(here, name):
    start = start_of(name)
    assert not isinstance(start, PeftStart)
    assert start.name == name
    for folder in (f"./{name}", str(here / name), f"../{here.name}/{name}"):
        found = start_of(folder)
        assert isinstance(found, PeftStart)
        assert found.peft.tensors


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_folder_of_its_name_is_nothing(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert start_of(name).name == name
    with pytest.raises(InputError) as caught:
        start_of(f"./{name}")
    assert str(caught.value) == (
        f"{name}: expected a PEFT adapter folder with adapter_config.json, got none. Check the "
        "path."
    )


def test_a_run_beside_such_folders_is_the_same_run(here, finished, no_curves):
    done = invoke("train", finished.config, "--workdir", here / "run")
    assert done.code == 0, done.err
    assert adapter_bytes(here / "run") == adapter_bytes(finished.workdir)
    assert metrics_of(here / "run") == metrics_of(finished.workdir)


def test_a_folder_of_another_name_is_a_start(here, finished, no_curves):
    shutil.move(here / "lora", here / "mine")
    done = invoke(
        "train", finished.config, "--workdir", here / "run",
        "--set", "adapter.start=mine", "--set", "training.stop_at=1",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert isinstance(start_of("mine"), PeftStart)


def test_neither_a_start_nor_a_folder(place):
    place.refused(
        "adapter.start: expected 'lora', 'pissa', 'pissa_niter_N', 'milora', 'olora', 'orthogonal' "
        "or the folder of a PEFT adapter, got './mine'. Choose one of these.",
        overrides={"adapter.start": "./mine"},
    )
