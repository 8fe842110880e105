"""The programs of docs/examples: they run, in as few lines as they promise."""

import itertools
import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "docs" / "examples"


@pytest.mark.parametrize(("name", "most_lines"), [("own_loop", 60), ("hugging_face", 34)])
def test_an_example_is_short_and_lowers_its_loss(name, most_lines, capsys):
    file = EXAMPLES / f"{name}.py"
    assert len(file.read_text(encoding="utf-8").splitlines()) <= most_lines
    runpy.run_path(str(file))
    losses = [float(value) for value in re.findall(r"loss (\S+)$", capsys.readouterr().out, re.M)]
    assert len(losses) > 3
    assert losses[-1] < 0.75 * losses[0]
    assert all(after < before for before, after in itertools.pairwise(losses))


def test_every_example_is_tested():
    assert {file.stem for file in EXAMPLES.glob("*.py")} == {"own_loop", "hugging_face"}
