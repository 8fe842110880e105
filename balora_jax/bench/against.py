"""The torch reference in a process beside ours: same weights, same batch, same start."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from balora_jax.bench import mkl
from balora_jax.bench.weights import Weights
from balora_jax.errors import InputError
from balora_jax.models.families.base import weight_rules
from balora_jax.parallel.sharding import platform_of
from balora_jax.pretrained.checkpoint import Base
from balora_jax.tasks.text.program import TextProgram
from balora_jax.training.run import Loaded

REFERENCE = Path(__file__).with_name("torch_reference.py")


class TorchTrainer:
    """The reference trainer in its own process; ask it for one step at a time."""

    def __init__(self, process: subprocess.Popen):
        self.process = process
        self.setup = self._answer()

    def __call__(self) -> dict[str, Any]:
        """One optimizer step: seconds, losses before the update, growth of memory in bytes."""
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise InputError(
                f"--against torch: expected the reference trainer to answer, it ended with exit "
                f"code {code}; its message is above. Install it with pip install '.[test]'."
            )
        return json.loads(line)


@contextmanager
def torch_trainer(
    folder: Path, program: TextProgram, base: Base, weights: Weights, loaded: Loaded, threads: int
) -> Iterator[TorchTrainer]:
    """Write what the reference needs into ``folder`` and start it.

    torch is as fast as it can be made: its allocator is pooled (``MALLOC_MMAP_MAX_=0``), which is
    faster than glibc's default, and MKL takes its fast path (:mod:`balora_jax.bench.mkl`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = base.folder if not weights.random else folder.parent / "model"
    if not model.exists():
        write_model(model, base, weights)
    factors: dict[str, Any] = factors_of(program, loaded)
    np.savez(folder / "factors.npz", **factors)
    for number, batch in enumerate(weights.padded):
        rows: dict[str, Any] = {k: v.reshape(-1, v.shape[-1]) for k, v in batch.items()}
        np.savez(folder / f"batch{number}.npz", **rows)
    spec = folder / "spec.json"
    settings = spec_of(program, model, folder, threads)
    settings["batches"] = [str(folder / f"batch{n}.npz") for n in range(len(weights.padded))]
    fast = settings["fast_path"] = mkl.fast_path(folder)
    spec.write_text(json.dumps(settings), encoding="utf-8")
    environment = os.environ | {"MALLOC_MMAP_MAX_": "0", "OMP_NUM_THREADS": str(threads)}
    environment |= fast
    with subprocess.Popen(
        [sys.executable, str(REFERENCE), str(spec)], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            yield TorchTrainer(process)
        finally:
            process.kill()


def write_model(folder: Path, base: Base, weights: Weights) -> None:
    """The shared weights as a folder that ``transformers`` reads."""
    from safetensors.flax import save_file

    folder.mkdir()
    (folder / "config.json").write_text((base.folder / "config.json").read_text(), encoding="utf-8")
    tensors = {}
    for rule in weight_rules(base.config):
        array = weights.frozen[rule.path]
        rows = array if rule.stacked else [array]
        for name, layer in zip(rule.names(len(array)), rows, strict=True):
            tensors[name] = layer.T if rule.transpose else layer
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def spec_of(program: TextProgram, model: Path, folder: Path, threads: int) -> dict[str, Any]:
    """What the reference reads: the settings of the step under their names."""
    config, training = program.config, program.config.training
    _check_teacher(program)
    ranks = {(module.rank, module.alpha) for module in program.adapters.modules}
    if len(ranks) > 1 or training.optimizer != "adamw" or training.lora_plus_ratio != 1.0:
        raise InputError(
            "--against torch: expected one rank for all layers and plain AdamW, got other "
            "settings. Remove rank_pattern, alpha_pattern, optimizer and lora_plus_ratio."
        )
    if config.data.packing == "rows":
        raise InputError(
            "--against torch: expected data.packing batch or none, got rows: a step takes more "
            "examples than a padding mask can express. Change it."
        )
    rank, alpha = ranks.pop()
    return {
        "model": str(model),
        "dtype": config.model.dtype,
        "device": "cuda" if platform_of(program.mesh) == "gpu" else "cpu",
        "threads": threads,
        "factors": str(folder / "factors.npz"),
        "origin": program.adapters.start.has_origin,
        "rank": rank,
        "alpha": alpha,
        "target_modules": sorted(
            {module.name.rsplit(".", 1)[-1] for module in program.adapters.modules}
        ),
        "teacher": program.objective.needs_teacher,
        "terms": {
            one.term.name: {"weight": one.weight, **dataclasses.asdict(one.term)}
            for one in program.objective.active
        },
        "learning_rate": training.learning_rate,
        "betas": [training.beta1, training.beta2],
        "epsilon": training.epsilon,
        "weight_decay": training.weight_decay,
        "clip_norm": training.clip_norm,
    }


def _check_teacher(program: TextProgram) -> None:
    """Raises InputError where the teacher is not the base, which the reference loads as one."""
    if program.objective.needs_teacher and program.taught_by_start:
        raise InputError(
            "--against torch: expected regularizers.teacher base, got start: the reference's "
            "teacher has no adapter. Leave it out."
        )


def factors_of(program: TextProgram, loaded: Loaded) -> dict[str, np.ndarray]:
    """Each layer's factors in PEFT's orientation: A [r, in], B [out, r]."""
    found = {}
    for module in program.adapters.modules:
        for side, leaf in (("A", "lora_a"), ("B", "lora_b")):
            factor = np.asarray(loaded.trainable[f"{module.path}.{leaf}"][module.layer])
            found[f"{module.name}.{side}"] = np.ascontiguousarray(factor.T)
    return found
