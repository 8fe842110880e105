"""A start that a user's own file registers, and that reads data: it trains as any other does."""

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import LlamaForCausalLM

from balora_jax.config_file import load_config
from balora_jax.errors import InputError
from balora_jax.tasks.text import run as text_run
from balora_jax.tasks.text.moments import RowMoments
from tests import compiler
from tests.run.conftest import invoke, settings
from tests.tiny_run import metrics_of, write_config

ROOT = Path(__file__).resolve().parents[2]
FILE = Path(__file__).with_name("aware_start.py")
PATHS = {"layers.self_attn.q_proj": "self_attn.q_proj", "layers.mlp.down_proj": "mlp.down_proj"}
TARGETS = {"start": "aware", "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module")
def config(tmp_path_factory, inputs):
    """A run from the start of the file."""
    file = tmp_path_factory.mktemp("outside") / "config.yaml"
    text = Path(write_config(file, inputs, adapter=TARGETS)).read_text()
    file.write_text(f"extensions: [{FILE}]\n{text}")
    return file


@pytest.fixture(scope="module")
def checked(config):
    run = text_run.check(load_config(config))
    return run, run.base.load_for(run.plain, run.mesh)


def inputs_by_torch(folder, batches):
    """Name of a layer → its inputs [N, D] over all pieces of the batches, by transformers."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    seen = {}
    for i, layer in enumerate(model.model.layers):
        for name in PATHS.values():
            key = f"model.layers.{i}.{name}"
            layer.get_submodule(name).register_forward_pre_hook(
                lambda _, given, key=key: seen.setdefault(key, []).append(given[0][0].numpy())
            )
    for batch in batches:
        rows = zip(
            *(np.asarray(batch[k]) for k in ("input_ids", "positions", "segment_ids")), strict=True
        )
        for ids, positions, segments in rows:
            for segment in np.unique(segments):
                one = segments == segment
                with torch.no_grad():
                    model(
                        torch.tensor(ids[one])[None].long(),
                        position_ids=torch.tensor(positions[one])[None].long(),
                    )
    return {key: np.concatenate(parts) for key, parts in seen.items()}


@pytest.fixture(scope="module")
def entered(checked, inputs):
    run, frozen = checked
    batches = RowMoments(run, frozen, run.data.examples, run.length).batches()
    return batches, inputs_by_torch(inputs / "model", batches)


def test_batches_hold_the_first_rows_without_padding(checked, entered):
    run, (batches, _) = checked[0], entered
    ids = np.concatenate([np.asarray(batch["input_ids"]).reshape(-1) for batch in batches])
    rows = np.concatenate([row.input_ids for row in run.data.examples[:6]])
    assert len(ids) >= len(rows)
    assert np.array_equal(ids, np.resize(rows, len(ids)))
    assert all(np.asarray(batch["segment_ids"]).min() > 0 for batch in batches)


@pytest.mark.parametrize("path", PATHS)
def test_moments_are_those_of_what_enters_the_layers(checked, entered, path):
    run, frozen = checked
    moments = RowMoments(run, frozen, run.data.examples, run.length)(path)
    assert moments.dtype == jnp.float32
    for i, got in enumerate(np.asarray(moments)):
        x = entered[1][f"model.layers.{i}.{PATHS[path]}"]
        np.testing.assert_allclose(got, x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_it_begins_with_the_best_product_on_the_data(checked, entered):
    run, frozen = checked
    loaded = run.load()
    for module in run.adapters.modules:
        a, b = (np.float64(loaded.trainable[f"{module.path}.lora_{s}"][module.layer]) for s in "ab")
        weight = np.float64(frozen[f"{module.path}.kernel"][module.layer])
        x = entered[1][module.name]
        _, s, _ = np.linalg.svd(x @ weight)
        lost = np.linalg.norm(x @ (weight - module.scale * a @ b))
        assert lost == pytest.approx(np.linalg.norm(s[module.rank :]), rel=1e-3)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_it_trains_goes_on_and_exports(config, tmp_path, method, no_curves):
    changes = settings({"adapter.method": method})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = invoke("train", config, "--workdir", whole, *changes)
    assert done.code == 0, done.err
    rows = metrics_of(whole)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["consistency"] == 0  # measured from its own start
    assert rows[-1]["consistency"] > 0
    stop = settings({"training.stop_at": 2})
    assert invoke("train", config, "--workdir", parts, *changes, *stop).code == 0
    done = invoke("train", config, "--workdir", parts, "--resume", *changes)
    assert done.code == 0, done.err
    assert metrics_of(parts) == rows
    saved = json.loads((parts / "adapter" / "adapter_config.json").read_text())
    assert (saved["r"], saved["use_dora"]) == (4, method == "dora")
    one, other = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (whole, parts))
    assert all(np.array_equal(one[name], other[name]) for name in one.keys() | other.keys())


def test_it_trains_on_eight_devices_as_on_one(config, tmp_path, process_environment, no_curves):
    alone = invoke("train", config, "--workdir", tmp_path / "one")
    assert alone.code == 0, alone.err
    mesh = settings({"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2})
    environment = {**process_environment, **compiler.on_cpu(8)}
    command = [sys.executable, "-m", "balora_jax", "train", str(config), *mesh]
    done = subprocess.run(
        [*command, "--workdir", str(tmp_path / "eight")],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for one, eight in zip(
        metrics_of(tmp_path / "one"), metrics_of(tmp_path / "eight"), strict=True
    ):
        for name, value in one.items():
            assert eight[name] == pytest.approx(value, rel=2e-3, abs=2e-4), name


def test_a_start_that_reads_rows_needs_rows(checked):
    run, frozen = checked
    with pytest.raises(InputError) as caught:
        run.adapters.begin(frozen, run.config.model, run.layout, seed=0)
    assert str(caught.value) == (
        "adapter.start: expected a start that reads no rows of data here, got 'aware', which does. "
        "Choose another, or train on text."
    )
