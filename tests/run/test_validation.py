"""Loss and terms of held-out rows while a run trains, against torch in float64 row by row."""

import json
import shutil
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import LlamaForCausalLM

from balora_jax.config_file import parse_config
from balora_jax.errors import InputError
from balora_jax.tasks.text import run as text_run
from tests.run.conftest import invoke, settings
from tests.tiny_run import (
    FEW,
    VOCABULARY,
    config_tree,
    metrics_of,
    sums,
    tree_digest,
    write_config,
    write_inputs,
    write_rows,
)

pytestmark = pytest.mark.usefixtures("no_curves")

ROWS = sums(6, 11)
MICRO_BATCH, K, TOP_K, TEMPERATURE = 4, 3, 5, 2.0
SECTIONS = {
    "adapter": FEW,
    "training": {
        "max_steps": 6,
        "batch_size": 2 * MICRO_BATCH,
        "keep_best": "validation_loss",
        "checkpoint_every": 0,
    },
    "eval": {"every": 2, "score_every": 3, "task": "exact_match"},
}


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Inputs with six validation rows: a micro-batch of training and half of one."""
    folder = write_inputs(tmp_path_factory.mktemp("held_out"))
    write_rows(folder / "validation.jsonl", ROWS)
    return folder


def train(config, workdir, *more, **overrides):
    outcome = invoke("train", config, "--workdir", workdir, *more, *settings(overrides))
    assert outcome.code == 0, outcome.err
    return outcome


@pytest.fixture(scope="module")
def straight(tmp_path_factory, held_out):
    """A config, its run, and what that printed."""
    folder = tmp_path_factory.mktemp("straight")
    config = write_config(folder / "config.yaml", held_out, **SECTIONS)
    return config, folder / "run", train(config, folder / "run")


def summary_of(workdir):
    return json.loads((workdir / "summary.json").read_text())


def validation_of(figures):
    return {name: v for name, v in figures.items() if name.startswith("validation_")}


@cache
def torch_model(folder):
    return LlamaForCausalLM.from_pretrained(folder, torch_dtype=torch.float64).eval()


def with_deltas(model, deltas):
    """Logits of every row, with these added to the weights by the names of their modules."""
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for name, delta in deltas.items():
        model.get_submodule(name).weight.data += torch.tensor(delta, dtype=torch.float64)
    found = []
    for row in ROWS:
        prompt = [1, *(VOCABULARY.index(c) for c in f"{row['question']}=")]
        response = [*(VOCABULARY.index(c) for c in row["answer"]), 2]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0].numpy()
        found.append((logits[len(prompt) - 1 : -1], np.array(response)))
    model.load_state_dict(before)
    return found


def log_softmax(z):
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def expected(folder, deltas):
    """Loss, perplexity and the three terms, from the definitions."""
    model = torch_model(str(folder / "model"))
    student, teacher = with_deltas(model, deltas), with_deltas(model, {})
    nll = [-log_softmax(z)[np.arange(len(y)), y] for z, y in student]
    kl, entropy = [], []
    for (z, _), (z_teacher, _) in zip(student, teacher, strict=True):
        log_s, log_t = log_softmax(z / TEMPERATURE), log_softmax(z_teacher / TEMPERATURE)
        kl.append(TEMPERATURE**2 * (np.exp(log_t) * (log_t - log_s)).sum(axis=1))
        log_p = log_softmax(np.sort(z, axis=1)[:, -TOP_K:])
        entropy.append(-(np.exp(log_p) * log_p).sum(axis=1))
    spectral, counts = [], []
    for start in range(0, len(ROWS), MICRO_BATCH):
        matrix = np.concatenate([z for z, _ in student[start : start + MICRO_BATCH]])
        values = np.linalg.svd(matrix, compute_uv=False)
        spectral.append(-values[:K].sum() / np.sqrt((values**2).sum()))
        counts.append(len(matrix))
    loss = np.concatenate(nll).mean()
    return {
        "validation_loss": loss,
        "validation_perplexity": np.exp(loss),
        "validation_consistency": np.concatenate(kl).mean(),
        "validation_diversity": -np.concatenate(entropy).mean(),
        "validation_spectral": np.average(spectral, weights=counts),
    }


def deltas_of(adapter):
    """What a PEFT folder adds to the weights, [out, in] by module."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    names = [name.removesuffix(".lora_A.weight") for name in tensors if "lora_A" in name]
    scale = config["lora_alpha"] / config["r"]
    return {
        name.removeprefix("base_model.model."): scale
        * (tensors[f"{name}.lora_B.weight"].astype(float) @ tensors[f"{name}.lora_A.weight"])
        for name in names
    }


def test_figures_of_a_run_are_those_of_the_definitions(straight, held_out):
    _, run, printed = straight
    rows, found = metrics_of(run), summary_of(run)["validation"]
    at = [row["step"] for row in rows if "validation_loss" in row]
    assert at == [0, 2, 4, 6]
    assert [row["step"] for row in rows if "score_exact_match" in row] == [3, 6]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    assert rows[0]["loss"] is None
    assert validation_of(rows[0]) == found["before"]
    assert validation_of(rows[-1]) == found["after"]
    assert found["before"] == pytest.approx(expected(held_out, {}), rel=1e-5, abs=1e-6)
    after = expected(held_out, deltas_of(run / "adapter"))
    assert found["after"] == pytest.approx(after, rel=1e-5)
    assert after["validation_consistency"] > 1e-2
    assert f"step 2: validation loss {rows[2]['validation_loss']:.4f}, " in printed.out
    assert "first validation example: " in printed.out
    score = summary_of(run)["after"]
    assert rows[-1]["score_exact_match"] == score["exact_match"]
    assert rows[-1]["score_rows"] == len(ROWS) == score["rows"]
    assert printed.out.count("exact match") == 4  # before, twice on the way, the gain


def test_the_best_adapter_is_kept(straight, held_out):
    _, run, _ = straight
    rows = [row for row in metrics_of(run)[1:] if "validation_loss" in row]
    least = min(rows, key=lambda row: row["validation_loss"])
    best = summary_of(run)["validation"]["best"]
    assert best["metric"] == "validation_loss"
    assert (best["step"], best["value"]) == (least["step"], least["validation_loss"])
    assert validation_of(best) == validation_of(least)
    of_best = expected(held_out, deltas_of(run / "best"))
    assert best["value"] == pytest.approx(of_best["validation_loss"], rel=1e-5)
    names = {path.name for path in (run / "adapter").iterdir()}
    assert {path.name for path in (run / "best").iterdir()} == names
    card = (run / "best" / "README.md").read_text()
    assert f"{best['step']} optimizer steps, 0 updates skipped" in card
    assert f"{best['value']:.4f} after" in card


def test_two_halves_are_the_whole(straight, tmp_path):
    """Broken off between two measurements; ``best/`` of a later step, as a kill leaves it."""
    config, whole, _ = straight
    run = tmp_path / "run"
    train(config, run, **{"training.stop_at": 3})
    shutil.rmtree(run / "best")
    shutil.copytree(whole / "adapter", run / "best")
    train(config, run, "--resume")
    assert metrics_of(run) == metrics_of(whole)
    assert tree_digest(run / "best") == tree_digest(whole / "best")
    assert tree_digest(run / "adapter") == tree_digest(whole / "adapter")
    for key in ("before", "after", "validation"):
        assert summary_of(run)[key] == summary_of(whole)[key]


def test_patience_ends_a_run_and_a_resume_of_it(tmp_path, held_out):
    """The divergence from the teacher begins at 0 and grows: the first measurement is the best."""
    config = write_config(
        tmp_path / "config.yaml",
        held_out,
        adapter={**FEW, "start": "lora"},
        regularizers={"diversity": 0.0, "spectral": 0.0},
        training={
            "keep_best": "validation_consistency",
            "patience": 2,
            "max_steps": 9,
            "checkpoint_every": 2,
        },
        eval={"every": 1},
    )
    run = tmp_path / "run"
    outcome = train(config, run)
    said = "stopped early after step 3: 2 measurements without a better validation consistency"
    assert said in outcome.out
    found = summary_of(run)
    assert found["stopped_early"]
    assert found["steps"] == 3
    assert found["validation"]["best"]["step"] == 1
    assert set(found["validation"]["after"]) == {
        *("validation_loss", "validation_perplexity", "validation_consistency"),
    }
    before = tree_digest(run / "best"), tree_digest(run / "adapter"), metrics_of(run)
    assert said in train(config, run, "--resume").out
    assert (tree_digest(run / "best"), tree_digest(run / "adapter"), metrics_of(run)) == before
    assert summary_of(run)["validation"] == found["validation"]
    train(config, run, "--resume", **{"training.patience": 3})
    assert summary_of(run)["steps"] == 4


LAYOUTS = {
    "one example in a row, plain head": {
        "data": {"packing": "none"},
        "training": {"head": "plain"},
    },
    "packed, with what is kept and drawn of the teacher": {
        "data": {"packing": "rows", "max_length": 32},
        "regularizers": {"teacher_cache": True, "teacher_fraction": 0.5},
        "adapter": {"dropout": 0.3, "start": "lora"},
    },
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_figures_do_not_depend_on_the_layout(held_out, name):
    """Adapters some way off, on the same rows in other rows of a batch, by another head."""
    sections = {key: {**SECTIONS.get(key, {}), **v} for key, v in LAYOUTS[name].items()}
    run = text_run.check(parse_config(config_tree(held_out, **{**SECTIONS, **sections}), "test"))
    loaded = run.load()
    rng = np.random.default_rng(5)
    moved = {
        path: value + 0.1 * rng.standard_normal(value.shape).astype(np.float32)
        for path, value in sorted(loaded.trainable.items())
    }
    with jax.set_mesh(run.mesh):
        found = run.validator()(run.constants(loaded), jax.tree.map(jnp.asarray, moved))
    found = {f"validation_{figure}": value for figure, value in found.items()}
    want = expected(held_out, moved_deltas(run, moved, loaded.origin))
    assert found == pytest.approx(want, rel=1e-5)
    assert want["validation_consistency"] > 1e-3


def moved_deltas(run, moved, origin):
    """s (A B - A0 B0) of every layer, [out, in] by the names of the checkpoint's modules."""
    deltas = {}
    for module in run.adapters.modules:
        part = {
            path.removeprefix(f"{module.path}."): np.asarray(value[module.layer], float)
            for path, value in (moved | origin).items()
            if path.startswith(f"{module.path}.")
        }
        delta = part["lora_a"] @ part["lora_b"]
        if "origin_a" in part:
            delta = delta - part["origin_a"] @ part["origin_b"]
        deltas[module.name] = 1.5 * delta.T  # alpha 3 over rank 2
    return deltas


SCORED = {"task": "exact_match"}
REFUSED = {
    "no rows": (
        {"data": {"validation": None}, "eval": {"every": 1}},
        "eval.every: expected rows in data.validation beside it, got none.",
    ),
    "no score": (
        {"eval": {"score_every": 1}},
        "eval.score_every: expected a score of validation rows, got none.",
    ),
    "unknown figure": (
        {"training": {"keep_best": "loss"}, "eval": {**SCORED, "every": 1}},
        "training.keep_best: expected one of validation_loss, validation_perplexity, "
        "validation_consistency, validation_diversity, validation_spectral, score_exact_match, "
        "score_answered, got 'loss'. Choose one of them.",
    ),
    "a term that is off": (
        {
            "training": {"keep_best": "validation_spectral"},
            "regularizers": {"spectral": 0.0},
            "eval": {"every": 1},
        },
        "training.keep_best: expected one of validation_loss, validation_perplexity, "
        "validation_consistency, validation_diversity, got 'validation_spectral'.",
    ),
    "never measured": (
        {"training": {"keep_best": "score_answered"}, "eval": {**SCORED, "every": 1}},
        "training.keep_best: expected eval.score_every beside it, the steps between two "
        "measurements of score_answered, got 0. Set it.",
    ),
    "patience alone": (
        {"training": {"patience": 1}},
        "training.patience: expected eval.every beside it, the steps between two measurements of "
        "validation_loss, got 0. Set it.",
    ),
    "rows of other columns": (
        {"data": {"response_column": "said"}, "eval": {"every": 1}},
        "data.validation with eval.every: row 1: ",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_measured_is_refused(held_out, tmp_path, name):
    sections, sentence = REFUSED[name]
    if name == "rows of other columns":
        renamed = [{"question": row["question"], "said": row["answer"]} for row in ROWS]
        train = write_rows(tmp_path / "train.jsonl", renamed)
        sections = {**sections, "data": {**sections["data"], "train": str(train)}}
    with pytest.raises(InputError) as error:
        text_run.check(parse_config(config_tree(held_out, **sections), "test"))
    assert str(error.value).startswith(sentence)


def test_what_decides_stays(straight, tmp_path):
    """A run whose best is sought by one figure does not go on by another."""
    config, whole, _ = straight
    run = shutil.copytree(whole, tmp_path / "run")
    before = tree_digest(run)
    other = settings({"training.keep_best": "validation_perplexity"})
    outcome = invoke("train", config, "--workdir", run, "--resume", *other)
    assert outcome.code == 2
    assert "expected training.keep_best to stay 'validation_loss'" in outcome.err
    assert tree_digest(run) == before


def test_the_best_of_a_full_fine_tuning_is_a_model(held_out, tmp_path):
    config = write_config(
        tmp_path / "config.yaml",
        held_out,
        adapter={"method": "full", "start": "lora"},
        regularizers={"consistency": 0.0, "diversity": 0.0, "spectral": 0.0},
        training={"max_steps": 2, "keep_best": "validation_loss", "learning_rate": 1e-3},
        eval={"every": 1},
    )
    train(config, tmp_path / "run")
    found = summary_of(tmp_path / "run")["validation"]
    assert found["best"]["step"] == 2
    names = [{p.name for p in (tmp_path / "run" / name).iterdir()} for name in ("best", "model")]
    assert names[0] == names[1]
    files = [tmp_path / "run" / name / "model.safetensors" for name in ("best", "model")]
    assert files[0].read_bytes() == files[1].read_bytes()
    model = LlamaForCausalLM.from_pretrained(files[0].parent, torch_dtype=torch.float64)
    nll = [-log_softmax(z)[np.arange(len(y)), y] for z, y in with_deltas(model, {})]
    assert found["best"]["value"] == pytest.approx(np.concatenate(nll).mean(), rel=1e-5)
