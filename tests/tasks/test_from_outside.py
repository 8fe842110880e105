"""A benchmark and a tracker of a user's own file work with train, resume and eval."""

import json

import pytest
import yaml

from balora_jax.cli import main
from balora_jax.config_file import parse_config
from balora_jax.errors import InputError
from balora_jax.finetune import fit
from tests.tiny_run import PLAIN, config_tree, write_inputs

OWN = '''
"""A benchmark that counts even answers, and a tracker that writes lines of its own."""

import json

from balora_jax.evals.benchmark import TextBenchmark
from balora_jax.evals.tasks import BENCHMARKS
from balora_jax.training.trackers import TRACKERS


class Lines:
    name = "lines_{tag}"

    def start(self, workdir, config):
        self.file = workdir / "lines.txt"
        self.add(["start", config["training"]["max_steps"]])

    def log(self, row):
        self.add(["row", row["step"]])

    def finish(self, summary):
        self.add(["finish", summary and summary["steps"]])

    def add(self, line):
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\\n")


TRACKERS.register(Lines())
BENCHMARKS.register(
    TextBenchmark(
        name="length_{tag}",
        gold=lambda row, column, marker: str(len(row[column])),
        parse=lambda text, marker: text[:1] or None,
        right=lambda answer, gold: True,
    )
)
'''


def lines(folder):
    return [json.loads(line) for line in (folder / "lines.txt").read_text().splitlines()]


def test_both_from_a_file_of_ones_own(tmp_path, capsys):
    inputs = write_inputs(tmp_path)
    (tmp_path / "own.py").write_text(OWN.replace("{tag}", "a"))
    tree = config_tree(
        inputs,
        **PLAIN,
        training={"trackers": ["lines_a"], "log_every": 1, "checkpoint_every": 2},
        eval={"task": "length_a", "limit": 3},
    )
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**tree, "extensions": ["own.py"]}))
    folder = tmp_path / "run"
    command = ["train", str(config), "--workdir", str(folder)]
    assert main([*command, "--set", "training.stop_at=3"]) == 0
    assert lines(folder)[-1] == ["finish", 3]
    # As a kill after the checkpoint of step 2 would leave it: step 3 was logged, and comes again.
    import shutil

    shutil.rmtree(folder / "checkpoints" / "3")
    assert main([*command, "--resume"]) == 0
    rows = [number for kind, number in lines(folder) if kind == "row"]
    assert rows == [1, 2, 3, 4]
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged] == [1, 2, 3, 4]
    assert lines(folder)[-1] == ["finish", 4]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["after"]["exact_match"] == 1.0
    capsys.readouterr()
    adapter = str(folder / "adapter")
    assert main(["eval", str(config), "--adapter", adapter]) == 0
    assert '"rows": 3' in capsys.readouterr().out


def test_an_unknown_tracker_is_refused_before_anything_is_written(tmp_path):
    tree = config_tree(write_inputs(tmp_path), training={"trackers": ["nowhere"]})
    with pytest.raises(
        InputError, match=r"training\.trackers: expected a tracker, .*got 'nowhere'"
    ):
        fit(parse_config(tree, "config"), workdir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
