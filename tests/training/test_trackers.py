"""The built-in trackers, read back by the readers of the packages themselves."""

import json
import math
import os
import signal
import sqlite3
import struct
import subprocess
import sys

import pytest

from balora_jax.config_file import parse_config
from balora_jax.errors import InputError, RunStoppedError
from balora_jax.finetune import fit
from balora_jax.io import drawing
from balora_jax.io.metrics import columns
from balora_jax.training.trackers import TRACKERS
from balora_jax.training.trackers.tracker import Trackers, check_receivers
from tests.tiny_run import PLAIN, config_tree, metrics_of, write_inputs

CONFIG = {"training": {"max_steps": 3}}
SUMMARY = {"after": {"exact_match": 0.5}, "steps": 3}


def row(step):
    return {"step": step, "loss": step / 4, "tokens": 8, "grad_norm": None}


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def session(name, workdir, steps, *, logged=(), summary=None):
    """One start of a run, whose log has rows already: those steps, and its end."""
    check_receivers([TRACKERS[name]], workdir)
    log = workdir / "metrics.jsonl"
    log.write_text(
        "".join(json.dumps(dict.fromkeys(columns(), 1.0) | row(i)) + "\n" for i in logged)
    )
    with Trackers([TRACKERS[name]], workdir, CONFIG, log) as told:
        for step in steps:
            told.log(row(step))
        told.summary = summary


def after_a_kill(workdir):
    """As a kill leaves it between a row at the tracker and the record that it has it."""
    (workdir / "trackers.json").write_text(json.dumps({"step": 2}) + "\n")


def killed(name, workdir, environment):
    """A process that gets the signal right after it gave the rows 1 to 3."""
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from balora_jax.training.trackers import TRACKERS\n"
        "from balora_jax.training.trackers.tracker import Trackers\n"
        f"told = Trackers([TRACKERS[{name!r}]], Path(sys.argv[1]), {CONFIG}, Path('none'))\n"
        "for step in (1, 2, 3): told.log("
        "{'step': step, 'loss': step / 4, 'tokens': 8, 'grad_norm': None})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    # A process of its own writes for wandb, which this variable would make ours.
    own = {name: v for name, v in os.environ.items() if name != "WANDB_SERVICE"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(workdir)], env={**own, **environment}, check=False
    )
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("name", "module"),
    [("tensorboard", "tensorboardX"), ("wandb", "wandb"), ("trackio", "trackio")],
)
def test_a_missing_package_is_named_with_its_extra(name, module, workdir, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError) as found:
        check_receivers([TRACKERS[name]], workdir)
    assert str(found.value) == (
        f"training.trackers: expected the package {module} for {name!r}, which is not installed. "
        f"Run pip install 'balora-jax[{name}]'."
    )
    assert not list(workdir.iterdir())


def events(workdir):
    """Scalars by tag as (step, value), and texts, as TensorBoard itself reads them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(workdir / "trackers" / "tensorboard"))
    found.Reload()
    tags = found.Tags()
    scalars = {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in tags["scalars"]}
    texts = {
        tag.removesuffix("/text_summary"): found.Tensors(tag)[-1]
        .tensor_proto.string_val[0]
        .decode()
        for tag in tags["tensors"]
    }
    return scalars, texts


def test_tensorboard_reads_every_row_once(workdir):
    pytest.importorskip("tensorboardX")
    session("tensorboard", workdir, [1, 2, 3])
    after_a_kill(workdir)
    session("tensorboard", workdir, [2, 3, 4], summary=SUMMARY)
    assert len(list((workdir / "trackers" / "tensorboard").iterdir())) == 2
    scalars, texts = events(workdir)
    assert scalars.keys() == {"loss", "tokens", "grad_norm"}
    assert scalars["loss"] == [(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)]
    assert [step for step, value in scalars["grad_norm"] if math.isnan(value)] == [1, 2, 3, 4]
    assert json.loads(texts["config"]) == CONFIG
    assert json.loads(texts["summary"]) == SUMMARY


def test_tensorboard_has_the_rows_of_a_killed_process(workdir):
    pytest.importorskip("tensorboardX")
    killed("tensorboard", workdir, {})
    scalars, _ = events(workdir)
    assert scalars["loss"] == [(1, 0.25), (2, 0.5), (3, 0.75)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_damaged_id_is_refused(name, workdir):
    pytest.importorskip(name)
    os.environ["WANDB_MODE"] = "offline"
    (workdir / "trackers").mkdir()
    file = workdir / "trackers" / f"{name}.json"
    file.write_text('{"run": "../x"}')
    with pytest.raises(InputError, match=f"expected the id of this run at {name}, got"):
        check_receivers([TRACKERS[name]], workdir)


BLOCK, HEADER = 32768, 7


def wandb_records(file):
    """The messages of an offline run: LevelDB's log format behind a header, wandb's own schema."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, whole = file.read_bytes(), HEADER, b""
    assert content.startswith(b":W&B")
    while len(content) - at >= HEADER:
        if BLOCK - at % BLOCK < HEADER:  # the rest of a block that holds no header
            at += BLOCK - at % BLOCK
        _, length, kind = struct.unpack("<IHB", content[at : at + HEADER])
        whole += content[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # full, last
            yield Record.FromString(whole)
            whole = b""


def history(workdir):
    """Rows of all offline runs in a folder, their ids and the summaries' values."""
    rows, ids, summary = [], set(), {}
    for file in sorted(
        workdir.glob("trackers/wandb/offline-run-*/run-*.wandb"), key=os.path.getmtime
    ):
        for record in wandb_records(file):
            if record.HasField("run"):
                ids.add(record.run.run_id)
            items = record.history.item
            if items:
                values = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}
                rows.append((values["_step"], values))
            for one in record.summary.update:
                summary["/".join(one.nested_key) or one.key] = json.loads(one.value_json)
    return rows, ids, summary


@pytest.fixture
def offline(workdir, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    return workdir


def test_wandb_goes_on_with_its_run(offline):
    session("wandb", offline, [1, 2, 3])
    session("wandb", offline, [2, 3, 4], summary=SUMMARY)
    rows, ids, summary = history(offline)
    kept = json.loads((offline / "trackers" / "wandb.json").read_text())
    assert ids == {kept["run"]}
    assert [(step, values["loss"]) for step, values in rows] == [(i, i / 4) for i in (1, 2, 3, 4)]
    assert all(math.isnan(values["grad_norm"]) for _, values in rows)
    assert summary["after"] == SUMMARY["after"]


def test_wandb_gets_the_rows_that_a_kill_took_from_the_log(offline):
    killed("wandb", offline, {"WANDB_MODE": "offline"})
    session("wandb", offline, [2, 3, 4], logged=[1])  # as if a checkpoint was of step 1
    rows, *_ = history(offline)
    assert [(step, values["loss"]) for step, values in rows] == [(i, i / 4) for i in (1, 2, 3, 4)]


def test_wandb_without_a_key_is_refused(workdir, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(workdir / "none"))
    with pytest.raises(InputError, match=r"expected a key of wandb, got none\. Run wandb login"):
        check_receivers([TRACKERS["wandb"]], workdir)
    assert not list(workdir.iterdir())


def trackio_rows(folder):
    """Steps and values of the only database in a folder, by run."""
    (file,) = folder.glob("*.db")
    with sqlite3.connect(file) as database:
        found = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id")
        return [(name, step, json.loads(metrics)) for name, step, metrics in found]


TRACKIO_SESSIONS = """
import sys
from pathlib import Path
from tests.training.test_trackers import SUMMARY, session
for last, steps in ((None, [1, 2]), (SUMMARY, [1, 2, 3])):
    session("trackio", Path(sys.argv[1]), steps, logged=steps[:1], summary=last)
"""


def test_trackio_has_every_row_once_whatever_was_killed(workdir, tmp_path):
    pytest.importorskip("trackio")
    place = {"TRACKIO_DIR": str(tmp_path / "t")}  # read when it is imported
    killed("trackio", workdir, place)  # its thread had no time to write
    done = subprocess.run(
        [sys.executable, "-c", TRACKIO_SESSIONS, str(workdir)],
        env={**os.environ, **place}, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = trackio_rows(tmp_path / "t")
    assert [(step, values["loss"]) for _, step, values in rows] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    kept = json.loads((workdir / "trackers" / "trackio.json").read_text())["run"]
    (name,) = {name for name, _, _ in rows}
    assert name.endswith(f"-run-{kept}")


class Fails:
    """A callback that cannot start."""

    def start(self, workdir, config):
        raise RunStoppedError("no")

    def log(self, row): ...

    def finish(self, summary): ...


class Remembers(Fails):
    """A callback that keeps what it is told."""

    def __init__(self):
        self.told = []

    def start(self, workdir, config):
        self.told.append(config)

    def log(self, row):
        self.told.append(row["step"])

    def finish(self, summary):
        self.told.append(summary)


def test_one_that_cannot_start_ends_those_that_have(workdir):
    first = Remembers()
    with pytest.raises(RunStoppedError, match="no"):
        Trackers([first, Fails()], workdir, CONFIG, workdir / "none")
    assert first.told == [CONFIG, None]


def test_what_is_no_callback_is_refused(workdir):
    with pytest.raises(
        InputError, match=r"callbacks: expected objects with the methods start, log"
    ):
        check_receivers([print], workdir)


def test_a_whole_run_gives_its_rows_once_and_is_drawn_while_it_goes_on(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    drawn = []
    monkeypatch.setattr(drawing, "EVERY", 0.0)
    monkeypatch.setattr(drawing, "SHARE", 1e9)
    monkeypatch.setattr(drawing, "draw_curves", lambda rows, path: not drawn.append(len(rows)))
    tree = config_tree(
        write_inputs(tmp_path), **PLAIN, training={"max_steps": 3, "trackers": ["tensorboard"]}
    )
    config, told = parse_config(tree, "config"), Remembers()
    fit(config, workdir=tmp_path / "run", callbacks=[told])
    assert told.told[0]["training"]["trackers"] == ["tensorboard"]
    assert told.told[1:-1] == [1, 2, 3]
    assert told.told[-1] == json.loads((tmp_path / "run" / "summary.json").read_text())
    rows = metrics_of(tmp_path / "run", without=())
    scalars, _ = events(tmp_path / "run")
    assert scalars.keys() == rows[0].keys() - {"step"}
    for name, points in scalars.items():
        assert [step for step, _ in points] == [1, 2, 3]
        values = [value for _, value in points]
        assert values == pytest.approx([row[name] for row in rows], rel=1e-6), name
    assert drawn == [1, 2, 3, 3]  # after each row, and at the end
