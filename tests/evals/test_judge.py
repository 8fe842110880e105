"""The process that does algebra: verdicts, its end in time, and what becomes of it."""

import os
import signal
import threading
import time

import pytest

from balora_jax.evals import grading, judge
from balora_jax.evals.equality import exact_match
from balora_jax.evals.judge import Judge, has_math_verify
from balora_jax.evals.tasks import BENCHMARKS

needs_algebra = pytest.mark.skipif(not has_math_verify(), reason="math-verify is not installed")
ENDLESS = ("9^{9^9}", "1")


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Runs another program as the child."""

    def use(source):
        file = tmp_path / "program.py"
        file.write_text(source)
        monkeypatch.setattr(judge, "_PROGRAM", file)

    return use


@needs_algebra
def test_a_pair_without_an_end_is_wrong_and_the_next_is_judged():
    handler, began = signal.getsignal(signal.SIGALRM), time.monotonic()
    with Judge(seconds=1) as running:
        assert not exact_match(*ENDLESS, running)
        assert time.monotonic() - began < 60
        assert running.undecided == 1
        assert not running(*ENDLESS)  # known by now: no second wait
        assert running.undecided == 1
        running.seconds = 60
        assert running(r"\sqrt{8}", r"2\sqrt{2}")
    assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@needs_algebra
def test_in_another_thread():
    found = []
    with Judge(seconds=60) as running:
        thread = threading.Thread(target=lambda: found.append(running("x+1", "1+x")))
        thread.start()
        thread.join()
    assert found == [True]


@needs_algebra
@pytest.mark.parametrize(
    "text", ["", "}", r"\frac{", r"\begin{pmatrix}", "\0", "\n", '"', "é" * 500]
)
def test_nothing_raises(text):
    with Judge(seconds=60) as running:
        assert not running(text, "x+1")
        assert not running("x+1", text)


def test_the_child_ends_with_the_block(program):
    program("import sys\nprint('ready', flush=True)\nfor _ in sys.stdin: print('true', flush=True)")
    with Judge() as running:
        assert running("a", "b")
        child = running._child.pid
        os.kill(child, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_answers_of_a_child_are_kept(program):
    program(
        "import sys\nprint('ready', flush=True)\n"
        "for i, _ in enumerate(sys.stdin): print('true' if i == 0 else 'false', flush=True)"
    )
    with Judge() as running:
        assert [running("a", "b"), running("a", "c"), running("a", "b")] == [True, False, True]


@pytest.mark.parametrize(
    "source",
    [
        "print('ready', flush=True)",
        "import sys\nprint('ready', flush=True)\ninput()\nprint('maybe')",
        "import os\nprint('ready', flush=True)\ninput()\nos.kill(os.getpid(), 9)",
    ],
    ids=["ends", "mumbles", "is killed"],
)
def test_a_child_that_gives_no_verdict(source, program):
    program(source)
    with Judge() as running:
        assert [running("a", "b"), running("a", "c")] == [False, False]
        assert running.undecided == 2


def test_no_more_pairs_after_many_without_a_verdict(program, monkeypatch):
    program("print('ready', flush=True)")
    monkeypatch.setattr(judge, "MOST_UNDECIDED", 2)
    with Judge() as running:
        assert not any(running("a", gold) for gold in "bcde")
        assert running.undecided == 4
        assert running._child is None


def test_a_child_that_does_not_start_leaves_the_plain_grader(program, monkeypatch):
    program("raise SystemExit(1)")
    monkeypatch.setattr(grading, "has_math_verify", lambda: True)
    figures = BENCHMARKS["exact_match"].score(["#### 4", "x+1"], ["4", "1+x"], "is")
    assert figures == {
        "exact_match": 0.5,
        "answered": 1.0,
        "rows": 2,
        "grader": "plain",
        "undecided": 0,
    }


def test_undecided_pairs_are_counted_in_the_figures(program, monkeypatch):
    program("print('ready', flush=True)")
    monkeypatch.setattr(grading, "has_math_verify", lambda: True)
    figures = BENCHMARKS["math"].score([r"\boxed{x+1}"], ["1+x"], "is")
    assert figures == {
        "exact_match": 0.0,
        "answered": 1.0,
        "rows": 1,
        "grader": "math_verify",
        "undecided": 1,
    }
