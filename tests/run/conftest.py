"""Inputs, and one finished run."""

import contextlib
import io
import os
from typing import NamedTuple

import pytest

from balora_jax import signals
from balora_jax.cli import main
from balora_jax.io import drawing
from tests import compiler
from tests.tiny_run import PLAIN, tree_digest, write_config, write_inputs, write_model

# Files of a user, which register when they are loaded: the search for doctests would load them.
collect_ignore = ["outside_terms.py", "aware_start.py"]


class Outcome(NamedTuple):
    """What a command returned and printed."""

    code: int
    out: str
    err: str


def invoke(*arguments):
    """``balora ARGUMENTS`` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Outcome(code, out.getvalue(), err.getvalue())


def settings(overrides):
    """``--set`` arguments from a mapping."""
    return [part for key, value in overrides.items() for part in ("--set", f"{key}={value}")]


@pytest.fixture(scope="session", autouse=True)
def a_slow_machine_is_waited_for():
    """A command of these tests that does not end in time would end this process."""
    before, signals.PATIENCE = signals.PATIENCE, 120.0
    yield
    signals.PATIENCE = before


@pytest.fixture(scope="session")
def cache_folder():
    """Compiled programs, also for the processes that tests start."""
    return os.environ["JAX_COMPILATION_CACHE_DIR"]


@pytest.fixture(scope="session")
def process_environment():
    """Environment of a fresh process with the same cache."""
    return {**os.environ, **compiler.on_cpu()}


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A random checkpoint with training and validation rows; tests only read it."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def no_curves(monkeypatch):
    """Skip the drawing, which takes longer than the training here."""
    monkeypatch.setattr(drawing, "draw_curves", lambda rows, path: False)


class FinishedRun(NamedTuple):
    """A run that ended well; tests read it, or work on a copy."""

    config: str
    workdir: object
    out: str
    err: str


def finish(folder, inputs, **settings):
    """A run of four steps, scored before and after."""
    config = write_config(folder / "config.yaml", inputs, eval={"task": "exact_match"}, **settings)
    code, out, err = invoke("train", config, "--workdir", folder / "run")
    assert code == 0, err
    return FinishedRun(config, folder / "run", out, err)


@pytest.fixture(scope="package")
def finished(tmp_path_factory, inputs):
    """Four steps with every term."""
    folder = tmp_path_factory.mktemp("finished")
    return finish(folder, inputs, training={"log_gradient_share_every": 2})


@pytest.fixture(scope="package")
def finished_plain(tmp_path_factory, inputs):
    """Four steps of LoRA without a term, for tests of what a run writes and reads."""
    return finish(tmp_path_factory.mktemp("finished_plain"), inputs, **PLAIN)


class Place:
    """A folder of a test's own: whatever it holds must be as it was after a refused command."""

    def __init__(self, folder, inputs):
        self.folder, self.inputs = folder, inputs
        self.workdir = folder / "out" / "run"
        self.workdir.parent.mkdir()

    def config(self, **sections):
        return write_config(self.folder / "config.yaml", self.inputs, **sections)

    def model(self, **keys):
        return write_model(self.folder / "model", **keys)

    def refused(self, *phrases, arguments=None, config=None, overrides=None, workdir=None):
        """Run the command and check all that holds for every bad input."""
        if arguments is None:
            arguments = ["train", config or self.config(), "--workdir", workdir or self.workdir]
        before = tree_digest(self.folder), tree_digest(self.inputs)
        code, out, err = invoke(*arguments, *settings(overrides or {}))
        lines = err.splitlines()
        assert len(lines) == 1, err
        assert lines[0].startswith("balora: ")
        for phrase in phrases:
            assert phrase in lines[0]
        assert code == 2
        assert out == ""
        assert (tree_digest(self.folder), tree_digest(self.inputs)) == before


@pytest.fixture
def place(tmp_path, inputs):
    return Place(tmp_path, inputs)
