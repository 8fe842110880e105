"""The watching process: it hands on what its child says, and says what the child cannot."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from balora_jax.errors import InputError, RunStoppedError
from balora_jax.parallel import hosts, patience, supervise
from balora_jax.parallel.launch import Start, Timeouts

ROOT = Path(__file__).parents[1]


def python(text):
    return [sys.executable, "-c", text]


LINK = "from balora_jax.parallel import child; child.join(lambda reason: None)\n"
NAP = "import time; time.sleep(60)\n"


@pytest.fixture(autouse=True)
def brisk(monkeypatch):
    monkeypatch.setattr(supervise, "GRACE", 1.0)
    monkeypatch.setattr(supervise, "_PING_EVERY", 0.1)


def run(text, stall=30.0):
    return supervise.run_child(python(text), stall=stall, saved=lambda: "7 is whole.")


def ended(text, stall=30.0):
    """The sentence of a child that has to end, and how long that took."""
    began = time.monotonic()
    with pytest.raises(RunStoppedError) as caught:
        run(text, stall)
    assert str(caught.value).endswith(". Start all processes again: 7 is whole.")
    return str(caught.value), time.monotonic() - began


@pytest.mark.parametrize("code", [0, 1, 2, 3])
def test_codes_are_handed_on(code):
    assert run(f"raise SystemExit({code})") == code


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("import os; os.abort()", "signal SIGABRT"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "signal SIGKILL"),
        ("raise SystemExit(77)", "exit code 77"),
    ],
)
def test_an_end_from_outside_is_one_sentence(text, phrase):
    assert f"this process was ended by {phrase}: another host is gone" in ended(text)[0]


FATAL = """F1127 16:47:16.823648   24916 client.h:80] Terminating process because of fatal errors. This
most likely says little. absl::Status: DEADLINE_EXCEEDED: Deadline
 Exceeded. And so on.
*** Check failure stack trace: ***
    @     0x7ff39f840634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
"""


def test_what_the_runtime_prints_is_one_phrase_and_the_rest_is_python_s(capfd):
    text = "from balora_jax.parallel import child; child.divert_native_log()\n"
    text += f"import os, sys; print('ours', file=sys.stderr); os.write(2, {FATAL.encode()!r})\n"
    sentence, _ = ended(text + "os.abort()")
    assert "signal SIGABRT (DEADLINE_EXCEEDED: Deadline Exceeded): another host" in sentence
    assert capfd.readouterr().err == "ours\n"


def test_who_wants_the_log_of_the_runtime_gets_it(capfd, monkeypatch):
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    text = "from balora_jax.parallel import child; child.divert_native_log()\n"
    assert run(text + "import os; os.write(2, b'I0000 all is well')") == 0
    assert "I0000 all is well" in capfd.readouterr().err


def signalled(text, *names):
    """Exit code and stderr of a parent that gets signals, one at each line that its child prints."""
    parent = (
        "from balora_jax.parallel import supervise; from balora_jax.errors import RunStoppedError\n"
        "import sys; supervise.GRACE = 1.0\n"
        f"try: code = supervise.run_child({python(text)!r}, stall=30, saved=lambda: '7 is whole.')\n"
        "except RunStoppedError as error: code = str(error)\n"
        "sys.exit(code)"
    )
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(python(parent), cwd=ROOT, **streams) as process:
        for name in names:
            process.stdout.readline()
            process.send_signal(getattr(signal, name))
        _, err = process.communicate(timeout=30)
    return process.returncode, err.decode().strip()


SAVES = (
    LINK + "import signal, sys, time; child.tell(name='process 1 of 2', steady=True)\n"
    "def save(*_):\n    print(flush=True); {then}\n"
    "signal.signal(signal.SIGTERM, save); time.sleep(0.5); print(flush=True); time.sleep(60)"
)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_child_that_takes_steps_saves_at_a_signal(name):
    assert signalled(SAVES.format(then="sys.exit(3)"), name) == (3, "")


def test_a_child_that_takes_no_steps_is_ended_at_once():
    text = LINK + "print(flush=True)\n" + NAP
    code, sentence = signalled(text, "SIGINT")
    assert code == 1
    assert sentence == (
        "this process was ended by SIGINT. Start all processes again: 7 is whole."
    )  # fmt: skip


def test_a_second_signal_ends_a_child_that_saves():
    _, sentence = signalled(SAVES.format(then="time.sleep(60)"), "SIGTERM", "SIGINT")
    assert sentence.startswith("process 1 of 2 was ended by SIGINT. ")


def test_a_signal_that_came_after_the_last_step_ends_the_child():
    _, sentence = signalled(
        SAVES.format(then="child.tell(steady=False); time.sleep(60)"), "SIGTERM"
    )
    assert sentence.startswith("process 1 of 2 was ended by SIGTERM. ")


def test_a_child_that_stands_still_is_ended():
    text = LINK + "child.tell(name='process 1 of 2', steady=True); child.tell(step=12)\n" + NAP
    sentence, _ = ended(text, stall=1.0)
    assert sentence.startswith("process 1 of 2 made no progress for 1 s after step 12. ")


def test_a_stopped_child_is_ended():
    text = LINK + "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"
    sentence, seconds = ended(text, stall=1.0)
    assert sentence.startswith("this process gave no sign of life for 1 s. ")
    assert seconds < 20


def test_a_child_that_waits_says_so(monkeypatch, capsys):
    monkeypatch.setattr(patience, "SAY_EVERY", 0.4)
    text = LINK + "child.tell(wait='the others', limit=2, advice=': look there')\n" + NAP
    sentence, _ = ended(text)
    assert sentence.startswith("this process waited 2 s for the others, in vain: look there. ")
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 4
    assert all(line.startswith("balora: this process has waited ") for line in lines)


def test_a_child_tells_why_it_ends():
    text = LINK + "child.end('process 0 of 2 was ended by SIGTERM')"
    assert ended(text)[0].startswith("process 0 of 2 was ended by SIGTERM. ")


def test_others_hear_of_a_traceback_before_the_child_ends(capfd):
    text = "from balora_jax.parallel import child; child.join(lambda reason: print(reason))\n"
    text += "import sys; sys.stdout.reconfigure(line_buffering=True); raise KeyError('x')"
    assert run(text) == 1
    out, err = capfd.readouterr()
    assert out == "a process failed with KeyError; its own output says more\n"
    assert err.endswith("KeyError: 'x'\n")


def test_the_child_ends_with_its_parent():
    child = LINK + "import os, time\nprint(os.getpid(), flush=True); time.sleep(60)"
    parent = f"from balora_jax.parallel import supervise; supervise.run_child({python(child)!r}, stall=60, saved=str)"
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


@pytest.mark.parametrize(
    ("name", "value", "phrase"),
    [
        ("jax_enable_preemption_service", False, "expected true with several processes, as at a"),
        ("jax_enable_recoverability", True, "expected false with several processes, as where one"),
    ],
)
def test_settings_of_jax_that_keep_processes_from_ending_together(name, value, phrase):
    before = jax.config.values[name]
    jax.config.update(name, value)
    try:
        with pytest.raises(InputError) as caught:
            hosts.connect(Start("127.0.0.1:1", 2, 0, Timeouts()))
    finally:
        jax.config.update(name, before)
    assert str(caught.value).startswith(f"{name.upper()}: {phrase}")
