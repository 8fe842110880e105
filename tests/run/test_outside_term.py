"""Terms that a user's own file registers train as those of the package do, on any mesh."""

import json
import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from balora_jax.errors import InputError
from balora_jax.io import curves, drawing
from balora_jax.numerics.terms import TERMS
from tests.run import workers
from tests.run.conftest import settings
from tests.tiny_labels_run import write_label_config, write_label_inputs
from tests.tiny_run import FEW, metrics_of, write_config, write_inputs

FILE = Path(__file__).with_name("outside_terms.py")
ONE, EIGHT = {"data": 1}, {"data": 2, "fsdp": 2, "tensor": 2}
ON = {"peak": 0.05, "moved": 0.5, "peak_schedule": "linear_warmup", "power": 1.5}
STEPS = {"max_steps": 4, "batch_size": 16, "checkpoint_every": 2}


def extended(file, text):
    """The config with the user's file named in it."""
    file.write_text(f"extensions: [{FILE}]\n{Path(text).read_text()}")
    return str(file)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache_folder):
    """Text with both heads, on one device and on eight, gone on with half-way; and labels."""
    folder = tmp_path_factory.mktemp("outside")
    inputs = write_inputs(folder / "inputs", rows=40)
    labels = write_label_inputs(folder / "labels")
    text = extended(
        folder / "text.yaml",
        write_config(folder / "t.yaml", inputs, adapter=FEW, regularizers=ON, training=STEPS),
    )
    encoder = extended(
        folder / "encoder.yaml",
        write_label_config(folder / "l.yaml", labels, regularizers={"peak": 0.05}, training=STEPS),
    )

    def train(name, config, mesh, *more, **overrides):
        sizes = {f"mesh.{axis}": size for axis, size in mesh.items()}
        run = ["train", config, "--workdir", str(folder / name), *more]
        return run + settings({**sizes, **overrides}), str(folder / f"{name}{''.join(more)}.json")

    todo = {
        1: [
            train("fused", text, ONE, **{"training.log_gradient_share_every": 1}),
            train("plain", text, ONE, **{"training.head": "plain"}),
            train("labels one", encoder, ONE),
            train("refused", encoder, ONE, **{"regularizers.moved": 0.1}),
            train("collision", text, ONE, **{"regularizers.pwer": 3}),
        ],
        8: [
            train("eight", text, EIGHT, **{"training.stop_at": 2}),
            train("eight", text, EIGHT, "--resume"),
            train("labels eight", encoder, EIGHT),
        ],
    }
    logs = {devices: folder / f"{devices}.log" for devices in todo}
    processes = [
        workers.start(workers.commands, wanted, str(logs[devices]), str(cache_folder), devices)
        for devices, wanted in todo.items()
    ]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0], logs[1].read_text()
    return folder


def same(found, expected, names, **close):
    for name in names:
        np.testing.assert_allclose(
            [row[name] for row in found], [row[name] for row in expected], err_msg=name, **close
        )


COLUMNS = ("loss", "task_loss", "consistency", "peak", "moved", "lambda4", "lambda5", "grad_norm")


def test_columns_weights_and_shares_of_text(runs):
    rows = metrics_of(runs / "fused")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert list(rows[0])[3:13] == [
        *("consistency", "diversity", "spectral", "peak", "moved"),
        *(f"lambda{i}" for i in range(1, 6)),
    ]
    for row in rows:
        assert row["lambda5"] == pytest.approx(0.5)
        assert row["loss"] == pytest.approx(
            row["task_loss"]
            + sum(
                row[f"lambda{i}"] * row[name]
                for i, name in enumerate(
                    ("consistency", "diversity", "spectral", "peak", "moved"), start=1
                )
            ),
            rel=1e-5,
        )
    assert rows[-1]["moved"] > 1e-4 > abs(rows[0]["moved"])
    assert rows[0]["peak"] > 0.1
    assert rows[-1]["gradient_share_moved"] > 0
    assert rows[-1]["gradient_share_peak"] > 0


def test_both_heads_train_alike(runs):
    same(metrics_of(runs / "plain"), metrics_of(runs / "fused"), COLUMNS, rtol=2e-4, atol=1e-6)


def test_eight_devices_gone_on_with_train_as_one(runs):
    found = metrics_of(runs / "eight")
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    same(found, metrics_of(runs / "fused"), COLUMNS, rtol=2e-4, atol=1e-6)


def test_labels_on_one_device_and_on_eight(runs):
    one, eight = metrics_of(runs / "labels one"), metrics_of(runs / "labels eight")
    assert all(row["peak"] > 1e-4 and row["lambda4"] > 0 for row in one)
    same(eight, one, ("loss", "task_loss", "peak", "grad_norm"), rtol=2e-4, atol=1e-6)


def test_the_config_that_is_kept_has_the_terms_keys(runs):
    text = (runs / "fused" / "config.yaml").read_text()
    for line in ("peak: 0.05", "moved: 0.5", "peak_schedule: linear_warmup", "power: 1.5"):
        assert f"  {line}\n" in text


def test_what_is_refused(runs):
    log = (runs / "1.log").read_text()
    for name in ("refused", "collision"):
        assert json.loads((runs / f"{name}.json").read_text())["code"] == 2
    assert (
        "regularizers.moved: expected 0 with labels, got 0.1: the term reads the hidden states of "
        "tokens. Set it to 0."
    ) in log
    assert "regularizers.pwer: unknown key in regularizers. Did you mean 'power'?" in log


@pytest.fixture
def registered(monkeypatch):
    """The user's file loaded in this process, for one test."""
    monkeypatch.setattr(TERMS, "_items", dict(TERMS._items))
    return runpy.run_path(str(FILE))


def test_each_term_has_a_panel_of_the_curves(runs, registered, tmp_path):
    pytest.importorskip("matplotlib")
    titles = [panel.title for panel in curves.panels(metrics_of(runs / "fused"))]
    assert titles[4:6] == [registered[name].title for name in ("Peak", "Moved")]
    assert drawing.draw_curves(metrics_of(runs / "fused"), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_a_name_that_is_taken_is_refused(registered):
    @dataclass(frozen=True)
    class Other(registered["Peak"]):
        name: ClassVar[str] = "other"

    with pytest.raises(InputError) as error:
        TERMS.register(Other())
    assert str(error.value) == (
        "term other: expected a name and settings of its own, got 'power', which there is already. "
        "Choose another name."
    )
