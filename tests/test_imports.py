"""Modules that the package loads, and when: none before it is used."""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import balora_jax
from tests.tiny_run import write_tokenizer

HEAVY = ("jax", "numpy", "pydantic", "transformers", "datasets", "orbax", "grain", "torch")
FOREIGN = ("transformers", "datasets", "orbax", "grain", "torch", "pydantic", "yaml", "optax")
DOORS = ("adapters", "generation", "heads", "regularizers")


def run(*arguments):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=300, check=False
    )


def loaded(code):
    """The modules that a process holds after ``code``, and what it said."""
    found = run("-c", f"import atexit, sys\natexit.register(lambda: print(*sys.modules))\n{code}")
    assert not re.search(r"^Traceback", found.stderr, flags=re.MULTILINE), found.stderr
    return set(found.stdout.splitlines()[-1].split()), found


def test_the_package_alone_loads_nothing():
    modules, _ = loaded("import balora_jax")
    assert not modules & set(HEAVY)
    assert len(modules) < 120


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["trian"], ["--version"], []])
def test_help_and_wrong_arguments_load_nothing(words):
    modules, _ = loaded(f"from balora_jax.cli import main\nmain({words})")
    assert not modules & set(HEAVY)
    assert len(modules) < 250


def test_a_public_name_loads_what_it_needs():
    modules, _ = loaded("import balora_jax\nbalora_jax.InputError")
    assert not modules & set(HEAVY)
    modules, _ = loaded("import balora_jax\nbalora_jax.load_pretrained")
    assert "jax" in modules
    assert not modules & {"torch", "matplotlib"}


def test_the_parts_of_the_library_need_jax_and_flax_alone():
    names = ", ".join(f"balora_jax.{name}" for name in DOORS)
    plain, _ = loaded("import jax, flax.nnx")
    modules, _ = loaded(f"import {names}")
    assert "jax" in modules
    assert not (modules - plain) & set(FOREIGN)


@pytest.mark.parametrize("name", DOORS)
def test_a_door_says_what_is_behind_it(name):
    door = importlib.import_module(f"balora_jax.{name}")
    assert sorted(door.__all__) == sorted(set(door.__all__))
    for public in door.__all__:
        assert getattr(door, public).__doc__
        assert public in door.__doc__, f"{public} is not in the docstring of {name}"


def test_variables_are_set_before_the_libraries_that_read_them():
    names = ("OPENBLAS_NUM_THREADS", "TRANSFORMERS_NO_ADVISORY_WARNINGS")
    environment = {k: v for k, v in os.environ.items() if k not in names}
    code = f"import balora_jax, os, sys\nprint([os.environ[n] for n in {names}], 'numpy' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout == "['1', '1'] False\n"


def test_tools_see_the_names_that_python_finds():
    """The imports for type checkers, ``__all__``, ``dir`` and the lookup agree."""
    tree = ast.parse(Path(balora_jax.__file__).read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(guarded.test) == "TYPE_CHECKING"
    seen = {alias.name: node.module for node in guarded.body for alias in node.names}
    assert sorted(seen) == sorted(balora_jax.__all__)
    assert set(balora_jax.__all__) <= set(dir(balora_jax))
    for name, home in seen.items():
        assert getattr(balora_jax, name) is getattr(sys.modules[home], name)


@pytest.mark.parametrize("files", [(), ("own.py",)], ids=["none", "a user's file"])
def test_a_command_leaves_torch_out_unless_a_users_file_may_want_it(tmp_path, files):
    """A tokenizer alone does not need it; the library never hides it, nor a command for good."""
    pytest.importorskip("torch")
    write_tokenizer(tmp_path)
    (tmp_path / "own.py").touch()
    lines = (
        "from balora_jax import extensions, torch_import",
        "from balora_jax.pretrained.tokenizer import open_tokenizer",
        "torch_import.leave_out()",
        f"extensions.load_extensions({files}, Path({str(tmp_path)!r}))",
        f"open_tokenizer(Path({str(tmp_path)!r}))",
        "print('torch' in sys.modules, importlib.util.find_spec('torch') is not None)",
    )
    found = run("-c", "\n".join(["import importlib.util, sys", "from pathlib import Path", *lines]))
    assert found.stdout == f"{bool(files)} True\n", found.stderr


def test_an_unknown_name_is_refused_as_python_does():
    with pytest.raises(AttributeError, match="module 'balora_jax' has no attribute 'fitt'"):
        _ = balora_jax.fitt


def test_the_module_is_the_command():
    found = run("-m", "balora_jax", "--version")
    assert (found.returncode, found.stdout) == (0, f"balora {balora_jax.__version__}\n")
    found = run("-m", "balora_jax", "trian")
    assert found.returncode == 2
    assert "invalid choice: 'trian'" in found.stderr
