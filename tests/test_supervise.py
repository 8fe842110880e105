"""The watching process: it hands on what its child says, and says what the child cannot."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from balora_jax.errors import RunStoppedError
from balora_jax.parallel import hosts, supervise

ROOT = Path(__file__).parents[1]


def python(text):
    return [sys.executable, "-c", text]


@pytest.mark.parametrize("code", [0, 1, 2, 3])
def test_codes_are_handed_on(code):
    assert supervise.run_child(python(f"raise SystemExit({code})")) == code


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("import os; os.abort()", "signal SIGABRT"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "signal SIGKILL"),
        ("raise SystemExit(77)", "exit code 77"),
    ],
)
def test_an_end_from_outside_is_one_sentence(text, phrase):
    with pytest.raises(RunStoppedError, match=phrase) as caught:
        supervise.run_child(python(text))
    assert "Start all processes again with --resume" in str(caught.value)


def test_signals_reach_the_child():
    child = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(3)); print()\n"
    child += "import time; sys.stdout.flush(); time.sleep(60)"
    parent = f"from balora_jax.parallel import supervise; import sys; sys.exit(supervise.run_child({python(child)!r}))"
    with subprocess.Popen(python(parent), cwd=ROOT, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 3


def test_the_child_ends_with_its_parent():
    child = (
        "from balora_jax.parallel import supervise; import os, time; supervise.end_with_parent()\n"
        "print(os.getpid(), flush=True); time.sleep(60)"
    )
    parent = f"from balora_jax.parallel import supervise; supervise.run_child({python(child)!r})"
    with subprocess.Popen(python(parent), cwd=ROOT, stdout=subprocess.PIPE) as process:
        number = int(process.stdout.readline())
        process.kill()
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("the child lives on")


def test_one_process_has_only_itself():
    assert hosts.is_first()
    assert hosts.from_first({"a": [1, None]}) == {"a": [1, None]}
    assert hosts.by_first(lambda: 3) == hosts.together(lambda: 3) == 3
    assert not hosts.preempted(1)
    hosts.barrier("alone")
