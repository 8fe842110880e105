"""``balora eval`` and ``generate`` compute with the base that training computes with."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balora_jax.config_file import parse_config
from balora_jax.errors import InputError
from balora_jax.finetune import fit
from balora_jax.tasks.registry import TASKS
from balora_jax.tasks.text.score import opened_model
from tests import tiny_labels_run, tiny_run

IDS = np.array([[3, 7, 5, 9, 4, 6]], np.int32)


def logits(model):
    return np.asarray(model(jnp.asarray(IDS)), np.float32)


def test_a_decoder_is_quantised_as_in_training(tmp_path):
    inputs = tiny_run.write_inputs(tmp_path)
    made = {}
    for kind in ("none", "int8"):
        tree = tiny_run.config_tree(inputs, model={"quantization": kind})
        made[kind] = parse_config(tree, "config")
    run = TASKS["text"].check(made["int8"])
    frozen = run.base.load_for(run.plain)
    forward = jax.jit(lambda parts: run.plain.bind(*parts)(jnp.asarray(IDS), jnp.ones_like(IDS)))
    ours = logits(opened_model(made["int8"].model, None))
    assert np.array_equal(ours, np.asarray(forward((frozen,)), np.float32))
    assert not np.allclose(ours, logits(opened_model(made["none"].model, None)), atol=1e-4)


@pytest.mark.parametrize("task", ["text", "labels"])
def test_the_score_of_a_saved_adapter_is_that_of_its_run(task, tmp_path):
    """Of an int8 base, on which the float base gives another model."""
    if task == "text":
        inputs = tiny_run.write_inputs(tmp_path)
        tree = tiny_run.config_tree(inputs, model={"quantization": "int8"}, eval={"task": None})
    else:
        inputs = tiny_labels_run.write_label_inputs(tmp_path)
        tree = tiny_labels_run.label_config_tree(inputs, model={"quantization": "int8"})
    tree["training"] |= {"max_steps": 2}
    config = parse_config(tree, "config")
    summary = fit(config, workdir=tmp_path / "run")
    found = TASKS[task].evaluate(config, adapter=str(tmp_path / "run" / "adapter"))
    assert found.figures == json.loads(json.dumps(summary["after"]))


@pytest.mark.parametrize(
    ("task", "setting", "said"),
    [
        ("text", {"revision": "main"}, "revision"),
        ("labels", {"revision": "main"}, "revision"),
        (
            "text",
            {"attention": "cudnn"},
            "attention: expected auto, xla or blocks on a cpu, got cudnn",
        ),
    ],
)
def test_what_names_the_base_is_read_by_both(task, setting, said, tmp_path):
    """Neither fits here, so that each verb must refuse it."""
    if task == "text":
        tree = tiny_run.config_tree(
            tiny_run.write_inputs(tmp_path), model=setting, eval={"task": None}
        )
    else:
        inputs = tiny_labels_run.write_label_inputs(tmp_path)
        tree = tiny_labels_run.label_config_tree(inputs, model=setting)
    config = parse_config(tree, "config")
    for verb in (TASKS[task].check, lambda config: TASKS[task].evaluate(config, adapter=None)):
        with pytest.raises(InputError, match=said):
            verb(config)
