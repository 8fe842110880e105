"""The curves of a run: what is drawn, from one row to many, and how often."""

import math
import time

import numpy as np
import pytest

from balora_jax.io import curves, drawing
from balora_jax.numerics.terms import TERMS

NAMES = list(TERMS)


def rows_of(count, *, terms=True, seed=0):
    """Rows as a run writes them, with a loss that falls from 8 to 0.5 or so."""
    rng = np.random.default_rng(seed)
    rows = []
    for step in range(1, count + 1):
        done = step / count
        task = 0.5 + 7.5 * math.exp(-6 * done) * (1 + 0.2 * rng.standard_normal())
        values = {name: (0.1 + done) * (i + 1) if terms else 0.0 for i, name in enumerate(NAMES)}
        weights = {f"lambda{i}": 0.01 if terms else 0.0 for i, _ in enumerate(NAMES, start=1)}
        rows.append(
            {"step": step, "loss": task + 0.01 * sum(values.values()), "task_loss": task, **values}
            | weights
            | {"learning_rate": 1e-4 * (1 - done), "grad_norm": math.exp(rng.standard_normal())}
            | {"tokens_per_second": 900.0 + rng.integers(0, 200), "fill": 0.9, "tokens": 100}
        )
    return rows


def painted(rows, tmp_path, monkeypatch):
    """The axes of a picture by title, and its file."""
    kept = []
    paint = curves.paint
    monkeypatch.setattr(curves, "paint", lambda *given: kept.append(paint(*given)) or kept[0])
    assert drawing.draw_curves(rows, tmp_path / "curves.png")
    shown = [axis for axis in kept[0].axes if axis.get_visible()]
    return {axis.get_title(): axis for axis in shown}, tmp_path / "curves.png"


def test_smoothing_is_the_mean_of_the_finite_neighbours():
    rng = np.random.default_rng(1)
    values = rng.standard_normal(200)
    values[[0, 3, 50, 51, 199]] = np.nan
    values[80:100] = np.nan
    found = curves.smoothed(values)
    for i in range(200):
        near = [v for v in values[max(i - 5, 0) : i + 6] if not math.isnan(v)]
        expected = sum(near) / len(near) if near else math.nan
        assert found[i] == pytest.approx(expected, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("count", [1, curves.MOST_POINTS, curves.MOST_POINTS + 1, 100_000])
def test_thinning_keeps_the_extremes(count):
    values = np.random.default_rng(2).standard_normal(count)
    values[count // 2] = np.nan
    places = curves.thinned(values)
    assert len(places) <= curves.MOST_POINTS
    assert (np.diff(places) > 0).all()
    if count > 1:
        assert np.nanmax(values[places]) == np.nanmax(values)
        assert np.nanmin(values[places]) == np.nanmin(values)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_few_rows_are_marks(count, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    rows = rows_of(count)
    axes, file = painted(rows, tmp_path, monkeypatch)
    loss = axes["loss (nats per token)"]
    line = next(line for line in loss.get_lines() if line.get_label() == "task_loss")
    assert line.get_marker() == "o"
    assert line.get_ydata().tolist() == [row["task_loss"] for row in rows]
    assert file.read_bytes().startswith(b"\x89PNG")


def test_no_row_is_no_picture(tmp_path):
    assert not drawing.draw_curves([], tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())


def test_every_figure_has_its_panel(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    rows = rows_of(100)
    for row in rows[19::20]:
        row |= {"validation_loss": row["task_loss"] + 0.1, "validation_perplexity": 9.0}
        row |= {"score_exact_match": row["step"] / 100, f"validation_{NAMES[1]}": 0.5}
        row |= {f"gradient_share_{name}": 0.25 for name in ("task_loss", *NAMES)}
    rows[40] |= {"loss": None, "task_loss": None, "grad_norm": None}
    axes, _ = painted(rows, tmp_path, monkeypatch)
    assert list(axes) == [
        "loss (nats per token)",
        *(term.title for term in TERMS.values()),
        "score",
        "weights λ",
        "learning rate",
        "gradient norm",
        "share of the gradient",
        "tokens per second",
        "fill: places with a token",
    ]
    loss = {line.get_label(): line for line in axes["loss (nats per token)"].get_lines()}
    assert loss["validation_loss"].get_xdata().tolist() == [20, 40, 60, 80, 100]
    assert loss["not finite"].get_xdata().tolist() == [41]
    assert axes["loss (nats per token)"].get_yscale() == "log"
    weights = axes["weights λ"].get_lines()
    looks = {(str(line.get_linestyle()), line.get_linewidth()) for line in weights}
    assert len(looks) == len(NAMES)


def test_terms_that_are_off_have_no_panel(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    rows = rows_of(30, terms=False)
    for row in rows:
        row["loss"] = row["task_loss"]
    # What is measured before the first step: figures of held-out rows alone.
    rows.insert(0, {**dict.fromkeys(rows[0]), "step": 0, "validation_loss": 8.0})
    axes, _ = painted(rows, tmp_path, monkeypatch)
    assert not {term.title for term in TERMS.values()} & set(axes)
    assert "weights λ" not in axes
    labels = {line.get_label() for line in axes["loss (nats per token)"].get_lines()}
    assert "loss" not in labels  # it is the task's
    assert "validation_loss" in labels
    assert "not finite" not in labels


def test_an_outlier_does_not_flatten_a_signed_curve(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    rows = rows_of(200)
    for row in rows:
        row[NAMES[1]] = math.sin(row["step"] / 20)
    rows[100][NAMES[1]] = -1e6
    axes, _ = painted(rows, tmp_path, monkeypatch)
    low, high = axes[TERMS[NAMES[1]].title].get_ylim()
    assert -20 < low < -1
    assert 1 < high < 20
    said = [text.get_text() for text in axes[TERMS[NAMES[1]].title].texts]
    assert said == ["1 outside"]
    low, high = axes["fill: places with a token"].get_ylim()
    assert (low, high) == (0, pytest.approx(1, abs=0.05))


def test_a_hundred_thousand_rows_take_seconds(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    few = rows_of(1000)
    rows = [{**row, "step": i} for i, row in enumerate(few * 100)]
    began = time.process_time()
    axes, _ = painted(rows, tmp_path, monkeypatch)
    assert time.process_time() - began < 20
    points = [len(line.get_xdata()) for axis in axes.values() for line in axis.get_lines()]
    assert max(points) <= curves.MOST_POINTS


def test_pictures_take_a_small_share_of_a_run(tmp_path, monkeypatch):
    now, drawn = [0.0], []
    monkeypatch.setattr(drawing.time, "monotonic", lambda: now[0])

    def draw(rows, path):
        drawn.append(now[0])
        now[0] += 0.5 + len(drawn)  # each takes longer than the one before
        return True

    monkeypatch.setattr(drawing, "draw_curves", draw)
    live = drawing.LiveCurves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    while now[0] < 3600:
        now[0] += 1.0
        live.follow()
    assert drawn[0] == 30.0
    assert (np.diff(drawn) >= 30.0).all()
    spent = sum(0.5 + i for i in range(1, len(drawn) + 1))
    assert len(drawn) > 3
    assert spent <= 0.02 * 3600


def test_without_matplotlib_nothing_is_tried_again(tmp_path, monkeypatch):
    now, tried = [0.0], []
    monkeypatch.setattr(drawing.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(drawing, "draw_curves", lambda *_: bool(tried.append(1)))
    live = drawing.LiveCurves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    for _ in range(10):
        now[0] += 100.0
        live.follow()
    assert len(tried) == 1
