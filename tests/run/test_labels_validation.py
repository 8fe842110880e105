"""Loss and terms of held-out rows with labels, in NumPy on the logits of single rows."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balora_jax.config_file import parse_config
from balora_jax.errors import InputError
from balora_jax.tasks.labels import run as labels_run
from balora_jax.tasks.labels.score import logits_forward
from tests.run.conftest import invoke
from tests.tiny_labels_run import (
    SCORES,
    label_config_tree,
    write_label_config,
    write_label_inputs,
)
from tests.tiny_run import metrics_of

pytestmark = pytest.mark.usefixtures("no_curves")

MICRO_BATCH, TEMPERATURE = 4, 2.0
SECTIONS = {
    "training": {
        "max_steps": 3,
        "batch_size": 2 * MICRO_BATCH,
        "keep_best": "score_accuracy",
    },
    "eval": {"every": 3, "score_every": 1},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_label_inputs(tmp_path_factory.mktemp("labels"))


def log_softmax(z):
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def logits_of(run, bind, parts):
    """In float64, of one row after another without any padding."""
    forward, found = logits_forward(bind), []
    for example in run.held_out.examples:
        ids = example.input_ids[None]
        found.append(forward(parts, ids, np.ones_like(ids), example.token_type_ids[None])[0])
    return np.array(found, np.float64)


def expected(z, taught, labels):
    """The loss over all rows; the terms of micro-batches in order, by their rows."""
    found, rows = [], []
    for start in range(0, len(z), MICRO_BATCH):
        part = slice(start, start + MICRO_BATCH)
        own, count = z[part], len(z[part])
        log_s, log_t = log_softmax(own / TEMPERATURE), log_softmax(taught[part] / TEMPERATURE)
        kl = TEMPERATURE**2 * (np.exp(log_t) * (log_t - log_s)).sum(axis=1).mean()
        covariance = np.cov(own.T) if count > 1 else np.zeros((2, 2))
        values = np.linalg.svd(own, compute_uv=False)
        found.append([kl, 2 * covariance[0, 1] ** 2 / 2, -values[0] / values.sum()])
        rows.append(count)
    terms = np.average(found, axis=0, weights=rows)
    loss = -log_softmax(z)[np.arange(len(z)), labels].mean()
    return dict(zip(("loss", "consistency", "diversity", "spectral"), (loss, *terms), strict=True))


def moved(loaded):
    rng = np.random.default_rng(5)
    return {
        path: jnp.asarray(value) + 0.1 * rng.standard_normal(value.shape).astype(np.float32)
        for path, value in sorted(loaded.trainable.items())
    }


def test_figures_are_those_of_the_definitions(inputs):
    """21 rows: five micro-batches and a row that is left."""
    run = labels_run.check(parse_config(label_config_tree(inputs, **SECTIONS), "test"))
    loaded = run.load()
    constants, trainable = run.constants(loaded), moved(loaded)
    validator = run.validator()
    with jax.set_mesh(run.mesh):
        found = validator(constants, trainable)
        again = validator(constants, trainable)
    parts = (constants.frozen, constants.origin, trainable)
    z = logits_of(run, run.student.bind, parts)
    taught = logits_of(run, run.taught.bind, constants.of_teacher)
    labels = np.array([example.label for example in run.held_out.examples])
    want = expected(z, taught, labels)
    assert found == again == pytest.approx(want, rel=2e-5)
    assert min(abs(value) for value in want.values()) > 1e-4


def test_a_regression_has_the_squared_error(inputs):
    config = label_config_tree(
        inputs,
        data=SCORES,
        training={"batch_size": 8},
        regularizers={"diversity": 0.0, "spectral": 0.0},
        eval={"every": 1},
    )
    run = labels_run.check(parse_config(config, "test"))
    loaded = run.load()
    constants, trainable = run.constants(loaded), moved(loaded)
    with jax.set_mesh(run.mesh):
        found = run.validator()(constants, trainable)
    parts = (constants.frozen, constants.origin, trainable)
    z = logits_of(run, run.student.bind, parts)[:, 0]
    labels = np.array([example.label for example in run.held_out.examples], np.float64)
    assert found["loss"] == pytest.approx(np.square(z - labels).mean(), rel=1e-5)
    assert set(found) == {"loss", "consistency"}


def test_a_run_measures_scores_and_keeps_the_best(inputs, tmp_path):
    config = write_label_config(tmp_path / "config.yaml", inputs, **SECTIONS)
    outcome = invoke("train", config, "--workdir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    rows = metrics_of(tmp_path / "run")
    assert [row["step"] for row in rows if "validation_loss" in row] == [0, 3]
    scores = {row["step"]: row["score_accuracy"] for row in rows if "score_accuracy" in row}
    assert list(scores) == [1, 2, 3]
    best = json.loads((tmp_path / "run" / "summary.json").read_text())["validation"]["best"]
    assert best["value"] == max(scores.values())
    assert best["step"] == next(step for step, value in scores.items() if value == best["value"])
    assert (tmp_path / "run" / "best" / "adapter_model.safetensors").is_file()
    assert "validation_perplexity" not in rows[-1]


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        (
            {"training": {"keep_best": "score_exact_match"}},
            "training.keep_best: expected one of validation_loss, validation_consistency, "
            "validation_diversity, validation_spectral, score_accuracy, score_f1, got",
        ),
        (
            {"data": {"validation": None}, "eval": {"every": 1}, "training": {"keep_best": None}},
            "eval.every: expected rows in data.validation beside it",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(inputs, sections, sentence):
    config = label_config_tree(inputs, **{**SECTIONS, **sections})
    with pytest.raises(InputError) as error:
        labels_run.check(parse_config(config, "test"))
    assert str(error.value).startswith(sentence)
