"""How long a process may wait or stand still, by a clock that the tests turn."""

import re

from balora_jax.parallel.patience import Patience


def waiting(**fact):
    watch = Patience(stall=1000.0, now=0.0)
    watch.hear({"name": "process 1 of 4"}, 0.0)
    watch.hear({"wait": "the others", **fact}, 100.0)
    return watch


def test_a_wait_is_said_every_fifteen_seconds():
    watch = waiting(limit=60.0)
    said = {now: watch.line(float(now), 0.0) for now in range(100, 160)}
    lines = {now: line for now, line in said.items() if line}
    assert list(lines) == [115, 130, 145]
    assert lines[130].startswith("process 1 of 4 has waited 30 s for the others; until ")
    ends = {re.search(r"until (\d\d:\d\d:\d\d)\.$", line)[1] for line in lines.values()}
    assert len(ends) == 3  # the clock of the test stands still: each line counts from its own now


def test_the_end_of_a_wait_is_the_time_of_day(monkeypatch):
    monkeypatch.setattr("time.localtime", __import__("time").gmtime)
    watch = waiting(limit=60.0)
    assert watch.line(120.0, 3600.0).endswith("until 01:00:40.")  # 40 s are left at 01:00:00


def test_a_wait_has_a_limit_and_an_advice():
    watch = waiting(limit=60.0, advice=": look there")
    assert watch.over(159.9) is None
    assert watch.over(160.0) == (
        "process 1 of 4 waited 60 s for the others, in vain: look there"
    )  # fmt: skip
    watch.hear({"wait": None}, 159.0)
    assert watch.over(160.0) is None
    assert watch.line(190.0, 0.0) is None


def test_a_wait_without_a_limit_of_its_own_has_that_of_a_stall():
    watch = waiting()
    watch.hear({"alive": True}, 900.0)
    assert watch.over(1099.0) is None
    assert "waited 1000 s" in watch.over(1100.0)


def test_steps_must_go_on_once_there_are_some():
    watch = Patience(stall=10.0, now=0.0)
    for now in range(0, 100, 5):  # it loads and compiles, and lives
        watch.hear({"alive": True}, float(now))
        assert watch.over(float(now)) is None
    watch.hear({"steady": True}, 100.0)
    watch.hear({"step": 7}, 105.0)
    watch.hear({"alive": True}, 114.0)
    assert watch.over(114.9) is None
    assert watch.over(115.0) == "this process made no progress for 10 s after step 7"
    watch.hear({"steady": False}, 114.0)
    assert watch.over(120.0) is None


def test_what_is_done_between_two_steps_is_progress():
    watch = Patience(stall=10.0, now=0.0)
    watch.hear({"steady": True, "step": 7}, 0.0)
    watch.hear({"moved": True}, 9.0)
    watch.hear({"alive": True}, 18.0)
    assert watch.over(18.9) is None
    assert watch.over(19.0) == "this process made no progress for 10 s after step 7"


def test_silence_is_no_life():
    watch = Patience(stall=10.0, now=0.0)
    assert watch.over(1000.0) is None  # modules are being loaded
    watch.hear({"alive": True}, 1000.0)
    assert watch.over(1009.0) is None
    assert watch.over(1010.0) == "this process gave no sign of life for 10 s"
