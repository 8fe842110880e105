"""A finished run's adapter as files that peft and transformers read, with the same logits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from balora_jax.config_file import parse_config
from balora_jax.errors import InputError
from balora_jax.models.adapters import adapter_shapes, plan_adapters
from balora_jax.models.families.base import weight_rules
from balora_jax.models.starts import STARTS
from balora_jax.models.starts.stacks import start_adapters
from balora_jax.models.structure import structure
from balora_jax.models.weight_names import linear_shapes
from balora_jax.pretrained.checkpoint import open_base
from balora_jax.pretrained.export import export_run, write_adapter
from tests import tiny_run

IDS = np.random.default_rng(0).integers(3, tiny_run.VOCAB_SIZE, (3, 11))
CASES = {
    "pissa": {},
    "lora": {"use_rslora": True, "rank_pattern": {"1.mlp.up_proj": 1}},
}


class Finished:
    """A run that ended: the folder it left, and the logits of its model before any export."""

    def __init__(self, folder, start):
        self.inputs = tiny_run.write_inputs(folder / start)
        self.config = parse_config(tiny_run.config_tree(self.inputs), "test")
        self.workdir = folder / f"run-{start}"
        base = open_base(self.config.model.name_or_path)
        plain = structure(base.config)
        options = {"rank": 2, "alpha": 5.0, "target_modules": ["q_proj", "o_proj", "up_proj"]}
        modules = plan_adapters(
            linear_shapes(weight_rules(base.config), plain.frozen), **options, **CASES[start]
        )
        frozen = base.load(plain.frozen)
        adapters, origin = start_adapters(
            modules, frozen, start=STARTS[start], key=jax.random.key(0)
        )
        rng = np.random.default_rng(5)
        adapters = {
            path: value + _on_rank(path, modules, 0.3 * rng.standard_normal(value.shape))
            for path, value in adapters.items()
        }
        shapes = adapter_shapes(modules, origin=start == "pissa")
        student = structure(base.config, adapters=shapes)
        forward = jax.jit(lambda *parts: student.bind(*parts)(jnp.asarray(IDS, jnp.int32)))
        self.plain = np.asarray(forward(frozen, origin, {p: v * 0 for p, v in adapters.items()}))
        self.logits = np.asarray(forward(frozen, origin, adapters))
        self.report = write_adapter(
            self.workdir / "adapter",
            base,
            self.config.model.name_or_path,
            modules,
            adapters,
            origin,
            use_rslora=bool(CASES[start].get("use_rslora")),
        )

    def base(self, dtype=torch.float32):
        return AutoModelForCausalLM.from_pretrained(self.inputs / "model", dtype=dtype)


def _on_rank(path, modules, noise):
    """Training never moves the zero padding of a stack with mixed ranks."""
    for module in modules:
        if path == f"{module.path}.lora_a":
            noise[module.layer, :, module.rank :] = 0
        elif path == f"{module.path}.lora_b":
            noise[module.layer, module.rank :] = 0
    return noise.astype(np.float32)


@pytest.fixture(scope="module", params=CASES)
def finished(request, tmp_path_factory):
    return Finished(tmp_path_factory.mktemp("runs"), request.param)


@pytest.fixture(scope="module")
def pissa(tmp_path_factory):
    return Finished(tmp_path_factory.mktemp("pissa"), "pissa")


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits.float().numpy()


def error(got, want):
    return np.abs(got - want).max() / (want.max() - want.min())


def test_peft_loads_it_on_the_untouched_base(finished, tmp_path):
    out = tmp_path / "adapter"
    figures = export_run(finished.config, finished.workdir, out, format="peft", rank=None)
    adapted = logits(PeftModel.from_pretrained(finished.base(), out))
    assert error(adapted, finished.logits) < 1e-4
    assert error(logits(finished.base()), finished.logits) > 0.02
    stored = load_file(out / "adapter_model.safetensors")
    assert figures == {
        "folder": str(out),
        "format": "peft",
        "rank": finished.report.rank,
        "parameters": sum(tensor.size for tensor in stored.values()),
        "relative_error": 0.0,
    }
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(finished.inputs / "model")


def test_rank_doubles_for_pissa_only(finished):
    pissa = finished.workdir.name == "run-pissa"
    assert finished.report.rank == (4 if pissa else 2)
    config = json.loads((finished.workdir / "adapter" / "adapter_config.json").read_text())
    assert config["use_rslora"] is (not pissa)
    assert config["target_modules"] == ["o_proj", "q_proj", "up_proj"]


def test_transformers_loads_the_merged_model(finished, tmp_path):
    out = tmp_path / "merged"
    figures = export_run(finished.config, finished.workdir, out, format="merged", rank=None)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.float32
    assert error(logits(model), finished.logits) < 1e-4
    assert figures == {
        "folder": str(out),
        "format": "merged",
        "dtype": "float32",
        "files": 1,
        "merged_weights": 3 * tiny_run.LAYERS,
    }
    text = "1+2=3"
    ours, theirs = (AutoTokenizer.from_pretrained(f) for f in (out, finished.inputs / "model"))
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    untouched, merged = (
        load_file(f / "model.safetensors") for f in (finished.inputs / "model", out)
    )
    changed = {name for name in untouched if not np.array_equal(untouched[name], merged[name])}
    assert untouched.keys() == merged.keys()
    assert len(changed) == 3 * tiny_run.LAYERS


def test_merged_in_bfloat16(pissa, tmp_path):
    """The base's float32 stays, whatever the run computed in, unless another is asked for."""
    tree = tiny_run.config_tree(pissa.inputs, model={"dtype": "bfloat16"})
    config, out = parse_config(tree, "test"), tmp_path / "merged"
    given = {"format": "merged", "rank": None}
    kept = export_run(config, pissa.workdir, tmp_path / "kept", **given)
    assert kept["dtype"] == "float32"
    assert (
        error(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "kept")), pissa.logits) < 1e-5
    )
    figures = export_run(config, pissa.workdir, out, **given, dtype="bfloat16")
    assert figures["dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert 1e-4 < error(logits(model.float()), pissa.logits) < 0.05


def delta(folder, name, scale):
    """scale · B A of one module of an adapter folder, float64."""
    tensors = load_file(folder / "adapter_model.safetensors")
    down, up = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    return scale * np.float64(up) @ np.float64(down)


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_recompression_reports_its_error(pissa, rank, tmp_path):
    out = tmp_path / "adapter"
    figures = export_run(pissa.config, pissa.workdir, out, format="peft", rank=rank)
    assert figures["rank"] == rank
    lost = whole = 0.0
    for layer in range(tiny_run.LAYERS):
        for stem in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"):
            name = f"model.layers.{layer}.{stem}"
            full = delta(pissa.workdir / "adapter", name, 5.0 / 2)
            small = delta(out, name, 5.0 / 2)
            u, s, vt = np.linalg.svd(full, full_matrices=False)
            best = u[:, :rank] * s[:rank] @ vt[:rank]
            np.testing.assert_allclose(small, best, atol=1e-5 * s[0])
            lost += ((full - small) ** 2).sum()
            whole += (full**2).sum()
    assert figures["relative_error"] == pytest.approx(np.sqrt(lost / whole), rel=1e-3, abs=1e-6)
    assert (figures["relative_error"] > 0.05) == (rank < 4)
    # PEFT computes the same scale from the new rank and alpha.
    model = PeftModel.from_pretrained(pissa.base(), out)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == pytest.approx(5.0 / 2)
    if rank == 4:
        assert error(logits(model), pissa.logits) < 1e-4


def test_no_finished_run(pissa, tmp_path):
    with pytest.raises(InputError) as caught:
        export_run(pissa.config, tmp_path, tmp_path / "out", format="peft", rank=None)
    assert str(caught.value) == (
        f"{tmp_path}: expected the folder of a finished run with adapter/ in it, got none. "
        "Finish the run (balora train … --resume), or name its --workdir."
    )
    assert not (tmp_path / "out").exists()


def test_rank_and_merged_exclude_each_other(pissa, tmp_path):
    with pytest.raises(InputError) as caught:
        export_run(pissa.config, pissa.workdir, tmp_path / "out", format="merged", rank=2)
    assert str(caught.value) == (
        "--rank: expected --format peft or gguf, got merged. Leave one of them out."
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["peft", "merged"])
def test_output_folder_with_other_files(pissa, format, tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(InputError) as caught:
        export_run(pissa.config, pissa.workdir, tmp_path, format=format, rank=None)
    assert str(caught.value) == (
        f"{tmp_path}: expected a new or empty folder, got one with other files in it. "
        "Choose another output folder or empty this one."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_rank_below_one(pissa, tmp_path):
    with pytest.raises(InputError, match="rank: expected at least 1, got 0"):
        export_run(pissa.config, pissa.workdir, tmp_path / "out", format="peft", rank=0)
