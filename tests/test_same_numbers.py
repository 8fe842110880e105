"""The comparison of two runs: it sees what moved, and only that."""

import json
import math
import subprocess

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from balora_jax.config_file import parse_config
from tests import same_numbers
from tests.same_compare import compare, sentence
from tests.same_inputs import CASES, configs

ROW = {
    "step": 1,
    "loss": 2.5,
    "task_loss": 2.0,
    "grad_norm": 0.1,
    "learning_rate": 0.01,
    "spectral": None,
    "step_seconds": 0.3,
    "tokens_per_second": 900.0,
}
WITHOUT = [{n: v for n, v in ({**ROW, "step": i}).items() if n != "loss"} for i in (1, 2)]
SUMMARY = {"before": {"exact_match": 0.0}, "after": {"exact_match": 0.25}, "wall_seconds": 4.0}
WEIGHTS = {"a": np.float32([1.0, -4.0]), "b": np.float32([[0.5]])}


@pytest.fixture
def finished(tmp_path):
    """Writes what a run leaves; keywords replace parts of it."""

    def write(name, rows=(ROW, {**ROW, "step": 2}), weights=WEIGHTS, summary=SUMMARY, said="9"):
        folder = tmp_path / name
        (folder / "adapter").mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        save_file(weights, folder / "adapter" / "adapter_model.safetensors")
        adapter = {"r": 2, "base_model_name_or_path": str(folder)}
        (folder / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "log.txt").write_text(f"note\nafter: 1 row; first answer: '{said}' (right: 9)\n")
        return folder

    return write


def found(finished, **changes):
    return compare(finished("older"), finished("newer", **changes))


def test_clock_and_place_do_not_count(finished):
    rows = [{**ROW, "step": i, "step_seconds": i, "tokens_per_second": 1.0} for i in (1, 2)]
    same = found(finished, rows=rows, summary={**SUMMARY, "wall_seconds": 5.0})
    assert same["state"] == "equal"
    # Rows of 6 columns; the two scores, the rank and the answer.
    assert sentence(same) == "equal: 2 rows of 6 columns, 2 tensors, 4 figures"


def test_the_first_difference_and_the_largest_of_each_column(finished):
    rows = [{**ROW, "spectral": 1.0}, {**ROW, "step": 2, "loss": 2.0, "grad_norm": 0.2}]
    moved = found(finished, rows=rows)
    assert moved["state"] == "differs"
    assert moved["metrics"]["first"] == (1, "spectral", None, 1.0)
    assert moved["metrics"]["largest"] == {"spectral": math.inf, "loss": 0.2, "grad_norm": 0.5}


def test_new_and_gone_columns_are_named_but_no_difference(finished):
    rows = [{**ROW, "step": i, "extra": 1.0} for i in (1, 2)]
    for row in rows:
        del row["spectral"]
    same = found(finished, rows=rows)
    assert same["state"] == "equal"
    assert sentence(same).endswith("; new columns: extra; gone columns: spectral")


@pytest.mark.parametrize(
    ("rows", "first"),
    [
        ([ROW], ("the end", "rows", 2, 1)),
        (WITHOUT, ("the start", "loss", "there", "gone")),
    ],
)
def test_what_a_log_cannot_lack(finished, rows, first):
    assert found(finished, rows=rows)["metrics"]["first"] == first


def test_one_bit_of_an_adapter(finished):
    weights = {**WEIGHTS, "a": np.float32([np.nextafter(np.float32(1), np.float32(2)), -4.0])}
    moved = found(finished, weights=weights)
    assert moved["state"] == "differs"
    assert moved["adapter"]["differing"] == {"adapter_model.safetensors/a": 2.0**-23 / 4}
    assert "ADAPTER DIFFERS in 1 of 2 tensors, by at most 3.0e-08" in sentence(moved)


@pytest.mark.parametrize(
    "weights",
    [{"a": WEIGHTS["a"]}, {**WEIGHTS, "b": np.float32([0.5])}, {**WEIGHTS, "c": WEIGHTS["a"]}],
)
def test_a_tensor_gone_new_or_of_another_shape(finished, weights):
    assert found(finished, weights=weights)["state"] == "differs"


def test_scores_and_answers(finished):
    moved = found(finished, summary={"before": SUMMARY["before"], "after": {"exact_match": 0.5}})
    assert moved["figures"]["differing"] == {"summary.after.exact_match": [0.25, 0.5]}
    moved = compare(finished("one", said="9"), finished("other", said="8"))
    assert moved["figures"]["differing"] == {"first answer.after": ["'9'", "'8'"]}


def test_its_configs_are_valid(tmp_path):
    quickstart = yaml.safe_load((same_numbers.ROOT / "configs" / "quickstart.yaml").read_text())
    trees = configs(tmp_path, quickstart, 30)
    assert tuple(trees) == CASES
    for name, tree in trees.items():
        config = parse_config(tree, name)
        terms = config.regularizers
        assert min(terms.consistency, terms.diversity, terms.spectral) > 0
        assert config.training.max_steps == 30


def test_kept_runs_of_other_settings_are_refused(tmp_path, capsys):
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=same_numbers.ROOT, capture_output=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    same_numbers.prepare(tmp_path / "kept", "HEAD", 30)
    with pytest.raises(SystemExit) as stopped:
        same_numbers.prepare(tmp_path / "kept", "HEAD", 20)
    assert stopped.value.code == 2
    assert f"expected the settings of this call, got others. Remove {tmp_path / 'kept'}" in (
        capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        same_numbers.prepare(tmp_path / "kept", "0" * 40, 30)
