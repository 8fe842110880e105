"""`balora study`: which runs it does, in what order, what stops it, and the table."""

import json
import os
import re
import signal
import sys
import threading

import numpy as np
import pytest
import yaml

from balora_jax import cli, signals
from balora_jax.config_file import dump_config, load_config, parse_config
from balora_jax.errors import InputError, RunStoppedError
from balora_jax.io import drawing
from balora_jax.study import run as study
from balora_jax.study.grid import plan_runs
from balora_jax.study.table import table
from tests.tiny_labels_run import write_label_config, write_label_inputs

GRID = {
    "datasets": {"d1": {"data.max_length": 8, "adapter.rank": 3}, "d2": {"data.max_length": 9}},
    "variants": {"LoRA": {"adapter.start": "lora", "adapter.rank": 5}, "BA-LoRA": {}},
    "seeds": [7, 3],
}
ORDER = [f"{d}/{v}/seed{s}" for d in ("d1", "d2") for v in ("LoRA", "BA-LoRA") for s in (7, 3)]


def make(grid=GRID, **training):
    tree = {
        "model": {"name_or_path": "somewhere"},
        "adapter": {"rank": 2, "rank_pattern": {"q_proj": 4}},
        "data": {"train": "rows.jsonl"},
        "training": {"max_steps": 3, "seed": 99, **training},
    }
    return parse_config(tree | {"study": grid}, "here")


def name_of(row):
    return f"{row['dataset']}/{row['variant']}/seed{row['seed']}"


class StandIn:
    """Writes what a run leaves; the scores of `scores` in turn, which may also be errors."""

    def __init__(self, scores=None):
        self.scores, self.calls = dict(scores or {}), []

    def __call__(self, config, *, workdir, resume, shared):
        assert shared == workdir.parents[2]  # what runs share of a teacher
        name = "/".join(workdir.parts[-3:])
        self.calls.append(name)
        print("to stdout", name)
        print("to stderr", name, file=sys.stderr)
        (workdir / "config.yaml").write_text(dump_config(config))
        assert resume
        score = self.scores.get(name, 0.5)
        if callable(score):
            score = score()
        if isinstance(score, Exception):
            raise score
        summary = {
            "before": {"rows": 4, "accuracy": 0.25, "f1": 0.1},
            "after": {"rows": 4, "accuracy": score, "f1": 0.9},
            "trainable_parameters": 12,
            "wall_seconds": 61.5,
            "device": "1 x toy",
            "steps": 3,
        }
        (workdir / "summary.json").write_text(json.dumps(summary))
        return summary


@pytest.fixture
def fit(monkeypatch):
    """Put a stand-in in the place of training, and none in that of the drawing but where asked."""

    def put(scores=None, draw=lambda figures, path: False):
        made = StandIn(scores)
        monkeypatch.setattr(study, "draw", draw)
        monkeypatch.setattr(study.gc, "collect", int)  # the arrays of other tests take their time
        monkeypatch.setattr(study, "fit", made)
        return made

    return put


def refused(config, tmp_path, *phrases, **options):
    with pytest.raises(InputError) as caught:
        study.conduct(config, workdir=tmp_path / "out", **options)
    for phrase in phrases:
        assert phrase in str(caught.value)


def signalled(number):
    """A run that gets a signal during its steps, saves and says so."""

    def steps():
        with signals.taken() as caught, caught.polite():
            os.kill(os.getpid(), number)
            assert caught.received == [number.name]
            raise RunStoppedError("interrupted; everything is saved")
        return RunStoppedError("interrupted; everything is saved")

    return steps


def test_every_run_in_order(fit, tmp_path, capsys):
    done = fit(draw=study.draw)
    figures = study.conduct(make(), workdir=tmp_path)
    assert done.calls == ORDER
    assert [name_of(row) for row in figures["runs"]] == ORDER
    assert figures == json.loads((tmp_path / "study.json").read_text())
    first = figures["runs"][0]
    assert first == {
        "dataset": "d1", "variant": "LoRA", "seed": 7, "wall_seconds": 61.5, "device": "1 x toy",
        "before": {"rows": 4, "accuracy": 0.25, "f1": 0.1}, "trainable_parameters": 12,
        "after": {"rows": 4, "accuracy": 0.5, "f1": 0.9},
    }  # fmt: skip
    assert figures["wall_seconds"] == 8 * 61.5
    assert {"jax", "python"} <= set(figures["versions"])
    assert "cpu" in figures["device"]
    assert (tmp_path / "study.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    out, err = capsys.readouterr()
    assert (tmp_path / "table.md").read_text().strip() in out
    assert "to stdout" not in out
    assert "to stderr" not in err
    assert "d2/BA-LoRA/seed3" in err
    assert "accuracy 50.00" in err
    log = (tmp_path / "d1" / "LoRA" / "seed3" / "log.txt").read_text()
    assert log == "to stdout d1/LoRA/seed3\nto stderr d1/LoRA/seed3\n"


def test_variant_over_dataset_over_base_and_the_seed_above_all(tmp_path):
    runs = {run.name: run.config for run in plan_runs(make(), tmp_path)}
    got = {
        name: (c.adapter.start, c.adapter.rank, c.data.max_length, c.training.seed)
        for name, c in runs.items()
        if "seed7" in name
    }
    assert got == {
        "d1/LoRA/seed7": ("lora", 5, 8, 7),
        "d1/BA-LoRA/seed7": ("pissa", 3, 8, 7),
        "d2/LoRA/seed7": ("lora", 5, 9, 7),
        "d2/BA-LoRA/seed7": ("pissa", 2, 9, 7),
    }
    assert not any(c.study.variants for c in runs.values())
    assert runs["d1/LoRA/seed3"].training.seed == 3


def test_a_section_is_merged_and_a_table_of_layers_replaced(tmp_path):
    variants = {"a": {"adapter": {"alpha": 6, "rank_pattern": {"x.k_proj": 1}}}}
    (run,) = plan_runs(make({"variants": variants, "seeds": [1]}), tmp_path)
    assert run.name == "all/a/seed1"
    assert (run.config.adapter.rank, run.config.adapter.alpha) == (2, 6)
    assert run.config.adapter.rank_pattern == {"x.k_proj": 1}


def test_what_is_done_is_not_done_again(fit, tmp_path):
    fit({"d1/LoRA/seed7": 0.75})
    study.conduct(make(), workdir=tmp_path)
    (tmp_path / "d2" / "LoRA" / "seed3" / "summary.json").unlink()
    again = fit()
    figures = study.conduct(make(), workdir=tmp_path)
    assert again.calls == ["d2/LoRA/seed3"]
    assert [name_of(row) for row in figures["runs"]] == ORDER
    assert figures["runs"][0]["after"]["accuracy"] == 0.75
    log = (tmp_path / "d2" / "LoRA" / "seed3" / "log.txt").read_text()
    assert log.count("to stdout") == 2


def test_only_some(fit, tmp_path):
    done = fit()
    study.conduct(make(), workdir=tmp_path, only=["d2/LoRA"])
    assert done.calls == ["d2/LoRA/seed7", "d2/LoRA/seed3"]
    table = (tmp_path / "table.md").read_text()
    assert "| BA-LoRA | – | – | – | 0:00:00 |" in table
    figures = study.conduct(make(), workdir=tmp_path, only=["d1/LoRA", "d1/BA-LoRA"])
    assert done.calls[2:] == ORDER[:4]
    assert len(figures["runs"]) == 6  # the two from before are in the table too
    refused(make(), tmp_path, "--only: expected one of d1/LoRA, d1/BA-LoRA, d2/LoRA, d2/BA-LoRA, "
            "got 'd1'. Choose among them.", only=["d1"])  # fmt: skip


def test_a_folder_of_another_run_is_refused_before_the_first(fit, tmp_path):
    fit()
    study.conduct(make(), workdir=tmp_path / "out", only=["d2/BA-LoRA"])
    again = fit()
    folder = tmp_path / "out" / "d2" / "BA-LoRA" / "seed7"
    refused(make(max_steps=4), tmp_path, f"{folder}: expected no run or one with "
            "training.max_steps 4, got one with 3. Remove that folder, or choose another "
            "--workdir.")  # fmt: skip
    assert again.calls == []


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"variants": {}}, "study.variants: expected settings to compare, got none. Add study: with "
         "variants: {NAME: {key.path: value}}, and datasets and seeds if there are several."),
        ({"datasets": {}}, "study.datasets: expected at least one name, got none. Add one."),
        ({"seeds": [1, 2, 1]}, "study.seeds: expected different seeds, got [1, 2, 1]. Name each"),
        ({"seeds": []}, "study.seeds: expected different seeds, got []"),
        ({"variants": {"a/b": {}}}, "study.variants: expected a name of at most 100 letters, digits and "
         ". _ + -, got 'a/b'. It becomes a folder's name: choose another."),
        ({"datasets": {"..": {}}}, "study.datasets: expected a name of at most 100 letters, digits"),
        ({"variants": {"a" * 101: {}}}, "study.variants: expected a name of at most 100 letters,"),
        ({"datasets": {"study.json": {}}}, "study.datasets: expected a name that no file of a study "
         "has, got 'study.json'. It becomes a folder's name: choose another."),
        ({"datasets": {"a\n": {}}}, "got 'a\\n'"),
        ({"seeds": [1, -1]}, "study d1/LoRA: training.seed: expected "),
        ({"variants": {"a": {}, "b": {"adapter.strat": 1}}},
         "study d1/b: adapter.strat: unknown key in adapter. Did you mean 'start'?"),
        ({"variants": {"a": {"adapter.start.x": 1}}},
         "study d1/a: adapter.start.x: 'start' is not a section. Check the key."),
        ({"variants": {"a": {"training": 3}}},
         "study d1/a: training: expected settings, got 3. Write training.KEY: value."),
        ({"variants": {"a": {"training": {"seed": 3}}}},
         "study d1/a: training.seed: expected seeds in study.seeds. Move it there."),
        ({"datasets": {"d": {"study.seeds": [3]}}, "variants": {"v": {}}},
         "study d/v: study.seeds: expected a setting of a run, got one of the study."),
        ({"datasets": {"ok": {}, "d": {"training.epochs": 1}}, "variants": {"v": {}}},
         "study d/v: training: expected either max_steps or epochs, got both."),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_before_the_first_run(fit, tmp_path, change, phrase):
    done = fit()
    refused(make(GRID | change), tmp_path, phrase)
    assert done.calls == []
    assert list(tmp_path.iterdir()) == []


def test_other_refusals(fit, tmp_path):
    fit()
    for name, phrase in {
        "absent/a.png": "expected a file that can be written, got No such file or directory.",
        "a.pictures": "expected a name that ends in .png, got another.",
    }.items():
        picture = tmp_path / name
        refused(make(), tmp_path, f"--picture {picture}: {phrase} Choose another.", picture=picture)
    (tmp_path / "out").write_text("")
    refused(make(), tmp_path, "--workdir", "expected a folder, got a file")


def test_bad_input_of_a_run_names_it(fit, tmp_path):
    fit({"d1/BA-LoRA/seed3": InputError("model.name_or_path: none.")})
    refused(make(), tmp_path, "study d1/BA-LoRA/seed3: model.name_or_path: none.")
    assert len(json.loads((tmp_path / "out" / "study.json").read_text())["runs"]) == 3


def test_a_run_that_diverges_does_not_stop_the_others(fit, tmp_path, monkeypatch, capsys):
    diverged = RunStoppedError("training diverged at step 2")
    done = fit({"d1/BA-LoRA/seed3": diverged, "d2/BA-LoRA/seed7": diverged})
    config, figures = tmp_path / "study.yaml", tmp_path / "figures.json"
    config.write_text(yaml.safe_dump(make().model_dump(mode="json"), sort_keys=False))
    code = cli.main(["study", str(config), "--workdir", str(tmp_path / "out"),
                     "--json", str(figures)])  # fmt: skip
    out, err = capsys.readouterr()
    assert code == 3
    assert done.calls == ORDER
    assert err.splitlines()[-1] == (
        "balora: study: 2 of 8 runs diverged: d1/BA-LoRA/seed3, d2/BA-LoRA/seed7. The end of each "
        "log.txt says where; lower their training.learning_rate."
    )
    assert "diverged: d1/BA-LoRA/seed3, d2/BA-LoRA/seed7" in out
    assert "| BA-LoRA | 50.00 (1) | 50.00 (1) | 50.00 |" in out
    rows = json.loads(figures.read_text())["runs"]
    assert rows[3] == {"dataset": "d1", "variant": "BA-LoRA", "seed": 3,
                       "failed": "training diverged at step 2"}  # fmt: skip
    log = (tmp_path / "out" / "d1" / "BA-LoRA" / "seed3" / "log.txt").read_text()
    assert log.endswith("\nbalora: training diverged at step 2\n")
    again = fit()  # a failed run is tried again
    assert cli.main(["study", str(config), "--workdir", str(tmp_path / "out")]) == 0
    assert again.calls == ["d1/BA-LoRA/seed3", "d2/BA-LoRA/seed7"]


def interrupt_early():
    os.kill(os.getpid(), signal.SIGTERM)
    return AssertionError("the handler of SIGTERM did not stop the loading")


def end_as_usual_after_a_signal():
    """A signal that came after the loop's last look ends what takes the signals."""
    with signals.taken() as caught, caught.polite():
        os.kill(os.getpid(), signal.SIGINT)
    return 0.5


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (signalled(signal.SIGTERM), "SIGTERM"),
        (signalled(signal.SIGINT), "SIGINT"),
        (interrupt_early, "SIGTERM"),
        (end_as_usual_after_a_signal, "SIGINT"),
    ],
    ids=["steps, SIGTERM", "steps, SIGINT", "loading", "last score"],
)
def test_an_interruption_stops_the_study(fit, tmp_path, run, message):
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    done = fit({"d1/LoRA/seed3": run})
    with pytest.raises(RunStoppedError) as caught:
        study.conduct(make(), workdir=tmp_path)
    assert str(caught.value) == (
        f"study: interrupted by {message}; what is done is kept. Go on with the same command."
    )
    assert done.calls == ORDER[:2]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    rows = json.loads((tmp_path / "study.json").read_text())["runs"]
    assert [row["seed"] for row in rows] == [7]
    again = fit()
    study.conduct(make(), workdir=tmp_path)
    assert again.calls == ORDER[len(rows) :]


def test_in_another_thread_signals_are_left_alone(fit, tmp_path):
    fit({"d1/LoRA/seed3": RunStoppedError("training diverged")})
    found = []
    work = threading.Thread(target=lambda: found.append(study.conduct(make(), workdir=tmp_path)))
    work.start()
    work.join()
    assert [row["seed"] for row in found[0]["runs"] if "failed" in row] == [3]


def test_the_table_against_numpy(fit, tmp_path):
    draws = np.random.default_rng(0).uniform(0.3, 0.9, (2, 2, 3)).tolist()
    grid = GRID | {"seeds": [1, 2, 3]}
    fit({
        f"{d}/{v}/seed{s + 1}": draws[j][i][s]
        for i, d in enumerate(("d1", "d2")) for j, v in enumerate(("LoRA", "BA-LoRA"))
        for s in range(3)
    })  # fmt: skip
    lines = table(study.conduct(make(grid), workdir=tmp_path)).splitlines()
    points = 100 * np.asarray(draws)
    means, deviations = points.mean(axis=-1), points.std(axis=-1, ddof=1)
    assert lines[0] == "| variant | d1 (accuracy) | d2 (accuracy) | average | wall time |"
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: |"
    for j, name in enumerate(("LoRA", "BA-LoRA")):
        cells = " | ".join(f"{means[j, i]:.2f} ± {deviations[j, i]:.2f} (3)" for i in (0, 1))
        assert lines[2 + j] == f"| {name} | {cells} | {means[j].mean():.2f} | 0:06:09 |"
    assert lines[5].startswith(
        "points: mean ± sample standard deviation (runs); 12 runs took 0:12:18 in all; "
    )
    assert len(lines) == 6


def test_cells_without_a_score_have_the_loss_of_held_out_rows():
    def row(variant, dataset, seed, after, loss):
        return {"variant": variant, "dataset": dataset, "seed": seed, "after": after,
                "validation": {"before": {}, "after": {"validation_loss": loss}},
                "wall_seconds": 60.0}  # fmt: skip

    figures = {
        "datasets": ["a", "b"], "variants": ["x"], "wall_seconds": 180.0, "device": "D",
        "versions": {"jax": "J"},
        "runs": [row("x", "a", 1, {}, 1.25), row("x", "a", 2, {}, 1.75), row("x", "b", 1, {}, 2.0)],
    }  # fmt: skip
    lines = table(figures).splitlines()
    assert (
        lines[0] == "| variant | a (validation loss) | b (validation loss) | average | wall time |"
    )
    assert lines[2] == "| x | 1.5000 ± 0.3536 (2) | 2.0000 (1) | 1.7500 | 0:03:00 |"
    assert lines[4].startswith("validation loss: mean ± sample standard deviation (runs); 3 runs")
    figures["runs"][2] = row("x", "b", 1, {"rows": 9, "exact_match": 0.5}, 2.0)
    lines = table(figures).splitlines()
    assert lines[2] == "| x | 1.5000 ± 0.3536 (2) | 50.00 (1) | – | 0:03:00 |"
    assert lines[4].startswith("points or validation loss: mean")
    figures["runs"][2] = row("x", "b", 1, {}, None)  # it was not finite
    assert table(figures).splitlines()[2] == "| x | 1.5000 ± 0.3536 (2) | – | – | 0:03:00 |"


def test_cells_without_a_deviation_a_score_or_an_average():
    def row(variant, dataset, seed, after):
        return {"variant": variant, "dataset": dataset, "seed": seed, "after": after,
                "wall_seconds": 5400.0}  # fmt: skip

    text = table({
        "datasets": ["a", "b"], "variants": ["x", "y"], "wall_seconds": 16200.0, "device": "D",
        "versions": {"jax": "J"},
        "runs": [
            row("x", "a", 1, {"rows": 9, "exact_match": 0.125, "answered": 1.0}),
            row("x", "b", 1, {}),
            row("y", "a", 1, {"rows": 9, "exact_match": -0.5, "answered": 1.0}),
        ],
    })  # fmt: skip
    assert text == (
        "| variant | a (exact match) | b | average | wall time |\n"
        "| --- | ---: | ---: | ---: | ---: |\n"
        "| x | 12.50 (1) | – | – | 3:00:00 |\n"
        "| y | -50.00 (1) | – | – | 1:30:00 |\n"
        "\n"
        "points: mean ± sample standard deviation (runs); 3 runs took 4:30:00 in all; D, jax J"
    )


def test_the_picture_may_lie_elsewhere_and_needs_matplotlib(fit, tmp_path, monkeypatch):
    fit(draw=study.draw)
    picture = tmp_path / "bars.png"
    study.conduct(make(), workdir=tmp_path / "out", picture=picture)
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not (tmp_path / "out" / "study.png").exists()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    study.conduct(make(), workdir=tmp_path / "out")
    assert not (tmp_path / "out" / "study.png").exists()


def test_a_real_study_of_two_runs(tmp_path, capsys, monkeypatch):
    """One diverges, one is scored; the scored one is done by the loop's own terms."""
    monkeypatch.setattr(drawing, "draw_curves", lambda rows, path: False)
    config = write_label_config(
        tmp_path / "study.yaml",
        write_label_inputs(tmp_path),
        training={"max_steps": 2, "accumulation": 1, "optimizer": "sgd", "clip_norm": None},
        regularizers={"diversity": 0.0, "spectral": 0.0},
        study={
            "variants": {
                "huge": {"training.learning_rate": 1e30},
                "LoRA": {"adapter.start": "lora"},
            },
            "seeds": [5],
        },
    )
    command = ["study", config, "--workdir", str(tmp_path / "out")]
    assert cli.main(command) == 3
    out, err = capsys.readouterr()
    assert "balora: study: 1 of 2 runs diverged: all/huge/seed5." in err
    failed, scored = json.loads((tmp_path / "out" / "study.json").read_text())["runs"]
    assert failed["failed"].startswith("training diverged at step 2: expected a finite loss")
    folder = tmp_path / "out" / "all" / "LoRA" / "seed5"
    summary = json.loads((folder / "summary.json").read_text())
    assert {key: scored[key] for key in study.RECORDED} == {
        key: summary[key] for key in study.RECORDED
    }
    assert load_config(folder / "config.yaml").training.seed == 5
    points = re.escape(f"{100 * summary['after']['accuracy']:.2f}")
    assert re.search(rf"\| LoRA \| {points} \(1\) \| {points} \|", out)
    log = (folder / "log.txt").read_text()
    assert "trainable parameters" in log
    assert "adapter: " in log
    assert "trainable parameters" not in out + err
    stamp = (folder / "summary.json").stat().st_mtime_ns
    assert cli.main([*command, "--only", "all/LoRA"]) == 0
    assert (folder / "summary.json").stat().st_mtime_ns == stamp
