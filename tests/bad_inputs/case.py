"""One bad input: its name, how it is made on a copy of the tiny inputs, and what is expected."""

import contextlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import yaml
from safetensors.numpy import save_file

from tests import tiny_labels_run, tiny_run

Arguments = Sequence[Any]
Expected = Literal["refuse", "any"]
Stop = Literal["weights", "tensors", "step"]

MINE = "thesis"
"""In the names of a user's own files, which must be there afterwards whatever happens; so must be
files that hold the word ``mine``."""
TARGETS = ["q_proj", "down_proj"]
"""Layers of the tiny adapter, and of the run that checkpoints come from."""


class Case(NamedTuple):
    """One bad input.

    Attributes:
        name: ``group/field-kind``.
        make: edits a :class:`Place` and returns the command line.
        expect: ``refuse``: exit code 2, one sentence, nothing written; ``any``: that, or it goes on.
        apart: it may end or block the whole process, so that it gets one of its own.
        stop: where a command that refuses nothing is stopped, so that none is trained:
            before any weight is read (``weights``), before the first number of one is read, with
            their names and shapes checked (``tensors``), or before the first step (``step``).
    """

    name: str
    make: Callable[["Place"], Arguments]
    expect: Expected = "refuse"
    apart: bool = False
    stop: Stop = "weights"

    @property
    def group(self) -> str:
        """What stands before the slash."""
        return self.name.partition("/")[0]


class Sources:
    """What places copy: written once, the run on the first demand."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, name: str) -> Path:
        """A folder of inputs by name, written if it is not there yet."""
        target = self.folder / name
        if not target.exists():
            draft = self.folder / f"{name}.draft"
            shutil.rmtree(draft, ignore_errors=True)
            WRITERS[name](draft)
            draft.rename(target)
        return target


def write_adapter(folder: Path) -> None:
    """A PEFT adapter of rank 2 on the tiny Llama."""
    folder.mkdir(parents=True)
    rng, tensors = np.random.default_rng(1), {}
    for layer in range(tiny_run.LAYERS):
        for name in ("self_attn.q_proj", "mlp.down_proj"):
            out, wide = tiny_run.LINEAR[name]
            stem = f"base_model.model.model.layers.{layer}.{name}.lora"
            tensors[f"{stem}_A.weight"] = rng.standard_normal((2, wide)).astype(np.float32)
            tensors[f"{stem}_B.weight"] = rng.standard_normal((out, 2)).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 3,
        "target_modules": TARGETS, "base_model_name_or_path": "tiny", "bias": "none",
        "lora_dropout": 0.0, "use_rslora": False, "use_dora": False, "rank_pattern": {},
        "alpha_pattern": {}, "modules_to_save": None, "init_lora_weights": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def write_run(folder: Path) -> None:
    """Two of the four steps of :func:`run_tree`, made beside a folder ``text`` as places have it."""
    from balora_jax import cli

    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        tiny_run.write_inputs("text")
        Path("config.yaml").write_text(yaml.safe_dump(run_tree(training={"stop_at": 2})))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert cli.main(["train", "config.yaml", "--workdir", str(folder)]) == 0


WRITERS: dict[str, Callable[[Path], Any]] = {
    "text": tiny_run.write_inputs,
    "labels": tiny_labels_run.write_label_inputs,
    "adapter": write_adapter,
    "run": write_run,
}


class Place:
    """The folder of one case: copies of what it asks for, and a command line on them.

    Attributes:
        folder: where the command runs; it is compared with what it was before.
    """

    def __init__(self, folder: Path, sources: Sources):
        self.folder, self.sources = folder, sources
        (folder / "out").mkdir(parents=True)

    @property
    def workdir(self) -> Path:
        """A folder that does not exist yet."""
        return self.folder / "out" / "run"

    @cached_property
    def text(self) -> Path:
        """Checkpoint, rows and validation rows of a decoder."""
        return self._copy("text")

    @cached_property
    def labels(self) -> Path:
        """Checkpoint, rows and validation rows of an encoder."""
        return self._copy("labels")

    @cached_property
    def adapter(self) -> Path:
        """A PEFT adapter on the decoder."""
        return self._copy("adapter")

    @cached_property
    def run(self) -> Path:
        """The first two steps of :func:`run_tree`, and the adapter after them, as the workdir."""
        shutil.copytree(self.sources.path("run"), self.workdir, symlinks=True)
        return self.workdir

    def _copy(self, name: str) -> Path:
        target = self.folder / name
        shutil.copytree(self.sources.path(name), target)
        return target

    def text_tree(self, **sections: Any) -> dict[str, Any]:
        """The config of a run on text; keywords are ``section={key: value}``, merged in."""
        tree = tiny_run.config_tree(self.text, adapter={"target_modules": TARGETS})
        return merged(tree, sections)

    def labels_tree(self, **sections: Any) -> dict[str, Any]:
        """The config of a run on labels."""
        return merged(tiny_labels_run.label_config_tree(self.labels), sections)

    def run_tree(self, **sections: Any) -> dict[str, Any]:
        """The config of :attr:`run`, with its inputs."""
        assert self.text
        return run_tree(**sections)

    def config(self, tree: Any = None) -> Path:
        """A config file: a tree as YAML, a text or bytes as they are."""
        file = self.folder / "config.yaml"
        tree = self.text_tree() if tree is None else tree
        if isinstance(tree, bytes):
            file.write_bytes(tree)
        else:
            shown = tree if isinstance(tree, str) else yaml.safe_dump(tree, sort_keys=False)
            file.write_text(shown, encoding="utf-8")
        return file

    def train(self, tree: Any = None, *more: Any, workdir: Any = None) -> Arguments:
        """``balora train`` with a config."""
        workdir = self.workdir if workdir is None else workdir
        return ["train", self.config(tree), "--workdir", workdir, *more]

    def resume(self, **sections: Any) -> Arguments:
        """The command that goes on with :attr:`run`."""
        return self.train(self.run_tree(**sections), "--resume", workdir=self.run)

    def edit(self, file: str | Path, change: Callable[[Any], Any]) -> None:
        """Change a JSON file: ``change`` edits what it holds, or returns what takes its place."""
        file = self.folder / file
        content = json.loads(file.read_text())
        found = change(content)
        file.write_text(json.dumps(content if found is None else found))


def run_tree(**sections: Any) -> dict[str, Any]:
    """A run that compiles quickly: four steps, a checkpoint after each; paths are relative."""
    few = {
        "adapter": {"start": "lora", "target_modules": ["q_proj"]},
        "regularizers": {"consistency": 0.0, "diversity": 0.0, "spectral": 0.0},
        "training": {"max_steps": 4, "checkpoint_every": 1, "accumulation": 1},
    }
    return merged(merged(tiny_run.config_tree("text"), few), sections)


def merged(tree: dict[str, Any], sections: dict[str, Any]) -> dict[str, Any]:
    """A config with keys of its sections replaced; what is no section takes a key's place."""
    for name, values in sections.items():
        if isinstance(values, dict) and isinstance(tree.get(name, {}), dict):
            tree[name] = {**tree.get(name, {}), **values}
        else:
            tree[name] = values
    return tree
