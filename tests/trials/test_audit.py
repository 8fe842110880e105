"""What the command line does to the machine, by Python's own audit events.

``BALORA_AUDIT=all`` looks at more commands than one run.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import compiler
from tests.tiny_run import FEW, write_config, write_inputs

ROOT = Path(__file__).parents[2]
STARTS = re.compile(r"subprocess\.|os\.(system|exec|posix_spawn|spawn|fork)")
ALL = os.environ.get("BALORA_AUDIT") == "all"

# Processes that a command may start, and the package that starts each, with the reason.
STARTED = {
    "fc-list": "matplotlib",  # asks the system for its fonts, once, when its cache is new
    "/sbin/ldconfig": "cuda",  # what torch brings, where it is installed, looks for libraries
    "judge_program.py": "evals",  # proves expressions equal, where math-verify is installed
}


class Seen(NamedTuple):
    """A command that ended.

    Attributes:
        out: all that it printed.
        events: of Python, each with ``event``, ``about`` and ``frames``.
        inside: the folders that it may write to.
    """

    out: str
    events: list[dict]
    inside: list[Path]

    def of(self, pattern):
        return [event for event in self.events if re.match(pattern, event["event"])]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A place with inputs, and a home of its own for caches."""
    folder = tmp_path_factory.mktemp("audit")
    write_inputs(folder / "inputs")
    for name in ("home", "tmp"):
        (folder / name).mkdir()
    return folder


def look(home, *arguments, workdir):
    log = home / f"{workdir}.log"
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("XDG_", "HF_", "JAX_", "MPL"))
    }
    environment |= compiler.on_cpu() | {
        "HOME": str(home / "home"),
        "TMPDIR": str(home / "tmp"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",  # where the packages lie is not what is looked at
        "JAX_COMPILATION_CACHE_DIR": str(home / "home" / "compiled"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.trials.audited", log, *arguments],
        env=environment, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    out = done.stdout.decode()
    assert done.returncode == 0, out
    events = [json.loads(line) for line in log.read_text().splitlines()]
    return Seen(out, events, [home / workdir, home / "home", home / "tmp"])


@pytest.fixture(scope="module")
def trained(home):
    config = write_config(
        home / "config.yaml",
        home / "inputs",
        adapter=FEW,
        training={"max_steps": 4, "checkpoint_every": 2, "keep_checkpoints": 1},
        eval={"task": "exact_match"},
    )
    return look(home, "train", config, "--workdir", str(home / "run"), workdir="run")


MORE = {
    "resume": ("train", "config.yaml", "--workdir", "run", "--resume"),
    "eval": ("eval", "config.yaml"),
    "generate": ("generate", "config.yaml", "--prompt", "3+4="),
    "export": ("export", "config.yaml", "--workdir", "run", "--out", "merged"),
}


def check(seen):
    """No socket, nothing unpickled, no process but those named, no writing elsewhere."""
    assert not seen.of(r"socket\."), seen.of(r"socket\.")
    assert not seen.of(r"pickle\."), seen.of(r"pickle\.")
    for event in seen.of(STARTS.pattern):
        named = [owner for name, owner in STARTED.items() if f"{name}'" in event["about"]]
        assert named, event
        assert any(f"/{named[0]}/" in frame for frame in event["frames"]), event
    changes = (e for e in seen.events if not re.match(r"socket|pickle", e["event"]))
    changes = (e for e in changes if not STARTS.match(e["event"]))
    elsewhere = [e for e in changes if not allowed(e, seen.inside)]
    assert not elsewhere, elsewhere


def allowed(event, inside):
    """Whether a change is where changes may be."""
    place = Path(event["about"])
    folders = (place, *place.parents)
    # A file without a name, to see whether the folder of a run can be made there.
    nameless = place.is_dir() and any("tempfile.py" in frame for frame in event["frames"][:1])
    # One that is there already, which is asked for all the same.
    there = event["event"] == "os.mkdir" and place in {folder.parent for folder in inside}
    return (
        place == Path(os.devnull)
        or nameless
        or there
        or any(folder in inside for folder in folders)
    )


def test_a_run(trained):
    check(trained)
    written = {Path(e["about"]).name for e in trained.of("open|os.rename")}
    assert {"adapter_model.safetensors", "SHA256SUMS", "summary.json"} <= written  # it does see


def test_the_log_of_a_run_has_no_control_characters(trained):
    strange = {c for c in trained.out if not c.isprintable() and c != "\n"}
    assert not strange
    assert re.search(
        r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d training: 4 of 4, ", trained.out, re.MULTILINE
    )


@pytest.mark.skipif(not ALL, reason="BALORA_AUDIT=all looks at these as well")
@pytest.mark.parametrize("name", MORE)
def test_other_commands(home, trained, name):
    found = look(home, *MORE[name], workdir=name)
    # What is exported is made beside its place, and then renamed.
    beside = [
        path
        for path in map(Path, {e["about"] for e in found.events})
        if path.name.startswith(".merged.")
    ]
    check(found._replace(inside=[*found.inside, home / "run", home / "merged", *beside]))


@pytest.mark.parametrize(
    ("code", "event"),
    [
        ("import socket; socket.socket().connect_ex(('127.0.0.1', 9))", "socket.connect"),
        ("import pickle; pickle.loads(b'cos\\ngetcwd\\n.')", "pickle.find_class"),
        ("import subprocess; subprocess.run(['true'])", "subprocess.Popen"),
        ("import os; os.system('true')", "os.system"),
        ("open('../elsewhere', 'w')", "open"),
        ("import os; os.open('../other', os.O_CREAT)", "open"),
        ("import os; os.mkdir('../made')", "os.mkdir"),
        ("from pathlib import Path; Path('a').touch(); Path('a').rename('../b')", "os.rename"),
    ],
)
def test_the_hook_sees_it(tmp_path, code, event):
    """What a file of a user's does, for instance, would be found."""
    (tmp_path / "in").mkdir()
    script = (
        "import json, os, sys; from tests.trials import audited; seen = []\n"
        "sys.addaudithook(lambda e, a: seen.append((e, audited.subject(e, a))))\n"
        f"{code}\n"
        "print(json.dumps([s for s in seen if s[1] is not None]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path / "in", env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    events = [
        {"event": name, "about": about, "frames": [""]}
        for name, about in json.loads(done.stdout)
        if name == event
    ]
    assert events
    with pytest.raises(AssertionError):
        check(Seen("", events, [tmp_path / "in"]))
