"""Runs whose teacher is the model as it starts: halves, caches, what is refused and what is said."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from balora_jax.config_file import parse_config
from balora_jax.tasks.labels import run as labels_run
from balora_jax.tasks.text import run as text_run
from balora_jax.training.workdir import TEACHER as CACHE
from tests import tiny_labels_run, tiny_run
from tests.run.conftest import invoke, settings
from tests.tiny_run import adapter_bytes, metrics_of

pytestmark = pytest.mark.usefixtures("no_curves")

NOTE = (
    "note: the adapter of adapter.start brings its trained head, and regularizers.teacher: base "
    "puts that head on the encoder without the adapter, so that consistency does not begin at 0. "
    "Set regularizers.teacher to start for the model as it starts to train.\n"
)
PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"


def write_adapter(folder, factors, whole, **config):
    """An adapter as PEFT saves one: factors of layers (name → [out, in]), and whole tensors."""
    rng = np.random.default_rng(7)
    tensors = {}
    for name, (out, into) in factors.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = 0.3 * rng.standard_normal((2, into))
        tensors[f"{PREFIX}{name}.lora_B.weight"] = 0.3 * rng.standard_normal((out, 2))
    for name, shape in whole.items():
        tensors[PREFIX + name] = rng.standard_normal(shape)
    folder.mkdir()
    save_file({k: np.asarray(v, np.float32) for k, v in tensors.items()}, folder / WEIGHTS)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def text_adapter(folder):
    layers = [f"model.layers.{i}.self_attn.q_proj" for i in range(tiny_run.LAYERS)]
    tables = {"lm_head.weight": (tiny_run.VOCAB_SIZE, tiny_run.WIDTH)}
    return write_adapter(
        folder, dict.fromkeys(layers, (tiny_run.WIDTH,) * 2), tables,
        target_modules=["q_proj"], modules_to_save=["lm_head"],
    )  # fmt: skip


def label_adapter(folder):
    """With the modules that PEFT names for every model with classes."""
    width = tiny_labels_run.WIDTH
    layers = [f"bert.encoder.layer.{i}.attention.self.query" for i in range(tiny_labels_run.LAYERS)]
    head = {
        "bert.pooler.dense.weight": (width, width), "bert.pooler.dense.bias": (width,),
        "classifier.weight": (2, width), "classifier.bias": (2,),
    }  # fmt: skip
    return write_adapter(
        folder, dict.fromkeys(layers, (width, width)), head, task_type="SEQ_CLS",
        target_modules=["query"], modules_to_save=["pooler", "classifier", "score"],
    )  # fmt: skip


def train(config, workdir, *more, **overrides):
    outcome = invoke("train", config, "--workdir", workdir, *more, *settings(overrides))
    assert outcome.code == 0, outcome.err
    return outcome


def change(file):
    """Another value of one number of an adapter."""
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name].flat[0] += 1e-3
    save_file(tensors, file)


def test_text_in_halves_and_another_start(tmp_path, inputs):
    adapter = text_adapter(tmp_path / "adapter")
    config = tiny_run.write_config(
        tmp_path / "config.yaml", inputs,
        adapter={"start": str(adapter)},
        regularizers={"teacher": "start", "diversity": 0.0, "spectral": 0.0},
    )  # fmt: skip
    train(config, tmp_path / "whole")
    rows = metrics_of(tmp_path / "whole")
    assert rows[0]["consistency"] == 0.0
    assert rows[-1]["consistency"] > 1e-4

    half = tmp_path / "half"
    train(config, half, **{"training.stop_at": 2})
    kept = shutil.copytree(adapter, tmp_path / "kept")
    change(adapter / WEIGHTS)
    before = tiny_run.tree_digest(half)
    refused = invoke("train", config, "--workdir", half, "--resume")
    assert refused.code == 2
    assert "expected the adapter of adapter.start that this run began with (fing" in refused.err
    assert "Put the first one back, or use a new --workdir." in refused.err
    assert tiny_run.tree_digest(half) == before
    shutil.copy(kept / WEIGHTS, adapter / WEIGHTS)
    train(config, half, "--resume")
    assert metrics_of(half) == rows
    assert adapter_bytes(half) == adapter_bytes(tmp_path / "whole")


@pytest.mark.parametrize("start", ["pissa", "lora"])
def test_adapters_that_start_anew_have_one_teacher(inputs, start):
    """It is the base, on the same arrays, and nothing is kept beside."""
    adapter = {**tiny_run.FEW, "start": start, "modules_to_save": ["norm"]}
    tree = tiny_run.config_tree(inputs, adapter=adapter, regularizers={"teacher": "start"})
    run = text_run.check(parse_config(tree, "here"))
    parts, constants = run.step_parts(4), run.constants(run.load())
    assert parts.loss.teacher is run.plain
    assert constants.start is None
    assert constants.of_teacher == (constants.frozen,)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Inputs, an adapter with its trained head, and settings that go on from it."""
    folder = tmp_path_factory.mktemp("labelled")
    inputs = tiny_labels_run.write_label_inputs(folder)
    adapter = label_adapter(folder / "adapter")
    config = tiny_labels_run.write_label_config(
        folder / "config.yaml", inputs,
        adapter={"start": str(adapter)}, training={"max_steps": 4}, eval={"task": "none"},
    )  # fmt: skip
    return inputs, adapter, config


def test_labels_in_halves(tmp_path, labelled):
    _, _, config = labelled
    taught = {"regularizers.teacher": "start"}
    whole = train(config, tmp_path / "whole", **taught)
    assert "note" not in whole.err
    rows = metrics_of(tmp_path / "whole")
    # Nothing but rounding: log-probabilities of size up to 4 to the last place, 2^-23 of them.
    assert abs(rows[0]["consistency"]) < 4 * 2.0**-23
    assert rows[-1]["consistency"] > 1e-3
    train(config, tmp_path / "half", **taught, **{"training.stop_at": 2})
    train(config, tmp_path / "half", "--resume", **taught)
    assert metrics_of(tmp_path / "half") == rows
    assert adapter_bytes(tmp_path / "half") == adapter_bytes(tmp_path / "whole")
    assert (tmp_path / "half" / CACHE).read_bytes() == (tmp_path / "whole" / CACHE).read_bytes()
    written = json.loads((tmp_path / "half" / "adapter" / "adapter_config.json").read_text())
    assert written["modules_to_save"] == ["classifier", "pooler"]


def test_a_head_that_trained_on_another_encoder_is_named(labelled, capsys):
    """Its teacher is the paper's, so it is no error."""
    runs = {}
    for teacher in ("base", "start"):
        tree = tiny_labels_run.label_config_tree(
            labelled[0],
            adapter={"start": str(labelled[1])},
            regularizers={"teacher": teacher},
        )
        runs[teacher] = labels_run.check(parse_config(tree, "here"))
        said = capsys.readouterr().err
        assert said == (NOTE if teacher == "base" else "")
    assert runs["base"].taught is runs["base"].plain
    assert runs["start"].taught is runs["start"].student


@pytest.mark.parametrize("task", ["text", "labels"])
def test_a_teacher_that_nothing_reads_is_named(tmp_path, inputs, labelled, task, capsys):
    regularizers = {"teacher": "start", "consistency": 0.0}
    if task == "text":
        adapter = {"start": str(text_adapter(tmp_path / "adapter"))}
        tree = tiny_run.config_tree(inputs, adapter=adapter, regularizers=regularizers)
        run = text_run.check(parse_config(tree, "here"))
    else:
        adapter = {"start": str(labelled[1])}
        tree = tiny_labels_run.label_config_tree(
            labelled[0], adapter=adapter, regularizers=regularizers
        )
        run = labels_run.check(parse_config(tree, "here"))
    assert capsys.readouterr().err.splitlines()[-1] == (
        "note: regularizers.teacher: start is not read, as no term that compares with a teacher "
        "has a weight."
    )
    assert run.constants(run.load()).start is None
