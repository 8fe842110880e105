"""Flags that the XLA here does not know are left out, and a start that fails says why."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import compiler

GONE = "--xla_no_such_flag=1"


@pytest.fixture(autouse=True)
def unasked(monkeypatch):
    monkeypatch.delenv(compiler._FOUND)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.delenv(compiler._FULL, raising=False)


def test_only_known_flags_are_taken(monkeypatch):
    known = compiler.flags().split()
    assert set(known) <= set(compiler._QUICK)
    assert "--xla_backend_optimization_level=0" in known
    monkeypatch.delenv(compiler._FOUND)
    monkeypatch.setattr(compiler, "_QUICK", (*compiler._QUICK, GONE))
    assert compiler.flags(3).split() == [*known, "--xla_force_host_platform_device_count=3"]


def test_the_answer_is_inherited(monkeypatch):
    compiler.flags()
    monkeypatch.setattr(compiler, "_refusal", None)
    assert compiler.on_cpu()["XLA_FLAGS"] == os.environ[compiler._FOUND]


@pytest.mark.parametrize("flag", [GONE, "--xla_backend_optimization_level=some"])
def test_pytest_says_that_xla_does_not_start(flag):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "tests/numerics/test_top_k.py"],
        cwd=Path(__file__).parents[1], env={**os.environ, "XLA_FLAGS": flag},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "XLA does not start with XLA_FLAGS=" in done.stdout + done.stderr
    assert flag in done.stdout + done.stderr


def test_nothing_is_taken_where_the_compiler_is_as_users_have_it(monkeypatch):
    monkeypatch.setenv(compiler._FULL, "full")
    assert compiler.flags() == ""
