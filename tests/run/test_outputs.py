"""Files that the documents promise, and the other commands going on from them."""

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from balora_jax import load_config
from tests.run.conftest import invoke, settings
from tests.tiny_run import (
    FEW,
    LAYERS,
    LINEAR,
    VOCAB_SIZE,
    WIDTH,
    checkpoint_steps,
    metrics_of,
    random_weights,
    sums,
    write_config,
)

COLUMNS = {
    "step", "loss", "task_loss", "consistency", "diversity", "spectral", "lambda1", "lambda2",
    "lambda3", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "step_seconds",
    "spectral_residual", "fill", "skipped", "skipped_in_a_row",
}  # fmt: skip
TERMS = ("task_loss", "consistency", "diversity", "spectral")
SHARES = {f"gradient_{kind}_{term}" for kind in ("share", "norm") for term in TERMS}
RANK = 2
TRAINABLE = LAYERS * sum(RANK * (rows + columns) for rows, columns in LINEAR.values())
TOTAL = sum(value.size for value in random_weights().values())


def test_the_folder_holds_what_is_promised(finished):
    names = {path.name for path in finished.workdir.iterdir()}
    assert names == {
        "config.yaml", "metrics.jsonl", "checkpoints", "adapter", "summary.json", "curves.png",
        "predictions",
    }  # fmt: skip
    assert {path.name for path in (finished.workdir / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "balora_config.yaml",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert checkpoint_steps(finished.workdir) == [2, 4]


def test_the_config_is_the_resolved_one(finished):
    saved = finished.workdir / "config.yaml"
    assert load_config(saved) == load_config(finished.config)
    tree = yaml.safe_load(saved.read_text())
    assert tree["training"]["learning_rate"] == 0.05  # as given
    assert tree["training"]["beta2"] == 0.999  # a default
    assert set(tree) == {
        "extensions", "task", "model", "adapter", "regularizers", "data", "training", "mesh", "eval", "study",
    }  # fmt: skip


def test_overrides_are_in_the_saved_config(tmp_path, inputs, no_curves):
    off = {"consistency": 0, "diversity": 0}
    config = write_config(tmp_path / "c.yaml", inputs, adapter=FEW, regularizers=off)
    changes = settings({"training.max_steps": 1, "regularizers.spectral": 0})
    assert invoke("train", config, "--workdir", tmp_path / "run", *changes).code == 0
    tree = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert tree["training"]["max_steps"] == 1
    assert tree["regularizers"]["spectral"] == 0
    (row,) = metrics_of(tmp_path / "run")
    assert row["loss"] == row["task_loss"] > 0
    for name in ("consistency", "diversity", "spectral", "lambda1", "lambda2", "lambda3"):
        assert row[name] == 0.0


def test_a_row_for_every_step(finished):
    rows = metrics_of(finished.workdir, without=())
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row.keys() - SHARES == COLUMNS
        assert all(math.isfinite(value) for value in row.values())
        assert row["tokens_per_second"] > 0
        assert row["step_seconds"] > 0
        assert isinstance(row["tokens"], int)
        assert (row["skipped"], row["skipped_in_a_row"]) == (0, 0)


def test_the_loss_is_the_weighted_sum(finished):
    for row in metrics_of(finished.workdir):
        total = row["task_loss"] + sum(
            row[f"lambda{i}"] * row[name] for i, name in enumerate(TERMS[1:], start=1)
        )
        assert row["loss"] == pytest.approx(total, rel=1e-5)
    first, last = metrics_of(finished.workdir)[0], metrics_of(finished.workdir)[-1]
    assert last["task_loss"] < first["task_loss"]
    assert first["learning_rate"] == pytest.approx(0.05)
    assert last["learning_rate"] < first["learning_rate"]


def test_tokens_are_those_of_the_responses(finished, inputs):
    """Three steps of 8 rows are one epoch of 24: every response and its EOS once."""
    rows = metrics_of(finished.workdir)
    expected = sum(len(row["answer"]) + 1 for row in sums(24, seed=0))
    assert sum(row["tokens"] for row in rows[:3]) == expected


@pytest.mark.parametrize("start", ["pissa", "lora"])
def test_consistency_begins_at_exactly_nothing(finished, tmp_path, inputs, no_curves, start):
    workdir = finished.workdir
    if start == "lora":
        workdir = tmp_path / "run"
        config = write_config(
            tmp_path / "c.yaml", inputs, adapter={"start": "lora"},
            training={"stop_at": 2},
        )  # fmt: skip
        assert invoke("train", config, "--workdir", workdir).code == 0
    rows = metrics_of(workdir)
    assert rows[0]["consistency"] == 0.0
    assert rows[1]["consistency"] > 0.0


def test_gradient_shares(finished):
    rows = metrics_of(finished.workdir)
    for row in rows:
        assert (row.keys() >= SHARES) == (row["step"] % 2 == 0)
        assert not (row["step"] % 2 and row.keys() & SHARES)
    for row in rows[1::2]:
        shares = [row[f"gradient_share_{term}"] for term in TERMS]
        norms = [row[f"gradient_norm_{term}"] for term in TERMS]
        assert sum(shares) == pytest.approx(1.0, abs=1e-6)
        assert np.allclose(shares, np.array(norms) / sum(norms), rtol=1e-5)
        assert all(norm > 0 for norm in norms)


def test_the_summary(finished):
    summary = json.loads((finished.workdir / "summary.json").read_text())
    assert summary.keys() == {
        "before", "after", "trainable_parameters", "total_parameters", "steps",
        "skipped_updates", "wall_seconds", "peak_memory_bytes", "versions", "device",
    }  # fmt: skip
    for name in ("before", "after"):
        assert summary[name].keys() == {
            *("exact_match", "answered", "rows"),
            *("grader", "undecided"),
        }
        assert summary[name]["rows"] == 3
    assert summary["steps"] == 4
    assert summary["trainable_parameters"] == TRAINABLE
    assert summary["total_parameters"] == TOTAL
    assert summary["wall_seconds"] > 0
    assert summary["peak_memory_bytes"] > 10**6
    assert {"jax", "flax", "optax", "python"} <= summary["versions"].keys()


def test_the_curves_are_a_picture(finished):
    pytest.importorskip("matplotlib")
    data = (finished.workdir / "curves.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[12:16] == b"IHDR"
    width, height = struct.unpack(">II", data[16:24])
    assert width > 400
    assert height > 200
    assert data[-8:-4] == b"IEND"


def test_what_is_printed_at_the_start(finished):
    shown, there, rest = finished.out.partition("all other settings are their defaults, written to")
    assert there
    assert rest.splitlines()[0] == f" {finished.workdir / 'config.yaml'}"
    # What the config gives, but for what is given as it would be without.
    given = yaml.safe_load(Path(finished.config).read_text())
    assert given["eval"].pop("task") == "exact_match"
    printed = yaml.safe_load(shown)
    assert printed["eval"].pop("task") == "exact_match"
    assert given["training"].pop("weight_decay") == printed["training"].pop("weight_decay") == 0.01
    assert given["adapter"].pop("start") == "pissa"  # the default
    assert printed == given
    assert f"({TOTAL:,} parameters)" in rest.replace("llama, ", "(").replace("((", "(")
    assert f"adapters: {LAYERS * len(LINEAR)} layers" in rest
    assert f"{TRAINABLE:,} trainable parameters" in rest
    assert "24 examples of 24 rows (0 truncated" in rest
    row = sums(24, seed=0)[0]
    # The prompt is masked, the response and its EOS are not.
    assert f"<s>{row['question']}=⟦{row['answer']}</s>⟧" in rest
    assert "exact match on held-out rows: 0.000 -> " in rest
    assert "training: 4 of 4, " in finished.err


@pytest.mark.parametrize("with_adapter", [True, False])
def test_eval_gives_the_score_of_the_run(finished, tmp_path, with_adapter):
    summary = json.loads((finished.workdir / "summary.json").read_text())
    adapter = ["--adapter", finished.workdir / "adapter"] if with_adapter else []
    figures = tmp_path / "figures.json"
    outcome = invoke("eval", finished.config, *adapter, "--json", figures)
    assert outcome.code == 0, outcome.err
    found = json.loads(figures.read_text())
    title = "after" if with_adapter else "before"
    lines = (finished.workdir / "predictions" / f"{title}.jsonl").read_text().splitlines()
    assert found.pop("predictions") == [json.loads(line) for line in lines]
    assert found == summary[title]


def generated(tmp_path, config, *more):
    figures = tmp_path / "texts.json"
    arguments = [part for text in PROMPTS for part in ("--prompt", text)]
    outcome = invoke("generate", config, *arguments, *more, "--json", figures)
    assert outcome.code == 0, outcome.err
    found = json.loads(figures.read_text())
    assert [entry["prompt"] for entry in found] == PROMPTS
    for entry in found:
        assert f"> {entry['prompt']}\n{entry['text']}\n" in outcome.out
    return [entry["text"] for entry in found]


PROMPTS = ["1+1", "20+3", "7+55"]


def test_generate_takes_the_template_unless_told_otherwise(finished, tmp_path):
    adapter = ["--adapter", finished.workdir / "adapter"]
    texts = generated(tmp_path, finished.config, *adapter)
    assert all(len(text) <= 4 for text in texts)  # eval.max_new_tokens, a character each
    plain = ["--raw", *adapter]
    assert generated(tmp_path, finished.config, *plain) != texts
    template = settings({"data.template": "'{question}='", "data.prompt_column": "question"})
    assert generated(tmp_path, finished.config, *adapter, *template) == texts


def exported(finished, out, *more):
    figures = out.with_suffix(".json")
    outcome = invoke(
        "export", finished.config, "--workdir", finished.workdir, "--out", out,
        "--json", figures, *more,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    return json.loads(figures.read_text())


def deltas(folder):
    """alpha / r · B A of every layer in an adapter folder, float64."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for layer in range(LAYERS):
        for name in LINEAR:
            stem = f"base_model.model.model.layers.{layer}.{name}"
            down = tensors[f"{stem}.lora_A.weight"].astype(np.float64)
            up = tensors[f"{stem}.lora_B.weight"].astype(np.float64)
            scale = config["lora_alpha"] / config["r"]
            found[f"model.layers.{layer}.{name}.weight"] = scale * up @ down
    assert len(tensors) == 2 * len(found)
    return found


def test_export_as_an_adapter(finished, tmp_path):
    figures = exported(finished, tmp_path / "peft")
    assert figures["format"] == "peft"
    assert figures["rank"] == 2 * RANK  # on the original base, whose start is not zero
    assert figures["parameters"] == 2 * TRAINABLE
    assert figures["relative_error"] == 0.0
    expected, found = deltas(finished.workdir / "adapter"), deltas(tmp_path / "peft")
    for name, value in expected.items():
        assert np.abs(value).max() > 1e-3
        np.testing.assert_array_equal(found[name], value)


def test_export_of_a_smaller_rank_is_the_best_one(finished, tmp_path):
    figures = exported(finished, tmp_path / "small", "--rank", 1)
    assert figures["rank"] == 1
    assert figures["parameters"] == TRAINABLE // RANK
    expected, found = deltas(finished.workdir / "adapter"), deltas(tmp_path / "small")
    lost = whole = 0.0
    for name, value in expected.items():
        sigma = np.linalg.svd(value, compute_uv=False)
        error = np.linalg.norm(found[name] - value)
        assert error == pytest.approx(np.linalg.norm(sigma[1:]), rel=1e-4)
        lost, whole = lost + error**2, whole + np.linalg.norm(value) ** 2
    assert figures["relative_error"] == pytest.approx(math.sqrt(lost / whole), rel=1e-4)


def test_export_merged(finished, tmp_path, inputs):
    out = tmp_path / "merged"
    figures = exported(finished, out, "--format", "merged")
    assert figures["format"] == "merged"
    assert figures["merged_weights"] == LAYERS * len(LINEAR)
    names = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    base, found = random_weights(), load_file(out / "model.safetensors")
    assert found.keys() == base.keys()
    changed = deltas(finished.workdir / "adapter")
    for name, value in base.items():
        expected = value.astype(np.float64) + changed.get(name, 0.0)
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-6, err_msg=name)
        assert np.array_equal(found[name], value) == (name not in changed)
    assert found["lm_head.weight"].shape == (VOCAB_SIZE, WIDTH)
    # A model folder like any other: the texts are those of base and adapter.
    adapter = ["--adapter", finished.workdir / "adapter"]
    texts = generated(tmp_path, finished.config, *adapter)
    assert generated(tmp_path, finished.config) != texts
    merged = settings({"model.name_or_path": out})
    assert generated(tmp_path, finished.config, *merged) == texts


def test_an_adapter_folder_may_be_the_start(finished, tmp_path, no_curves):
    """At learning rate ~0 the run that goes on exports the deltas that it began with."""
    changes = settings(
        {"adapter.start": finished.workdir / "adapter", "training.learning_rate": 1e-20,
         "eval.task": "none", "training.max_steps": 1, "regularizers.spectral": 0}
    )  # fmt: skip
    outcome = invoke("train", finished.config, "--workdir", tmp_path / "run", *changes)
    assert outcome.code == 0, outcome.err
    expected, found = deltas(finished.workdir / "adapter"), deltas(tmp_path / "run" / "adapter")
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-7)
    # The teacher is the base, not the start, so the term is at work at once.
    assert metrics_of(tmp_path / "run")[0]["consistency"] > 0.0
