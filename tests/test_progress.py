"""Progress in a log, on a terminal and in a notebook, by a clock that only the test moves."""

import contextlib
import io
import re

import pytest
import tqdm.std

from balora_jax import progress

DATED = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (.+)")


class Stream(io.StringIO):
    """What standard error is in a test."""

    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal

    def lines(self):
        """The lines without their dates, which each must have."""
        return [DATED.fullmatch(line)[1] for line in self.getvalue().splitlines()]


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    return now


@pytest.fixture
def log():
    return Stream(terminal=False)


@contextlib.contextmanager
def bar_on(stream, **options):
    with contextlib.redirect_stderr(stream), progress.progress_bar(**options) as bar:
        yield bar


def test_a_log_gets_the_first_line_one_every_half_minute_and_the_last(clock, log):
    with bar_on(log, total=40, initial=10, desc="training", unit="step") as bar:
        for step in range(11, 41):
            clock[0] += 7.0
            bar.set_postfix({"loss": f"{step / 10:.2f}"}, refresh=False)
            bar.update(1)
    assert log.lines() == [
        "training: 10 of 40",
        "training: 15 of 40, 00:35 elapsed, 02:55 left, 7.00s/step, loss=1.50",
        "training: 20 of 40, 01:10 elapsed, 02:20 left, 7.00s/step, loss=2.00",
        "training: 25 of 40, 01:45 elapsed, 01:45 left, 7.00s/step, loss=2.50",
        "training: 30 of 40, 02:20 elapsed, 01:10 left, 7.00s/step, loss=3.00",
        "training: 35 of 40, 02:55 elapsed, 00:35 left, 7.00s/step, loss=3.50",
        "training: 40 of 40, 03:30 elapsed, 00:00 left, 7.00s/step, loss=4.00",
    ]
    assert "\r" not in log.getvalue()


def test_the_last_line_says_where_the_work_ended(clock, log):
    def broken():
        with bar_on(log, total=9, desc="score") as bar:
            clock[0] += 1.0
            bar.update(2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    assert log.lines() == ["score: 0 of 9", "score: 2 of 9, 00:01 elapsed, 00:03 left, 2.00it/s"]


def test_bytes_are_written_with_their_unit(clock, log):
    size = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
    with bar_on(log, total=4 * 2**30, desc="weights", **size) as bar:
        clock[0] += 20.0
        bar.update(4 * 2**30)
    assert log.lines()[-1] == "weights: 4.00G of 4.00G, 00:20 elapsed, 00:00 left, 215MB/s"


@pytest.mark.parametrize(("seconds", "lines"), [(4, 0), (5, 1), (40, 3)])
def test_nothing_is_said_of_work_that_is_shorter_than_the_delay(clock, log, seconds, lines):
    with bar_on(log, total=40, desc="start", delay=5) as bar:
        for _ in range(seconds):
            clock[0] += 1.0
            bar.update()
    assert len(log.lines()) == lines


def test_nothing_is_said_by_one_that_is_switched_off(clock, log):
    with bar_on(log, total=4, desc="x", disable=True) as bar:
        bar.update(4)
        bar.set_postfix_str("y")
    assert log.getvalue() == ""


def test_a_title_that_changes_is_one_line_in_half_a_minute(clock, log):
    with bar_on(log, desc="bench", bar_format="{desc} [{elapsed}]") as bar:
        for case in ("a", "b", "c", "d"):
            clock[0] += 20.0
            bar.set_description_str(case)
    assert log.lines() == ["bench [00:00]", "b [00:40]", "d [01:20]"]


def test_no_control_character_gets_into_a_log(clock, log):
    with bar_on(log, total=1, desc="a\x1b[2Kb\nc\rd\x00") as bar:
        bar.update()
    assert all(c.isprintable() for c in log.getvalue().replace("\n", ""))
    assert len(log.lines()) == 2


def test_a_terminal_gets_a_bar(clock):
    terminal = Stream(terminal=True)
    with bar_on(terminal, total=4, desc="training", unit="step") as bar:
        clock[0] += 2.0
        bar.update(4)
    assert re.search(r"\rtraining: 100%.* 4/4 \[00:02<00:00,", terminal.getvalue())


def test_a_notebook_gets_a_bar():
    stream = type("OutStream", (Stream,), {"__module__": "ipykernel.iostream"})
    with bar_on(stream(terminal=False), total=4, desc="training") as bar:
        assert not isinstance(bar, progress.Lines)
