"""``balora check``: what a run would train on, told without its weights."""

import json
from itertools import pairwise

import numpy as np
import pytest

from balora_jax.io import hf_weights
from tests import tiny_labels_run
from tests.run.conftest import invoke, settings
from tests.tiny_run import FEW, sums, tree_digest, write_config, write_inputs, write_rows


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    """Reading one is an error."""

    def refuse(*args, **kwargs):
        pytest.fail("a weight was read")

    monkeypatch.setattr(hf_weights, "load_weights", refuse)
    monkeypatch.setattr("balora_jax.pretrained.checkpoint.load_weights", refuse)


def checked(config, tmp_path, *more):
    file = tmp_path / "figures.json"
    code, out, err = invoke("check", config, "--json", file, *more)
    assert code == 0, err
    return json.loads(file.read_text()), out


def test_counts_and_lengths_are_those_of_the_rows(tmp_path):
    """One token for each character, the start and the end."""
    inputs = write_inputs(tmp_path / "in", rows=20)
    rows = sums(20, 0)
    rows[4]["answer"] = "1" * 20
    write_rows(inputs / "train.jsonl", rows)
    config = write_config(
        tmp_path / "c.yaml",
        inputs,
        adapter=FEW,
        data={"max_length": 16, "overlong": "drop", "packing": "none"},
    )
    picture = tmp_path / "lengths.png"
    found, out = checked(config, tmp_path, "--no-memory", "--picture", picture)
    lengths = np.array([len(f"<{row['question']}={row['answer']}>") for row in rows])
    kept = lengths[lengths <= 16]
    assert (found["rows"]["rows"], found["rows"]["kept"]) == (20, len(kept)) == (20, 19)
    assert found["lengths"]["least"] == kept.min()
    assert found["lengths"]["most"] == kept.max()
    assert found["lengths"]["median"] == np.median(kept)
    assert found["lengths"]["mean"] == pytest.approx(kept.mean())
    edges, counts = found["histogram"]["edges"], found["histogram"]["counts"]
    expected = [int(((kept >= a) & (kept < b)).sum()) for a, b in pairwise(edges)]
    assert counts == expected
    assert sum(counts) == 19
    # Three steps of eight rows of 16 tokens for 19 rows; four steps asked for.
    assert (found["steps_per_epoch"], found["steps"], found["row_length"]) == (3, 4, 16)
    assert found["epochs"] == pytest.approx(4 / 3)
    assert found["fill"] == pytest.approx(kept.sum() / (3 * 8 * 16))
    assert (
        f"fill: {100 * found['fill']:.1f} % of the places of an epoch hold a token (4 rows of 16)"
        in out
    )
    first = rows[0]
    assert f"<s>{first['question']}=⟦{first['answer']}</s>⟧" in out
    assert "19 examples of 20 rows (0 truncated, 1 dropped" in out
    assert f"{found['trainable']:,} trainable parameters" in out
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_memory_is_that_of_plan_for_the_largest_shape(tmp_path):
    """One long row of many: four examples of a micro-batch lie in fewer rows of its length."""
    inputs = write_inputs(tmp_path / "in")
    rows = sums(24, 0)
    rows[4]["answer"] = "1" * 36
    write_rows(inputs / "train.jsonl", rows)
    config = write_config(tmp_path / "c.yaml", inputs, adapter=FEW, data={"max_length": 48})
    found, out = checked(config, tmp_path)
    rows, length = found["shapes"][-1]
    assert rows < 4
    assert "4 examples in " in out
    assert found["fill"] > 0.5
    sizes = {"data.max_length": length, "training.batch_size": 2 * rows}
    file = tmp_path / "plan.json"
    code, _, err = invoke("plan", config, "--json", file, *settings(sizes))
    assert code == 0, err
    total = json.loads(file.read_text())["rows"][0]["bytes_per_device"]
    assert found["plan"]["rows"][0]["bytes_per_device"] == total
    assert "| total |" in out


def test_labels(tmp_path):
    inputs = tiny_labels_run.write_label_inputs(tmp_path / "in")
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps(tiny_labels_run.label_config_tree(inputs)))
    found, out = checked(config, tmp_path)
    assert found["rows"]["kept"] == found["rows"]["rows"] == sum(found["histogram"]["counts"])
    assert "plan" not in found
    assert "first example" in out


def test_what_a_run_would_refuse_is_refused(tmp_path):
    inputs = write_inputs(tmp_path / "in")
    config = write_config(tmp_path / "c.yaml", inputs, data={"response_column": "reply"})
    before = tree_digest(tmp_path)
    code, out, err = invoke("check", config)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "row 1: expected a column 'reply'" in err
    code, _, err = invoke("check", config, "--picture", tmp_path / "l.jpg")
    assert (code, "ends in .png" in err) == (2, True)
    assert tree_digest(tmp_path) == before
