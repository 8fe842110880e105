"""Names of tensors, shards and folders that no file system or pattern takes well."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from balora_jax.errors import InputError
from balora_jax.io.hf_files import find_checkpoint, open_tensors, weight_files
from balora_jax.paths import kind_of


def test_the_name_of_a_tensor_is_bounded(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"x" * 10**6: np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError) as error, open_tensors(tmp_path):
        pass
    assert "expected names of at most 1000 characters, got 'xxx" in str(error.value)
    assert "…, which has 1000000. Download it again." in str(error.value)
    assert len(str(error.value)) < len(str(tmp_path)) + 300


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("x" * 300 + ".safetensors", "can be looked up, got: File name too long"),
        ("a\0b", "can be looked up, got: a character that no path can have"),
        ("../b.safetensors", "expected files of its own folder, got '../b.safetensors'"),
        ("absent.safetensors", "expected 1 weight files, got 1 missing"),
        ("loop.safetensors", "can be looked up, got: Too many levels of symbolic links"),
    ],
)
def test_shards_that_are_no_files(tmp_path, shard, message):
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    (tmp_path / "config.json").write_text("{}")
    index = {"weight_map": {"w": shard}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=message) as error:
        weight_files(tmp_path)
    assert "\0" not in str(error.value)


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 4000, "a\0b"])
def test_folders_that_cannot_be_looked_up(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for ask in (kind_of, find_checkpoint):
        with pytest.raises(
            InputError, match="expected a path that can be looked up, got: "
        ) as error:
            ask(name)
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 350


def test_what_lies_at_a_path(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert kind_of(tmp_path) == "folder"
    assert kind_of(tmp_path / "link") == kind_of(tmp_path / "file") == "file"
    assert kind_of("/dev/null") == "other"
    assert kind_of(tmp_path / "file" / "below") is kind_of(tmp_path / "gone") is None
