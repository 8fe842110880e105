"""The notebooks in ``colab/``, run from top to bottom, and the commands beside them."""

import os
import re
import shlex
from pathlib import Path

import pytest

from balora_jax.cli import make_parser
from balora_jax.config_file import load_config
from balora_jax.io.metrics import read_metrics
from tests import compiler

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).resolve().parents[1]
COLAB = ROOT / "colab"
NOTEBOOKS = sorted(COLAB.glob("*.ipynb"))
# The real quickstart, cut short: this is about the notebooks, not about the score.
STEPS = 4
SHORT = (
    f"training.max_steps={STEPS} training.checkpoint_every=0 training.log_gradient_share_every=0 "
    "eval.limit=4 eval.batch_size=4 eval.max_new_tokens=8"
)
DEVICES = 2


def execute(name, folder, **more):
    """Run a notebook in ``folder``; cells with the tag ``skip-execution`` are left out."""
    notebook = nbformat.read(COLAB / name, as_version=4)
    environment = os.environ | {
        "BALORA_QUICKSTART_SET": SHORT,
        "PYTHONPATH": str(ROOT),  # the checkout, so the installing cell has nothing to do
        "HF_HUB_OFFLINE": "1",
        **compiler.on_cpu(),
    }
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env=environment | more)
    return notebook


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("notebook")
    return execute("quickstart.ipynb", folder), folder


@pytest.fixture(scope="module")
def on_devices(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tpu")
    more = {
        # So large that a few steps change the answers.
        "BALORA_QUICKSTART_SET": f"{SHORT} training.learning_rate=0.02",
        "XLA_FLAGS": compiler.flags(DEVICES),
    }
    return execute("tpu.ipynb", folder, **more), folder


def printed(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")


def shown_pictures(notebook):
    shown = [o.data for cell in notebook.cells for o in cell.get("outputs", []) if "data" in o]
    return sum("image/png" in data for data in shown)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_outputs_are_stripped(path):
    for cell in nbformat.read(path, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.parametrize("run", ["executed", "on_devices"])
def test_it_installs_a_release_only_where_nothing_is_installed(run, request):
    notebook, _ = request.getfixturevalue(run)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert "git clone" in first.source
    assert not first.outputs


def test_it_trains_and_shows_the_curves(executed):
    notebook, folder = executed
    assert (folder / "runs" / "quickstart" / "summary.json").is_file()
    text = printed(notebook)
    assert re.search(r"exact match before: [01]\.\d{3}\nexact match after: [01]\.\d{3}\n", text)
    assert shown_pictures(notebook) == 1


@pytest.mark.parametrize("tool", ["peft", "merged"])
def test_other_tools_compute_the_same(executed, tool):
    text = printed(executed[0])
    found = re.search(rf"{tool}: largest difference (\S+) of the range", text)
    assert found
    assert float(found.group(1)) <= 1e-4
    assert f"{tool}: same answer: True" in text


def test_it_splits_the_weights_over_all_devices_and_resumes_half_way(on_devices):
    notebook, folder = on_devices
    text = printed(notebook)
    assert f"{DEVICES} x cpu, mesh {{'data': 1, 'fsdp': {DEVICES}" in text
    assert f"resumed at step {STEPS // 2} from" in text
    rows = read_metrics(folder / "runs" / "tpu" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert f"steps 1 to {STEPS}, {DEVICES} x cpu\n" in text
    assert shown_pictures(notebook) == 1


def test_it_scores_and_exports_the_saved_adapter(on_devices):
    notebook, folder = on_devices
    text = printed(notebook)
    shown = re.findall(r"^(?:before|after|score): (exact .*; first answer: .*)$", text, re.M)
    before, half, after, saved = shown
    assert saved == after
    assert len({before, half, after}) == 3
    error = re.search(r"^runs/tpu_rank8: rank 8, error (\S+)$", text, re.M)
    assert error
    assert 0.0 <= float(error.group(1)) < 1.0
    assert (folder / "runs" / "tpu_rank8" / "adapter_model.safetensors").is_file()


def commands():
    """Every ``balora`` command on a config that the page and the notebooks show, as words."""
    page = (ROOT / "docs" / "pods.md").read_text(encoding="utf-8")
    texts = re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S)
    for path in NOTEBOOKS:
        texts += [cell.source for cell in nbformat.read(path, as_version=4).cells]
    text = "\n".join(texts).replace("\\\n", " ")
    known = dict(re.findall(r"^export (\w+)=\"(.+?)\"", text, re.M)) | {"FIRST": "10.0.0.1"}
    text = re.sub(r"\\\$\(.*?\)", "0", text).replace(r"\$*", "").replace("{file.parent}", "configs")
    text = re.sub(r"\$(\w+)", lambda name: known.get(name[1], name[0]), text)
    found = re.findall(r"balora ((?:train|plan|eval|export) \S+\.yaml[^\n\"'&|#>]*)", text)
    return [shlex.split(words) for words in found]


@pytest.mark.parametrize("words", commands(), ids=lambda words: words[0])
def test_every_command_on_the_page_is_one(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    if words[0] == "plan":
        pytest.importorskip("balora_jax.plan.run")
    options = make_parser().parse_args(words)
    assert load_config(options.config, options.set)


def test_every_step_of_the_page_is_there():
    steps = {words[0] for words in commands()}
    assert steps == {"plan", "train", "eval", "export"}
    assert any("--coordinator" in words for words in commands())
