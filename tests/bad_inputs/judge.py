"""What becomes of a bad input: the command runs in this process, and its outcome gets a name.

This file is also the program that a process of its own runs for a case that may end one.
"""

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import re
import resource
import signal
import socket
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import datasets
import huggingface_hub.constants
from transformers import BertConfig, LlamaConfig  # noqa: F401  (what the first case waits for)

from balora_jax import cli
from balora_jax.bench import labels as bench_labels
from balora_jax.bench import measure
from balora_jax.io import hf_weights
from balora_jax.plan import ahead, compiled
from balora_jax.pretrained.checkpoint import Checkpoint
from balora_jax.study import run as study_run
from balora_jax.training.loop import Training
from tests.bad_inputs.case import MINE, WRITERS, Case, Place, Sources
from tests.registered import put_back
from tests.tiny_run import tree_digest

ROOT = Path(__file__).parents[2]
SECONDS, SECONDS_APART = 20, 40
"""Time limits of a case, of the processor: here, and in a process of its own."""
PATIENCE = 15
"""How many times longer a case may take by the clock, on a machine that does other things."""
MOST_BYTES = 12 * 2**30
"""Of addresses, for a process of its own: an input that asks for more memory is not swapped out."""
LONGEST = 1000
"""Characters of a sentence."""

_OWN = hashlib.sha256(b"mine").hexdigest()
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class Accepted(BaseException):
    """Nothing was refused up to the place where a run would begin to cost something."""


class Hung(BaseException):
    """The time limit."""


class Result(NamedTuple):
    """What became of a case.

    Attributes:
        name: of the case.
        expect: what was expected.
        outcome: ``refused``, ``accepted``, ``traceback``, ``hang``, ``died``, ``wrote``, ``noise``,
            ``lost`` (a file of the user's) or ``code N``.
        said: the end of what it printed.
    """

    name: str
    expect: str
    outcome: str
    said: str

    @property
    def wrong(self) -> bool:
        """Whether the outcome is none of those that were expected."""
        fine = {"refuse": ("refused",), "any": ("refused", "accepted", "code 3")}
        return self.outcome not in fine[self.expect]


def judge(case: Case, sources: Sources) -> Result:
    """Run a case, in a process of its own if it says so."""
    return _apart(case, sources) if case.apart else _here(case, sources, SECONDS)


def good(sources: Sources) -> dict[str, str]:
    """Outcomes of inputs that nobody spoiled: all must be accepted.

    To be called first: a time limit in the middle of an import would leave half a module behind.
    """
    cases = {
        "text": Case("good/text", lambda place: place.train(place.text_tree())),
        "labels": Case("good/labels", lambda place: place.train(place.labels_tree())),
        "run": Case("good/run", lambda place: place.resume(), stop="step"),
    }
    return {name: _here(case, sources, 1000).outcome for name, case in cases.items()}


def _here(case: Case, sources: Sources, seconds: int) -> Result:
    with tempfile.TemporaryDirectory(prefix="bad_input_") as folder, put_back():
        place = Place(Path(folder) / "place", sources)
        arguments = [str(one) for one in case.make(place)]
        before = tree_digest(place.folder)
        with _kept_as_it_was(place.folder), _stopped(case), _quiet(), _captured() as said:
            code = _code_of(arguments, seconds, said)
        after = tree_digest(place.folder)
        outcome = _outcome(code, said, before != after, described=case.stop == "step")
        own = {path for path, content in before.items() if MINE in path or content == _OWN}
        if any(after.get(path) != before[path] for path in own):
            outcome = "lost"
        _writable(place.folder)
    return Result(case.name, case.expect, outcome, said.text())


def _writable(folder: Path) -> None:
    """Let the folder be removed, whatever a case did to it."""
    for path in (folder, *folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)


class _Said:
    """What a command printed, by Python or by others."""

    def __init__(self) -> None:
        self.out, self.err, self.trace = "", "", ""

    def text(self) -> str:
        """The last lines, the exception's first."""
        lines = [*self.trace.strip().splitlines()[-1:], *self.err.splitlines()[-3:]]
        text = " ⏎ ".join(lines)
        return text if len(text) < 420 else f"{text[:200]} … {text[-200:]}"


def _code_of(arguments: list[str], seconds: int, said: _Said) -> int | str:
    """The exit code, or the name of another end."""
    try:
        with _time_limit(seconds):
            return cli.main(arguments)
    except Accepted:
        return "accepted"
    except Hung:
        said.trace = f"over {seconds} s"
        return "hang"
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else "code ?"
    except BaseException:  # whatever a user would see as a traceback, panics of Rust too
        said.trace = traceback.format_exc()
        return "traceback"


def _outcome(code: int | str, said: _Said, changed: bool, *, described: bool) -> str:
    """The outcome by name; a run that came to its arrays has described itself on stdout."""
    if isinstance(code, str):
        return code
    if "Traceback (most recent call last)" in said.err:
        return "traceback"
    if code == 0:
        return "accepted"
    if code != 2:
        return f"code {code}"
    if changed:
        return "wrote"
    line = said.err.removesuffix("\n")
    sentence = line.removeprefix("balora: ")
    fine = sentence != line and len(sentence) <= LONGEST and not _CONTROL.search(sentence)
    return "refused" if fine and (described or not said.out) else "noise"


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def hung(_number: int, _frame: Any) -> None:
        raise Hung

    timers = {
        signal.ITIMER_REAL: (signal.SIGALRM, seconds * PATIENCE),
        signal.ITIMER_PROF: (signal.SIGPROF, seconds),
    }
    before = {number: signal.signal(number, hung) for number, _ in timers.values()}
    for timer, (_, limit) in timers.items():
        signal.setitimer(timer, limit, 1.0)  # again, if somebody swallows the first
    try:
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0.0)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _kept_as_it_was(folder: Path) -> Iterator[None]:
    """Work in the folder, with nothing of the process changed afterwards."""
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    environment = {"HOME": str(folder), "PYTHONPATH": str(ROOT)}
    with mock.patch.dict(os.environ, environment), contextlib.chdir(folder):
        try:
            yield
        finally:
            for number, handler in signals.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _stopped(case: Case) -> Iterator[None]:
    """End the command where a run would begin to cost something."""

    def accept(*_: Any, **__: Any) -> Any:
        raise Accepted

    costly: list[tuple[Any, str]] = [
        (compiled, "compile_or_size"),
        (ahead, "_ask"),
        (measure, "text_step"),
        (bench_labels, "compiled_case"),
        (study_run, "fit"),
    ]
    costly += {
        "weights": [(Checkpoint, "load"), (Checkpoint, "load_head")],
        "tensors": [(hf_weights, "_load")],
        "step": [(Training, "train"), (Training, "score_before")],
    }[case.stop]
    with contextlib.ExitStack() as stack:
        for place, name in costly:
            stack.enter_context(mock.patch.object(place, name, accept))
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the network, as fast as without a cable."""

    def unreachable(*_: Any) -> Any:
        raise OSError(101, "Network is unreachable")

    with (
        mock.patch.object(socket.socket, "connect", unreachable),
        mock.patch.object(socket, "getaddrinfo", unreachable),
        mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True),
        mock.patch.object(datasets.config, "HF_HUB_OFFLINE", True),
    ):
        yield


@contextlib.contextmanager
def _captured() -> Iterator[_Said]:
    """What is printed, by the interpreter and by compiled code; warnings as a user sees them."""
    said = _Said()
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(2)]
        kept = [os.dup(1), os.dup(2)]
        streams = [
            io.TextIOWrapper(os.fdopen(os.dup(f.fileno()), "wb"), "utf-8", "backslashreplace")
            for f in files
        ]
        before = sys.stdout, sys.stderr
        for number, file in enumerate(files, start=1):
            os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = streams
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.resetwarnings()
                for kind in (DeprecationWarning, PendingDeprecationWarning, ResourceWarning):
                    warnings.simplefilter("ignore", kind)
                yield said
        finally:
            sys.stdout, sys.stderr = before
            for stream in streams:
                stream.close()
            for number, was in enumerate(kept, start=1):
                os.dup2(was, number)
                os.close(was)
            texts = []
            for file in files:
                file.seek(0)
                texts.append(file.read(10**6).decode(errors="replace"))
            said.out = texts[0]
            said.err = texts[1] + "".join(f"{warning.message}\n" for warning in seen)


def _apart(case: Case, sources: Sources) -> Result:
    """The case in a process that has all imports done and no JAX begun."""
    for name in WRITERS:
        sources.path(name)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.bad_inputs.judge"])
    with tempfile.TemporaryDirectory(prefix="bad_input_") as folder:
        answer = Path(folder) / "answer.json"
        process = context.Process(target=answer_one, args=(case.name, sources.folder, answer))
        process.start()  # in the environment as it is: the server serves other tests as well
        process.join(SECONDS_APART * PATIENCE)
        if process.is_alive():
            process.kill()
            process.join()
            return Result(case.name, case.expect, "hang", "no end, and no work")
        if process.exitcode == -signal.SIGXCPU:
            return Result(case.name, case.expect, "hang", f"over {SECONDS_APART} s")
        if answer.exists():
            return Result(**json.loads(answer.read_text()))
        return Result(case.name, case.expect, "died", f"exit code {process.exitcode}")


def answer_one(name: str, folder: Path, answer: Path) -> None:
    """Judge one case, and write the result."""
    from tests.bad_inputs.cases import by_name

    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS_APART, SECONDS_APART + 5))
    tempfile.tempdir = os.environ["TMPDIR"] = str(answer.parent)
    result = _here(by_name()[name], Sources(folder), SECONDS_APART - 5)
    answer.write_text(json.dumps(result._asdict()))
