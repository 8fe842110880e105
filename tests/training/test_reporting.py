"""Speed and MFU of the log by the clock, and every row as JSON."""

import json
import math

import pytest
from tqdm import tqdm

from balora_jax.io import metrics
from balora_jax.training import reporting

ROW = dict.fromkeys(metrics.columns()[1:12], 1.0) | {"skipped": 0.0, "skipped_in_a_row": 0.0}


@pytest.fixture
def clock(monkeypatch):
    """The time, which only the test moves."""
    now = [100.0]
    monkeypatch.setattr(reporting.time, "monotonic", lambda: now[0])
    return now


def log_of(tmp_path, clock, rows, *, every, peak):
    log = metrics.MetricsLog(tmp_path / "metrics.jsonl", keep_until=0)
    report = reporting.Reporter(log, every, lambda shape, tokens: 1e6 * tokens, peak)
    with tqdm(disable=True) as bar:
        for i, (seconds, row) in enumerate(rows, 1):
            report.take(
                i, ROW | row, bar, reporting.Filled((2, 3, 4), 6 * i)
            )  # waits for the step before
            clock[0] += seconds
        report.flush(bar)
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def test_speeds_are_those_of_the_steps_since_the_last_row(tmp_path, clock):
    rows = [(4.0, {"tokens": 8.0}), (1.0, {"tokens": 10.0}), (3.0, {"tokens": 6.0})]
    first, third = log_of(tmp_path, clock, rows, every=3, peak=50e6)
    assert (first["step"], third["step"]) == (1, 3)
    assert first["tokens_per_second"] == 2.0
    assert first["step_seconds"] == 4.0
    assert first["mfu"] == pytest.approx(8e6 / 4 / 50e6)
    assert third["tokens_per_second"] == 4.0
    assert third["step_seconds"] == 2.0
    assert third["mfu"] == pytest.approx(16e6 / 4 / 50e6)
    assert third["tokens"] == 6
    assert (first["fill"], third["fill"]) == (6 / 24, (12 + 18) / 48)


def test_without_a_peak_there_is_no_mfu(tmp_path, clock):
    (row,) = log_of(tmp_path, clock, [(1.0, {})], every=1, peak=None)
    assert "mfu" not in row


def test_a_step_that_is_skipped_is_logged_whatever_the_interval(tmp_path, clock):
    bad = {"loss": math.nan, "grad_norm": math.inf, "skipped": 1.0, "skipped_in_a_row": 1.0}
    _, row = log_of(tmp_path, clock, [(1.0, {}), (1.0, bad), (1.0, {})], every=10, peak=None)
    assert row["step"] == 2
    assert row["loss"] is None
    assert row["grad_norm"] is None
    assert row["skipped"] == 1
