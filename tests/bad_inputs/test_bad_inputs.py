"""Bad inputs: refused in one sentence with nothing written; a sixth of them, or all.

``BALORA_BAD_INPUTS=all`` runs all of them.
"""

import os
import re

import pytest

from tests.bad_inputs.case import Sources
from tests.bad_inputs.cases import by_name, in_the_sixth

ALL = os.environ.get("BALORA_BAD_INPUTS") == "all"
CASES = by_name()
KNOWN: dict[str, str] = {}
"""Cases whose outcome is wrong, with the reason."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The good inputs that every case spoils a copy of."""
    from tests.bad_inputs.judge import good

    found = Sources(tmp_path_factory.mktemp("sources"))
    assert set(good(found).values()) == {"accepted"}
    return found


@pytest.mark.parametrize("name", [name for name in CASES if ALL or in_the_sixth(name)])
def test_a_bad_input(name, sources, record_property):
    from tests.bad_inputs.judge import judge

    result = judge(CASES[name], sources)
    record_property("bad_input", result.outcome)
    assert result.wrong == (name in KNOWN), f"{result.outcome}: {result.said}"


def test_there_are_enough():
    assert len(CASES) >= 800
    assert sum(map(in_the_sixth, CASES)) == pytest.approx(len(CASES) / 6, rel=0.1)


def test_what_found_a_fault_once_is_among_them(shared):
    table = (shared / "cases" / "bad_inputs.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| (\w+/\S+) \|", table, flags=re.MULTILINE)
    assert len(found) == 157
    assert set(found) <= set(CASES)


def test_known_faults_are_cases():
    assert set(KNOWN) <= set(CASES)
