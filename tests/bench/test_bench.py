"""`balora bench`: its cases, figures, torch reference, errors and picture, on a tiny model."""

import ctypes
import json
import math
import shutil
import sys

import jax
import numpy as np
import pytest

from balora_jax import cli
from balora_jax.bench import cases, measure, mkl, report
from balora_jax.bench.run import bench
from balora_jax.bench.weights import BATCHES, weights_of
from balora_jax.config_file import parse_config
from balora_jax.numerics.terms import TERMS
from balora_jax.plan import arguments
from balora_jax.tasks import flops
from balora_jax.tasks.text.program import text_program

SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 151,
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    (folder / "config.json").write_text(json.dumps(SHAPE))
    return {
        "model": {"name_or_path": str(folder)},
        "adapter": {"start": "pissa", "rank": 4},
        "regularizers": {"top_k": 5, "k": 3, "diversity": 0.0},
        "data": {"train": "balora_jax:quickstart/train.jsonl", "max_length": 16},
        "training": {"max_steps": 10, "batch_size": 3, "learning_rate": 1e-2},
    }


@pytest.fixture(scope="module")
def figures(tree, tmp_path_factory):
    picture = tmp_path_factory.mktemp("picture") / "bench.png"
    found = bench(
        parse_config(tree, "here"), rounds=2, cases=["BA-LoRA"], against_torch=True, picture=picture
    )
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    return {row["case"]: row for row in found["tables"][0]["rows"]} | {"all": found}


def test_the_reference_does_the_same_work(figures):
    """Ten steps of optimisation with all terms: an independent trainer has the same losses."""
    for name in ("LoRA", "BA-LoRA"):
        ours, torch = figures[name]["losses"], figures[f"torch {name}"]["losses"]
        assert len(ours) == len(torch) == 10
        np.testing.assert_allclose(ours, torch, rtol=2e-5)
        assert ours[-1] < ours[0] - 0.01
        assert figures[name]["largest_loss_difference"] < 2e-4
    # The terms are in the loss: a different number from LoRA's.
    assert abs(figures["BA-LoRA"]["losses"][0] - figures["LoRA"]["losses"][0]) > 1e-3


def test_figures_of_a_case(figures):
    row = figures["BA-LoRA"]
    assert row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
    assert row["tokens_per_second"] == pytest.approx(3 * 16 / row["seconds"])
    assert row["memory"]["total"] >= row["memory"]["arguments"] > 0
    assert row["compile_seconds"] > 0
    assert {"over_lora", "over_torch"} <= set(row)
    assert figures["torch LoRA"]["memory"] is None
    if sys.platform == "linux":
        assert figures["torch BA-LoRA"]["rss_growth"] > 0
    assert figures["all"]["tables"][0]["counted_tokens"] == 3 * 15
    assert figures["all"]["tables"][0]["weights"] == "random"
    assert figures["all"]["machine"]["product_rate"] > 1e8


def test_the_table_has_a_line_for_each_case(figures):
    lines = report.tables(figures["all"]).splitlines()
    assert any(line.startswith("torch 2") and "GFLOP/s" in line for line in lines)
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 4
    assert len({line.count("|") for line in table}) == 1
    assert "largest difference of the loss" in lines[-1]


def test_cases_change_what_they_say(tree):
    config = parse_config(tree, "here")
    found = {case.name: cases.configured(config, case) for case in cases.text_cases()}
    terms = {
        name: [term for term in TERMS if getattr(case.regularizers, term)]
        for name, case in found.items()
    }
    assert terms["LoRA"] == terms["PiSSA"] == terms["LoRA, plain head"] == []
    for term in TERMS:
        assert terms[f"+ {term}"] == [term]
    assert terms["BA-LoRA"] == terms["BA-LoRA, plain head"] == list(TERMS)
    assert found["LoRA"].adapter.start == "lora"
    assert found["BA-LoRA"].adapter.start == "pissa"
    assert found["BA-LoRA"].regularizers.consistency_schedule == "constant"
    assert found["BA-LoRA"].regularizers.diversity == 0.005  # off in the config: published weight
    heads = {name: case.training.head for name, case in found.items()}
    assert heads["LoRA"] == "fused"
    assert heads["BA-LoRA, plain head"] == "plain"


def test_model_flops_by_hand(tree):
    config = parse_config(tree, "here")
    by_name = {case.name: case for case in cases.text_cases()}
    decoder = arguments.shapes_only(config.model.name_or_path).config
    tokens, counted = 48, 45
    linear = 2 * (24 * 24 * 2 + 2 * 24 * 12 + 3 * 24 * 40)
    adapters = 2 * 4 * (2 * (24 + 24) + 2 * (24 + 12) + 3 * (24 + 40))
    head = 151 * 24 * counted
    attention = 2 * 2 * (2 * 24) * 16 * tokens / 2
    expected = {
        "LoRA": 4 * linear * tokens + 6 * adapters * tokens + 4 * head + 3 * attention,
        "BA-LoRA": 6 * linear * tokens + 12 * adapters * tokens + 6 * head + 4 * attention,
    }
    for name, operations in expected.items():
        program = text_program(cases.configured(config, by_name[name]), decoder)
        assert flops.model_flops(program, (1, 3, 16), counted) == operations


def test_a_checkpoint_with_weights_gives_its_own_batch():
    config = parse_config(
        {
            "model": {"name_or_path": "balora_jax:quickstart/model"},
            "data": {"train": "balora_jax:quickstart/train.jsonl", "train_limit": 20},
            "training": {"max_steps": 5, "batch_size": 4},
        },
        "here",
    )
    base, weights = weights_of(config)
    assert not weights.random
    assert (base.folder / "model.safetensors").is_file()
    assert all(0 < batch["loss_mask"].mean() < 1 for batch in weights.batches)
    (found,) = bench(config, rounds=1, cases=["PiSSA"])["tables"]
    # Rows are as long as the data needs, not data.max_length.
    shapes = {batch["input_ids"].shape for batch in weights.batches}
    assert sorted(map(tuple, found["batches"])) == sorted(shapes)
    assert all(math.prod(shape) < 4 * config.data.max_length for shape in shapes)
    row = found["rows"][0]
    tokens = sum((batch["segment_ids"] > 0).sum() for batch in weights.batches) / BATCHES
    assert row["tokens_per_second"] == pytest.approx(tokens / row["seconds"])
    assert len(row["losses"]) == 10  # of three rounds of four steps


def test_lengths_and_rows_of_data_in_one_command(tree):
    """Real rows are packed as in a run; the reference has each batch cut to its longest row."""
    changed = {**tree, "data": {**tree["data"], "train_limit": 30, "max_length": 64}}
    found = bench(
        parse_config(changed, "here"), rounds=1, cases=["LoRA"],
        lengths=(8, 64), tokenizer="balora_jax:quickstart/model",
    )  # fmt: skip
    short, long, rows = found["tables"]
    assert (short["batches"], long["batches"]) == ([[1, 24, 8]], [[1, 3, 64]])
    assert short["fill"] == long["fill"] == 1.0
    assert 0.5 < rows["fill"] <= 1.0
    assert 0 < rows["counted_tokens"] < 3 * 63


def test_a_batch_of_the_reference_has_the_same_examples(tree):
    config = parse_config({**tree, "data": {**tree["data"], "max_length": 64}}, "here")
    _, weights = weights_of(config, tokenizer="balora_jax:quickstart/model")
    for ours, theirs in zip(weights.batches, weights.padded, strict=True):
        assert (ours["segment_ids"] > 0).sum() == (theirs["segment_ids"] > 0).sum()
        assert sorted(ours["input_ids"][ours["loss_mask"] > 0]) == sorted(
            theirs["input_ids"][theirs["loss_mask"] > 0]
        )
        assert max(ours["input_ids"].max(), theirs["input_ids"].max()) < SHAPE["vocab_size"]


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_mkl_is_asked_for_its_fast_path_where_it_would_not_take_it(tmp_path, monkeypatch):
    monkeypatch.setattr(mkl, "is_amd", lambda: True)
    (library,) = mkl.fast_path(tmp_path).values()
    assert ctypes.CDLL(library.split()[0]).mkl_serv_intel_cpu_true() == 1
    monkeypatch.setattr(mkl, "is_amd", lambda: False)
    assert mkl.fast_path(tmp_path) == {}


def test_ratio_is_within_rounds():
    slow, fast = measure.Measured([2.0, 9.0, 3.0]), measure.Measured([1.0, 3.0, 3.0])
    assert measure.ratio(slow, fast) == 2.0


def test_command_line_and_messages(tree, tmp_path, capsys):
    config = tmp_path / "tiny.yaml"
    config.write_text(json.dumps(tree))
    out = tmp_path / "out.json"
    arguments = ["bench", str(config), "--rounds", "1", "--case", "LoRA", "--json", str(out)]
    assert cli.main(arguments) == 0
    found = json.loads(out.read_text())
    assert [row["case"] for row in found["tables"][0]["rows"]] == ["LoRA"]
    assert found["machine"]["device"] == f"{jax.device_count()} x cpu"
    capsys.readouterr()
    for extra, message in {
        ("--case", "DoRA"): "--case: expected one of LoRA, PiSSA, + consistency, + diversity, "
        "+ spectral, BA-LoRA, LoRA, plain head, BA-LoRA, plain head, got 'DoRA'. Choose among "
        "them.",
        ("--rounds", "0"): "--rounds: expected at least 1, got 0. Raise it.",
        ("--topology", "v5e:1x1", "--lengths", "8", "--against", "torch"): "--topology: expected "
        "it without --against, --lengths: nothing is run there, got both. Leave one of them out.",
        ("--lengths", "8", "0"): "--lengths: expected at least 1, got 0. Raise it.",
        ("--tokenizer", "nowhere"): "nowhere: expected a tokenizer (tokenizer.json), got: no file "
        "of one. Save the tokenizer beside the weights.",
        ("--topology", "v5e"): "--topology: expected v4, v5e, v5p, v6e and a shape, such as "
        "v5e:4x4 or 2xv5e:4x4, GPUs (A100, A100-40GB, H100, H200, L4, A10G, T4), such as "
        "gpu:8xH100 or gpu:2x8xA100 (hosts x GPUs), gpu:8x48GB, cpu:8 or auto, got 'v5e'. Correct "
        "it.",
    }.items():
        assert cli.main(["bench", str(config), *extra]) == 2
        assert capsys.readouterr().err == f"balora: {message}\n"


def test_table_of_steps_compiled_ahead():
    size = {"arguments": 2**30, "temporaries": 2**29, "total": 3 * 2**29, "output": 0}
    common = {"flops_per_device": 2e12, "compile_seconds": 31.4}
    rows = [
        {"case": "LoRA", "bytes_per_device": size, "does_not_fit": None, **common},
        {"case": "BA-LoRA", "bytes_per_device": None, "does_not_fit": "25.9G of 15.8G", **common},
    ]
    figures = {
        "topology": "v5e:4x4",
        "notes": ["so and so"],
        "versions": {"jax": "0"},
        "rows": rows,
    }
    shown = report.ahead_table(figures)
    assert shown.splitlines()[1] == "note: so and so."
    assert shown.splitlines()[-2:] == [
        "| LoRA | 1.00 | 0.50 | 1.50 | 2.0 | 31 |",
        "| BA-LoRA | – | – | does not fit: 25.9G of 15.8G | 2.0 | 31 |",
    ]
