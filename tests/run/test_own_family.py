"""A family of a user's own file: Llama's blocks under other names, trained by the command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open

from tests import compiler
from tests.run.conftest import invoke, settings
from tests.tiny_run import config_tree, metrics_of, random_weights, write_inputs, write_model

# The user's file.
FAMILY = '''
from dataclasses import replace

from balora_jax.models.families.base import FAMILIES, DecoderFamily
from balora_jax.models.families.llama_names import weight_rules
from balora_jax.models.families.read_llama import read_decoder


def rules(config):
    """Llama's table under our names."""
    renamed = lambda name: name.replace("layers", "blocks").replace("self_attn", "attention")
    return tuple(replace(r, name=renamed(r.name)) for r in weight_rules(config, "net"))


ACME = FAMILIES.register(DecoderFamily("acme", read_decoder, rules))
'''
MESHES = {"one": {}, "four": {"mesh.fsdp": 2, "mesh.tensor": 2, "mesh.data": 1}}


def renamed(name):
    for old, new in {"model.": "net.", "layers": "blocks", "self_attn": "attention"}.items():
        name = name.replace(old, new)
    return name


@pytest.fixture(scope="module")
def runs(tmp_path_factory, process_environment):
    """Four steps of a Llama, and of the same weights as the user's family on each mesh."""
    folder = tmp_path_factory.mktemp("own")
    inputs = write_inputs(folder / "inputs")
    tensors = {renamed(name): value for name, value in random_weights().items()}
    write_model(folder / "acme", tensors=tensors, model_type="acme")
    (folder / "acme.py").write_text(FAMILY)
    tree = config_tree(inputs)
    (folder / "llama.yaml").write_text(yaml.safe_dump(tree))
    tree = {**tree, "extensions": ["acme.py"]}
    tree["model"] = {**tree["model"], "name_or_path": str(folder / "acme")}
    (folder / "acme.yaml").write_text(yaml.safe_dump(tree))
    code, _, err = invoke("train", folder / "llama.yaml", "--workdir", folder / "llama_run")
    assert code == 0, err
    for name, mesh in MESHES.items():
        # In a process of its own: here the family would stay registered.
        done = subprocess.run(
            [sys.executable, "-m", "balora_jax", "train", folder / "acme.yaml",
             "--workdir", folder / name, *settings(mesh)],
            env={**process_environment, **compiler.on_cpu(4 if mesh else None)},
            cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def tensors_of(run):
    with safe_open(run / "adapter" / "adapter_model.safetensors", framework="np") as file:
        names = [(name, name.removeprefix("base_model.model.")) for name in file.keys()]  # noqa: SIM118
        return {ours: file.get_tensor(name) for name, ours in names}


def test_it_trains_as_the_llama_that_it_is(runs):
    assert metrics_of(runs / "one") == metrics_of(runs / "llama_run")
    ours, theirs = tensors_of(runs / "one"), tensors_of(runs / "llama_run")
    assert sorted(ours) == sorted(renamed(name) for name in theirs)
    assert all((ours[renamed(name)] == value).all() for name, value in theirs.items())
    assert json.loads((runs / "one" / "summary.json").read_text())["steps"] == 4


def test_it_trains_on_a_mesh(runs):
    one, four = metrics_of(runs / "one"), metrics_of(runs / "four")
    assert [row["loss"] for row in four] == pytest.approx([row["loss"] for row in one], rel=1e-4)
    assert one[0]["loss"] != one[-1]["loss"]


def test_the_file_is_short():
    assert len(FAMILY.strip().splitlines()) <= 40
