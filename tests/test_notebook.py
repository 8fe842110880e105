"""Does the Colab notebook run from top to bottom, and do other tools agree with us in it?"""

import os
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("peft")

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "colab" / "quickstart.ipynb"
# The real quickstart, cut short: this is about the notebook, not about the score.
SHORT = (
    "training.max_steps=4 training.checkpoint_every=0 training.log_gradient_share_every=0 "
    "eval.limit=4 eval.batch_size=4 eval.max_new_tokens=8"
)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    folder = tmp_path_factory.mktemp("notebook")
    environment = os.environ | {
        "BALORA_QUICKSTART_SET": SHORT,
        "PYTHONPATH": str(ROOT),  # the checkout, so the installing cell has nothing to do
        "HF_HUB_OFFLINE": "1",
        "JAX_PLATFORMS": "cpu",
    }
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env=environment)
    return notebook, folder


def printed(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")


def test_outputs_are_stripped():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_it_installs_a_release_only_where_nothing_is_installed(executed):
    first = next(cell for cell in executed[0].cells if cell.cell_type == "code")
    assert "git clone" in first.source
    assert not first.outputs


def test_it_trains_and_shows_the_curves(executed):
    notebook, folder = executed
    assert (folder / "runs" / "quickstart" / "summary.json").is_file()
    text = printed(notebook)
    assert re.search(r"exact match before: [01]\.\d{3}\nexact match after: [01]\.\d{3}\n", text)
    shown = [o.data for cell in notebook.cells for o in cell.get("outputs", []) if "data" in o]
    assert sum("image/png" in data for data in shown) == 1


@pytest.mark.parametrize("tool", ["peft", "merged"])
def test_other_tools_compute_the_same(executed, tool):
    text = printed(executed[0])
    found = re.search(rf"{tool}: largest difference (\S+) of the range", text)
    assert found
    assert float(found.group(1)) <= 1e-4
    assert f"{tool}: same answer: True" in text
