"""README and docs/: their commands run, their configs are read, their links lead somewhere.

A block that cannot run here (a cloud, a download, minutes of work) says so in a comment just before
it: ``<!-- not run: why -->``. Its ``balora`` commands must be commands all the same.
"""

import ast
import importlib.util
import inspect
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

import balora_jax
from balora_jax import cli
from balora_jax.config_file import load_config, parse_config
from tests import compiler
from tests.registered import put_back

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]

# What a command gets on top of its own words, so that it takes seconds: the blocks are about the
# commands, not about the scores.
SHORT = {
    "train": "training.max_steps=4 training.checkpoint_every=0 eval.limit=4 eval.max_new_tokens=8",
    "eval": "eval.limit=4 eval.max_new_tokens=8",
    "generate": "eval.max_new_tokens=8",
    "bench": "training.batch_size=2",
}
MORE = {"bench": ["--rounds", "1", "--case", "BA-LoRA"]}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    before: str  # the line of text before it

    @property
    def runs(self):
        return not self.before.startswith("<!-- not run: ")

    @property
    def file(self):
        """Where the text before says to save the block."""
        found = re.search(r"as `([^`]+)`:$", self.before)
        return found and found[1]


def blocks(page):
    found, lines, start = [], page.read_text(encoding="utf-8").splitlines(), None
    for number, line in enumerate(lines, start=1):
        if not line.startswith("```"):
            continue
        if start is None:
            start = number
            continue
        text = "\n".join(lines[start : number - 1]) + "\n"
        before = next((x for x in reversed(lines[: start - 1]) if x), "")
        found.append(Block(page, start, lines[start - 1][3:], text, before))
        start = None
    return found


BLOCKS = [block for page in PAGES for block in blocks(page)]


def of(language):
    return [block for block in BLOCKS if block.language == language]


def commands(block):
    """Words of every ``balora`` and ``train.py`` command in a block."""
    text = re.sub(r"<<'END'.*?^END$", "", block.text, flags=re.DOTALL | re.MULTILINE)
    for part in re.split(r"&&|\n", text.replace("\\\n", " ")):
        if re.match(r"balora |\S*python (train\.py|-m balora_jax) ", part.strip()):
            words = shlex.split(part, comments=True)
            yield words[1:] if words[0] == "balora" else ["train", *words[2:]]


def named(block):
    return f"{block.page.name}:{block.line}"


# ``$NAME`` is a variable of the page on pods, which has a test of its own (test_notebook.py).
COMMANDS = [
    pytest.param(words, id=f"{named(block)} {words[0]}")
    for block in of("bash")
    for words in commands(block)
    if "$" not in " ".join(words)
]


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_are_commands(words):
    options = cli.make_parser().parse_args(words)
    extended = any(word.startswith("extensions=") for word in options.set)  # by a file of the page
    if (ROOT / options.config).exists() and not extended:
        load_config(ROOT / options.config, options.set)


def test_reasons_are_given():
    marked = [block for block in BLOCKS if not block.runs]
    assert marked
    for block in marked:
        assert re.fullmatch(r"<!-- not run: \w.{5,}-->", block.before), named(block)


# Those with a name are files that commands of the page read.
@pytest.mark.parametrize("block", [b for b in of("yaml") if not b.file], ids=named)
def test_configs_are_read(block):
    parse_config(yaml.safe_load(block.text), named(block))


def test_the_page_of_settings_is_what_the_schema_says():
    spec = importlib.util.spec_from_file_location("settings", ROOT / "docs" / "settings.py")
    settings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(settings)
    written = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert written == settings.page(), "run python docs/settings.py"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that looks like a clone, to run blocks in."""
    for name in ("configs", "train.py", "docs", "balora_jax"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    with put_back():  # a page's own terms are not another page's
        yield tmp_path


def shell(text):
    """Run lines of a shell whose ``python`` is this one."""
    environment = os.environ | compiler.on_cpu() | {"PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", text], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def run_bash(block):
    """``balora`` commands in this process, what lies between them in a shell."""
    between = []
    for line in block.text.splitlines():
        if not line.startswith("balora "):
            between.append(line)
            continue
        shell("\n".join(between))
        between = []
        words = shlex.split(line, comments=True)[1:]
        words += MORE.get(words[0], [])
        words += ["--set", *SHORT[words[0]].split()] if words[0] in SHORT else []
        assert cli.main(words) == 0, line
    shell("\n".join(between))


PAGES_THAT_RUN = [
    page for page in PAGES if any(b.runs and b.language in ("bash", "python") for b in blocks(page))
]


@pytest.mark.parametrize("page", PAGES_THAT_RUN, ids=lambda page: page.name)
def test_blocks_run(page, folder):
    """All of a page, from top to bottom, in one folder: later blocks use what earlier ones made."""
    for block in blocks(page):
        installs = block.text.startswith("python3 -m venv")  # .ci/run does that
        if not block.runs or installs:
            continue
        if block.file:
            (folder / block.file).parent.mkdir(exist_ok=True)
            (folder / block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "bash":
            run_bash(block)
        elif block.language == "python":
            text = block.text.replace("training.max_steps=50", "training.max_steps=4")
            (folder / "block.py").write_text(text, encoding="utf-8")
            shell("python block.py")


def test_the_readme_opens_with_two_commands_for_a_fresh_machine():
    first, second = [block.text for block in blocks(README) if block.language == "bash"][:2]
    for command in (first, second):
        assert command.count("\n") == 1
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -q ")
    assert "train.py configs/quickstart.yaml" in first
    assert "python -m pytest" in second


def test_the_readme_is_short():
    assert README.read_text(encoding="utf-8").count("\n") <= 200


def test_extras_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for page in PAGES:
        for name in re.findall(r'\.\[([\w,]+)\]"', page.read_text(encoding="utf-8")):
            assert set(name.split(",")) <= set(project["optional-dependencies"]), page.name


def test_python_blocks_name_what_there_is():
    for block in of("python"):
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and node.module == "balora_jax":
                assert {alias.name for alias in node.names} <= set(balora_jax.__all__)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                function = getattr(balora_jax, node.func.id, None)
                if function is not None:
                    keywords = {keyword.arg for keyword in node.keywords}
                    assert keywords <= set(inspect.signature(function).parameters)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in slugs, target
