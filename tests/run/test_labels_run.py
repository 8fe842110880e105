"""Runs on labels from end to end: what they leave, resume, the teacher's cache, probe, refusals."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from balora_jax import finetune
from balora_jax.config_file import load_config, parse_config
from balora_jax.data.glue import LabelsTask
from balora_jax.errors import InputError
from balora_jax.tasks.labels import run as labels_run
from balora_jax.tasks.labels import score as labels_score
from balora_jax.tasks.labels.teacher_cache import TeacherCache
from balora_jax.training.workdir import TEACHER as CACHE
from tests.run.conftest import invoke, settings
from tests.tiny_labels_run import (
    INNER,
    LAYERS,
    MODEL,
    POSITIONS,
    SCORES,
    VOCAB_SIZE,
    WIDTH,
    label_config_tree,
    random_weights,
    reviews,
    write_label_config,
    write_label_inputs,
    write_model,
    write_tokenizer,
)
from tests.tiny_run import adapter_bytes, metrics_of, tree_digest, write_rows

pytestmark = pytest.mark.usefixtures("no_curves")

STEPS, HALF = 12, 5
HEAD = WIDTH * WIDTH + WIDTH + 2 * WIDTH + 2
ADAPTERS = LAYERS * 2 * 2 * (WIDTH + WIDTH)  # two layers of rank 2 each
METRICS = {
    *("step", "loss", "task_loss", "consistency", "diversity", "spectral"),
    *("lambda1", "lambda2", "lambda3", "learning_rate", "grad_norm"),
    *("tokens", "tokens_per_second", "step_seconds", "fill", "skipped", "skipped_in_a_row"),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_label_inputs(tmp_path_factory.mktemp("label_inputs"))


def train(config, workdir, *more, **overrides):
    outcome = invoke("train", config, "--workdir", workdir, *more, *settings(overrides))
    assert outcome.code == 0, outcome.err
    return outcome


def summary_of(workdir):
    return json.loads((workdir / "summary.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory, inputs):
    folder = tmp_path_factory.mktemp("finished_labels")
    config = write_label_config(folder / "config.yaml", inputs)
    before = tree_digest(inputs)
    outcome = train(config, folder / "run")
    assert tree_digest(inputs) == before
    return config, folder / "run", outcome


def test_everything_is_written(finished):
    _, run, outcome = finished
    names = {path.name for path in run.iterdir()}
    assert names == {
        *("config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "adapter", CACHE),
        *("curves.png", "predictions"),
    }
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [set(json.loads(line)) for line in lines] == [METRICS] * STEPS
    assert yaml.safe_load((run / "config.yaml").read_text())["task"] == "labels"
    assert {path.name for path in (run / "adapter").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "README.md", "balora_config.yaml"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    written = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert written["task_type"] == "SEQ_CLS"
    assert written["modules_to_save"] == ["classifier", "pooler"]
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    assert saved["base_model.model.classifier.weight"].shape == (2, WIDTH)
    assert saved["base_model.model.bert.pooler.dense.weight"].shape == (WIDTH, WIDTH)
    assert "first example: " in outcome.out
    assert "27 of 27 rows kept" in outcome.out
    assert "validation: 21 of 21 rows kept" in outcome.out
    assert outcome.err.count("warning") == outcome.err.count("note") == 0


def test_the_summary(finished):
    summary = summary_of(finished[1])
    for title in ("before", "after"):
        assert set(summary[title]) == {"accuracy", "f1", "rows"}
        assert summary[title]["rows"] == 21
    assert summary["after"]["accuracy"] >= 0.9 > summary["before"]["accuracy"] + 0.2
    assert summary["trainable_parameters"] == HEAD + ADAPTERS
    assert summary["total_parameters"] == (
        (VOCAB_SIZE + POSITIONS + 2 + 2) * WIDTH
        + LAYERS * (4 * (WIDTH + 1) * WIDTH + (WIDTH + 1) * INNER + (INNER + 1) * WIDTH + 4 * WIDTH)
    )
    assert summary["steps"] == STEPS


def test_the_run_begins_at_its_teacher_and_leaves_it(finished):
    rows = metrics_of(finished[1])
    assert abs(rows[0]["consistency"]) < 1e-6
    assert max(row["consistency"] for row in rows) > 1e-3
    assert rows[-1]["task_loss"] < 0.5 * rows[0]["task_loss"]
    assert all(row["diversity"] > 0 and -1 < row["spectral"] < -0.5 for row in rows)


def test_cached_and_uncached_teacher_agree(finished, tmp_path):
    config, cached, _ = finished
    train(config, tmp_path / "run", **{"regularizers.teacher_cache": "false"})
    assert not (tmp_path / "run" / CACHE).exists()
    found, wanted = metrics_of(tmp_path / "run"), metrics_of(cached)
    assert abs(found[0]["consistency"]) < 1e-6
    assert summary_of(tmp_path / "run")["before"] == summary_of(cached)["before"]
    worst = {
        name: max(abs(a[name] - b[name]) for a, b in zip(found, wanted, strict=True))
        for name in METRICS - {"tokens_per_second", "step_seconds"}
    }
    print(worst, found[0]["consistency"], wanted[0]["consistency"])
    assert max(value for name, value in worst.items() if name != "grad_norm") < 1e-4


def test_two_halves_are_the_whole_and_the_cache_serves_again(finished, tmp_path, monkeypatch):
    config, straight, _ = finished
    run = tmp_path / "run"
    train(config, run, **{"training.stop_at": HALF})
    written = (run / CACHE).stat().st_mtime_ns
    assert metrics_of(run) == metrics_of(straight)[:HALF]
    calls = []
    monkeypatch.setattr(TeacherCache, "write", lambda self, logits: calls.append(logits))
    outcome = train(config, run, "--resume")
    assert f"resumed at step {HALF}" in outcome.out
    assert calls == []
    assert (run / CACHE).stat().st_mtime_ns == written
    assert metrics_of(run) == metrics_of(straight)
    assert adapter_bytes(run) == adapter_bytes(straight)
    for title in ("before", "after"):
        assert summary_of(run)[title] == summary_of(straight)[title]


def test_a_damaged_cache_is_made_anew(finished, tmp_path):
    config, straight, _ = finished
    run = shutil.copytree(straight, tmp_path / "run")
    whole = (run / CACHE).read_bytes()
    (run / CACHE).write_bytes(whole[: len(whole) // 2])
    train(config, run, "--resume")
    assert (run / CACHE).read_bytes() == whole


def test_a_cache_is_of_one_base_head_data_dtype_and_length(tmp_path):
    key = {"base": "b", "own": {"head.out.bias": np.ones(2)}, "examples": "e", "dtype": "float32",
           "length": 8}  # fmt: skip
    logits = np.arange(6, dtype=np.float32).reshape(3, 2)
    assert TeacherCache(tmp_path, **key).read() is None
    TeacherCache(tmp_path, **key).write(logits)
    np.testing.assert_array_equal(TeacherCache(tmp_path, **key).read(), logits)
    others = {"base": "B", "own": {"head.out.bias": np.zeros(2)}, "examples": "E",
              "dtype": "bfloat16", "length": 16}  # fmt: skip
    for name, value in others.items():
        assert TeacherCache(tmp_path, **{**key, name: value}).read() is None, name
    assert [path.name for path in tmp_path.iterdir()] == [CACHE]


@pytest.mark.parametrize("other", ["base", "head", "data"])
def test_the_cache_of_another_run_is_not_used(finished, tmp_path, other):
    """A file left in the folder does not belong to this base, head or data."""
    from balora_jax.config_file import load_config

    config, run, _ = finished
    changes = {}
    if other == "base":
        model = write_model(tmp_path / "model", seed=9)
        changes = {"model.name_or_path": model}
    if other == "head":
        changes = {"training.seed": 7}
    if other == "data":
        rows = write_rows(tmp_path / "train.jsonl", reviews(27, 5))
        changes = {"data.train": rows}
    made = labels_run.check(load_config(config, [f"{k}={v}" for k, v in changes.items()]))
    folder = shutil.copytree(run, tmp_path / "run")
    loaded = made.load()
    with jax.set_mesh(made.mesh):
        found = made.teacher(made.constants(loaded), folder)
    assert (folder / CACHE).read_bytes() != (run / CACHE).read_bytes()
    assert not np.array_equal(found, load_file(run / CACHE)["logits"])


def test_a_probe_gives_both_models_a_head_that_knows_something(finished, tmp_path, inputs):
    config, plain, _ = finished
    train(
        config, tmp_path / "run",
        **{"regularizers.teacher_head": "probe", "training.stop_at": 3},
    )  # fmt: skip
    rows, before = metrics_of(tmp_path / "run"), summary_of(tmp_path / "run")["before"]
    assert before["accuracy"] >= summary_of(plain)["before"]["accuracy"] + 0.2
    assert rows[0]["task_loss"] < 0.5 * metrics_of(plain)[0]["task_loss"]
    assert abs(rows[0]["consistency"]) < 1e-5
    logits = load_file(tmp_path / "run" / CACHE)["logits"]
    kinds = [json.loads(line)["kind"] for line in (inputs / "train.jsonl").read_text().splitlines()]
    assert np.mean(logits.argmax(-1) == np.array([kind == "good" for kind in kinds])) >= 0.9


def test_a_run_goes_on_from_the_adapter_and_head_of_another(finished, tmp_path):
    config, run, _ = finished
    start = {"adapter.start": run / "adapter", "training.stop_at": 1}
    train(config, tmp_path / "next", **start)
    before, after = summary_of(tmp_path / "next")["before"], summary_of(run)["after"]
    assert before == after


def test_a_regression(tmp_path, inputs):
    regularizers = {"consistency": 0.02, "diversity": 0.1, "spectral": 0.1}
    config = write_label_config(
        tmp_path / "config.yaml", inputs, data=SCORES, regularizers=regularizers,
        training={"learning_rate": 0.01, "clip_norm": 1.0, "max_steps": 24},
    )  # fmt: skip
    outcome = train(config, tmp_path / "run")
    assert (
        "note: with one output the diversity and the spectral term are constants; they are left "
        "out.\n"
        "note: consistency with one output is the mean squared difference of the scores.\n"
    ) in outcome.err
    assert "warning" not in outcome.err
    rows, summary = metrics_of(tmp_path / "run"), summary_of(tmp_path / "run")
    assert all(row["diversity"] == row["spectral"] == 0 for row in rows)
    assert abs(rows[0]["consistency"]) < 1e-10 < 1e-3 < rows[-1]["consistency"]
    assert set(summary["after"]) == {"pearson", "spearman", "rows"}
    assert summary["after"]["pearson"] > max(0.5, summary["before"]["pearson"])
    exported = invoke(
        "export", config, "--workdir", tmp_path / "run", "--out", tmp_path / "merged",
        "--format", "merged",
    )  # fmt: skip
    assert exported.code == 0, exported.err
    for_llama = ("export", config, "--workdir", tmp_path / "run", "--out", tmp_path / "g")
    refused = invoke(*for_llama, "--format", "gguf")
    assert refused.code == 2
    assert "llama.cpp is known to serve (gemma, " in refused.err
    assert "), got bert. Use the PEFT adapter." in refused.err
    merged = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert merged["problem_type"] == "regression"
    assert merged["id2label"] == {"0": "LABEL_0"}


def program_of(inputs, **sections):
    config = parse_config(label_config_tree(inputs, **sections), "config")
    base = labels_run.open_encoder(config.model.name_or_path, num_labels=len(config.data.labels))
    return labels_run.labels_program(config, base)


THREE = {"labels": ["bad", "good", "neither"]}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"regularizers": {"k": 5}},
            "warning: regularizers.k = 5 takes all 2 singular values of a batch of 4 rows and 2 "
            "classes: the spectral term is the constant -1 and has no gradient. Use k = 1.",
        ),
        (
            {"regularizers": {"k": 3}, "data": THREE},
            "warning: regularizers.k = 3 takes all 3 singular values of a batch of 4 rows and 3 "
            "classes: the spectral term is the constant -1 and has no gradient. Use k below 3.",
        ),
        (
            {"regularizers": {"k": 2, "center_rows": True}, "data": THREE},
            "warning: regularizers.k = 2 takes all 2 singular values of a batch of 4 rows and 3 "
            "classes with regularizers.center_rows: the spectral term is the constant -1 and has "
            "no gradient. Use k = 1.",
        ),
        (
            {"training": {"batch_size": 2}},
            "warning: regularizers.k = 1 takes all 1 singular values of a batch of 1 rows and 2 "
            "classes: the spectral term is the constant -1 and has no gradient. Set "
            "regularizers.spectral to 0.",
        ),
        ({"regularizers": {"k": 2}, "data": THREE}, None),
        ({"regularizers": {"k": 5, "norm": "frobenius"}}, None),
        ({"regularizers": {"k": 5, "spectral": 0.0}}, None),
    ],
    ids=str,
)
def test_a_k_that_takes_every_singular_value_is_named(inputs, sections, said):
    assert labels_run.remarks(program_of(inputs, **sections)) == ([] if said is None else [said])


def test_warnings_go_to_stderr(inputs, tmp_path, capsys):
    labels_run.check(parse_config(label_config_tree(inputs, regularizers={"k": 2}), "config"))
    assert capsys.readouterr().err.startswith("warning: regularizers.k = 2 takes all 2 singular")


def refused(tree, *phrases):
    with pytest.raises(InputError) as error:
        labels_run.check(parse_config(tree, "config"))
    for phrase in phrases:
        assert phrase in str(error.value)


def test_what_does_not_fit_the_task_is_refused(inputs):
    tree = label_config_tree(inputs)
    refused(
        {**tree, "task": "text"},
        "config: data.text_columns: expected [] with task text, got [text]: text does not read it. "
        "Leave it out.",
    )
    refused(
        {**tree, "data": {**tree["data"], "text_columns": []}},
        "config: data: expected data.glue, or data.train with data.text_columns, for task labels, "
        "got neither. Name a GLUE task, or the file and its columns.",
    )
    without = {name: value for name, value in tree["data"].items() if name != "train"}
    refused({**tree, "data": without}, "expected data.glue, or data.train with data.text_columns")
    refused(
        label_config_tree(inputs, data={"glue": "rte"}),
        "config: data.text_columns: expected none with data.glue, got one: rte has its own. Leave "
        "one of them out.",
    )
    refused(
        {**tree, "task": "text", "data": {}},
        "config: data.train: expected a value, got none. Add the key.",
    )
    refused(
        label_config_tree(inputs, data=SCORES, regularizers={"consistency_schedule": "adaptive"}),
        "regularizers.consistency_schedule: expected constant or cosine for a regression, got "
        "adaptive: a single output has no entropy. Choose one of them.",
    )
    refused(
        label_config_tree(inputs, data={"labels": []}),
        "labels: expected the names of the classes, got none.",
    )


def test_no_tokenizer_and_one_of_another_model_are_refused(inputs, tmp_path):
    model = write_model(tmp_path / "model")
    tree = label_config_tree(inputs, model={"name_or_path": str(model)})
    write_tokenizer(model, extra=VOCAB_SIZE - 3)
    refused(
        tree,
        f"{model}: expected input_ids below vocab_size {VOCAB_SIZE}, got ",
        " from its tokenizer. Use the tokenizer that belongs to the weights.",
    )
    pairs = {**tree, "data": {**tree["data"], "text_columns": ["text", "score"]}}
    one_type = random_weights()
    one_type["bert.embeddings.token_type_embeddings.weight"] = np.zeros((1, WIDTH), np.float32)
    write_model(model, tensors=one_type, type_vocab_size=1)
    refused(pairs, f"{model}: expected token_type_ids below type_vocab_size 1, got 1 from its")
    write_model(model)
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    refused(tree, f"{model}: expected a tokenizer (tokenizer.json), got: no file of one. Save ")
    (model / "vocab.json").write_text("[")
    (model / "config.json").write_text(json.dumps({**MODEL, "model_type": "roberta"}))
    refused(tree, f"{model}: expected a tokenizer (tokenizer.json), got: ", "Save the tokenizer")


def test_an_adapter_of_another_base_or_head_is_refused(finished, inputs, tmp_path):
    adapter = shutil.copytree(finished[1] / "adapter", tmp_path / "adapter")
    start = {"start": str(adapter)}
    refused(
        label_config_tree(inputs, adapter=start, data=THREE),
        f"{adapter}: expected a head of 3 outputs, got one of 2. Name an adapter of the same task, "
        "or the data that it was trained on.",
    )
    refused(
        label_config_tree(inputs, adapter=start, regularizers={"teacher_head": "probe"}),
        "regularizers.teacher_head: expected student_init with an adapter that brings its head, "
        "got probe. Set it to student_init.",
    )
    narrow = {name: value for name, value in random_weights().items() if "layer.1" not in name}
    model = write_model(tmp_path / "model", tensors=narrow, num_hidden_layers=1)
    refused(
        label_config_tree(inputs, adapter=start, model={"name_or_path": str(model)}),
        f"{adapter}: expected adapters for this base model, got one for "
        "'bert.encoder.layer.1.attention.self.query', which it does not have. Name the base",
    )


def test_a_score_is_of_rows_no_longer_than_the_model_takes(tmp_path):
    """A position past the last has no embedding, and its NaN would reach the whole row."""
    inputs = write_label_inputs(tmp_path / "inputs")
    long = {"text": " ".join(["the"] * 60), "kind": "good"}
    write_rows(inputs / "validation.jsonl", [long, *reviews(3, 1)])
    tensors = random_weights()
    tensors["bert.embeddings.position_embeddings.weight"] = np.ones((21, WIDTH), np.float32)
    write_model(inputs / "model", tensors=tensors, max_position_embeddings=21)
    run = labels_run.check(parse_config(label_config_tree(inputs), "config"))
    loaded, scorer, seen = run.load(), run.scorer(), []
    assert scorer is not None
    forward = scorer.forward

    def watched(*arrays):
        seen.append(np.asarray(forward(*arrays)))
        return seen[-1]

    scorer.forward = watched
    with jax.set_mesh(run.mesh):
        scorer(run.constants(loaded), loaded.trainable, jax.random.key(0), "before")
    assert np.isfinite(np.concatenate(seen)).all()


def test_predictions_are_those_of_the_figures(finished, inputs):
    """Each row's class and its share; the figures from the rows alone."""
    _, run, _ = finished
    asked = [json.loads(line) for line in (inputs / "validation.jsonl").read_text().splitlines()]
    for title in ("before", "after"):
        lines = (run / "predictions" / f"{title}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert [row["row"] for row in rows] == list(range(1, len(asked) + 1))
        assert [row["gold"] for row in rows] == [row["kind"] for row in asked]
        for row in rows:
            assert list(row["probabilities"]) == ["bad", "good"]
            assert sum(row["probabilities"].values()) == pytest.approx(1.0)
            assert row["predicted"] == max(row["probabilities"], key=row["probabilities"].get)
            assert row["right"] is (row["predicted"] == row["gold"])
        share = sum(row["right"] for row in rows) / len(rows)
        assert share == pytest.approx(summary_of(run)[title]["accuracy"])


def test_predictions_from_logits_by_hand():
    task = LabelsTask("t", ("text",), ("kind",), ("bad", "good"), ("accuracy",))
    logits = np.array([[0.0, np.log(3.0)], [1000.0, 0.0]], np.float32)
    first, second = labels_score.predicted(logits, np.array([1, 1]), task)
    assert first.pop("probabilities") == pytest.approx({"bad": 0.25, "good": 0.75})
    assert first == {"row": 1, "gold": "good", "predicted": "good", "right": True}
    assert second.pop("probabilities") == {"bad": 1.0, "good": 0.0}
    assert second == {"row": 2, "gold": "good", "predicted": "bad", "right": False}
    scores = LabelsTask("t", ("text",), ("score",), (), ("pearson",))
    found = labels_score.predicted(np.array([[2.5]], np.float32), np.array([3.0]), scores)
    assert found == [{"row": 1, "gold": 3.0, "predicted": 2.5}]


def test_glue_scores_each_validation_split(tmp_path, inputs, monkeypatch, capsys):
    """Of MNLI there are two; the rows come from files here."""
    rows = [
        {"premise": "the sun", "hypothesis": text, "label": i % 3}
        for i, text in enumerate(["it is joy", "woe", "a song of rain"] * 3)
    ]
    asked = []

    def rows_of(source, *, split, limit):
        asked.append((source, split, limit))
        return rows if limit is None else rows[:limit]

    monkeypatch.setattr(labels_score, "load_rows", rows_of)
    tree = label_config_tree(
        inputs, training={"max_steps": 1}, eval={"limit": 4}, regularizers={"k": 2}
    )
    tree["data"] = {"glue": "mnli", "validation_limit": 5}
    config = parse_config(tree, "config")
    summary = finetune.fit(config, workdir=tmp_path / "run")
    assert {split for _, split, _ in asked} == {
        *("train", "validation_matched", "validation_mismatched")
    }
    assert {limit for _, split, limit in asked if split != "train"} == {4}
    titles = [key.removeprefix("accuracy_") for key in summary["after"] if "accuracy" in key]
    assert len(titles) == 2
    assert set(summary["after"]) == {f"{n}_{t}" for n in ("accuracy", "rows") for t in titles}
    lines = [line for line in capsys.readouterr().out.splitlines() if "on held-out rows" in line]
    assert len(lines) == 2
    assert all(line.startswith("accuracy ") for line in lines)


def test_rows_are_not_a_score(finished):
    """The last lines compare the scores, not the number of rows."""
    lines = [line for line in finished[2].out.splitlines() if "on held-out rows" in line]
    assert [line.split(" on held-out")[0] for line in lines] == ["accuracy", "f1"]


def test_a_start_that_reads_rows_of_text_is_refused_before_loading(inputs, tmp_path):
    tree = label_config_tree(inputs, adapter={"start": "aware"})
    tree["extensions"] = [str(Path(__file__).with_name("aware_start.py"))]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(InputError) as error:
        labels_run.check(load_config(tmp_path / "config.yaml"))
    assert str(error.value) == (
        "adapter.start: expected a start that reads no rows of data here, got 'aware', which does. "
        "Choose another, or train on text."
    )
