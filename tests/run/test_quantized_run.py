"""Runs on a base in 8 or 4 bits: the loss, the codes in memory, resuming, and the way out to PEFT."""

import sys
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from balora_jax.config import ModelConfig
from balora_jax.config_file import load_config
from balora_jax.models.quantized import bytes_of
from balora_jax.models.structure import structure
from balora_jax.pretrained.checkpoint import open_base
from balora_jax.tasks.text import run as text_run
from balora_jax.training.adapters import kernels_of
from tests.models.test_quantized import nf4_levels
from tests.run import mesh_program
from tests.run.conftest import invoke, settings
from tests.tiny_run import (
    HEADS,
    KV_HEADS,
    LAYERS,
    LINEAR,
    VOCAB_SIZE,
    checkpoint_steps,
    metrics_of,
    sums,
    write_config,
    write_model,
    write_rows,
)

pytest.importorskip("qwix")

WIDTH, INNER = 64, 128
SHAPES = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (KV_HEADS * WIDTH // HEADS, WIDTH),
    "self_attn.v_proj": (KV_HEADS * WIDTH // HEADS, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}
FEW = ("q_proj", "down_proj")
# Title → base, settings.
PISSA = {"adapter.start": "pissa"}
DORA = {"adapter.start": "lora", "adapter.method": "dora"}
RUNS = {
    "float": ("float", PISSA),
    "int8": ("float", {**PISSA, "model.quantization": "int8"}),
    "as int8": ("int8", PISSA),
    "nf4": ("float", {**PISSA, "model.quantization": "nf4"}),
    "nf4 dora": ("float", {**DORA, "model.quantization": "nf4"}),
    "as nf4 dora": ("nf4", DORA),
}
QUANTISED = [name for name in RUNS if f"as {name}" in RUNS]


def weights():
    """A checkpoint whose widths blocks of 64 divide, some weights much larger than the rest."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return (0.1 * rng.standard_t(5, shape)).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": draw(VOCAB_SIZE, WIDTH),
        "lm_head.weight": draw(VOCAB_SIZE, WIDTH),
        "model.norm.weight": 1.0 + draw(WIDTH),
    }
    for i in range(LAYERS):
        for name, shape in SHAPES.items():
            tensors[f"model.layers.{i}.{name}.weight"] = draw(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{name}.weight"] = 1.0 + draw(WIDTH)
    return tensors


def rounded(weight, kind):
    """What a weight [out, in] becomes by way of 8 or 4 bits, by hand."""
    if kind == "int8":
        scale = np.abs(weight).max(1, keepdims=True) / np.float32(127)
        return np.rint(weight / scale) * scale
    blocks = weight.reshape(len(weight), -1, 64)
    scale = np.abs(blocks).max(2, keepdims=True)
    levels = nf4_levels().astype(np.float32)
    nearest = levels[np.abs((blocks / scale)[..., None] - levels).argmin(-1)]
    stored = scale.astype(ml_dtypes.bfloat16).astype(np.float32)
    return (nearest * stored).reshape(weight.shape)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The float checkpoint, and float checkpoints that hold what its codes stand for."""
    folder = tmp_path_factory.mktemp("bases")
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER}
    write_rows(folder / "train.jsonl", sums(24, 0))
    write_rows(folder / "validation.jsonl", sums(3, 1))
    for kind in ("float", "int8", "nf4"):
        tensors = weights()
        for name, value in tensors.items():
            if kind != "float" and name.endswith("_proj.weight"):
                tensors[name] = np.ascontiguousarray(rounded(value, kind))
        write_model(folder / kind, tensors=tensors, **sizes)
    return folder


def config_file(bases, folder):
    return write_config(
        folder / "config.yaml",
        bases,
        adapter={"target_modules": list(FEW)},
        training={"max_steps": 3, "checkpoint_every": 0, "learning_rate": 0.01},
    )


@pytest.fixture(scope="module")
def runs(bases, tmp_path_factory):
    """A function from a title to the folder of its run, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("runs")
    config = config_file(bases, folder)

    @cache
    def run(title):
        base, options = RUNS[title]
        workdir = folder / title.replace(" ", "_")
        chosen = settings({"model.name_or_path": bases / base, **options})
        code, _, err = invoke("train", config, "--workdir", workdir, *chosen)
        assert code == 0, err
        return workdir

    return run


@pytest.fixture(autouse=True)
def without_curves(no_curves):
    del no_curves


@pytest.mark.parametrize("title", QUANTISED)
def test_a_run_is_that_of_the_weights_the_codes_stand_for(runs, title):
    """Teacher, start (of PiSSA the SVD, of DoRA the norms) and gradients, in every step."""
    found, expected = metrics_of(runs(title)), metrics_of(runs(f"as {title}"))
    assert [row["step"] for row in found] == [1, 2, 3]
    assert found[0]["consistency"] == 0.0
    assert expected[2]["consistency"] > 1e-4
    for name in ("loss", "task_loss", "consistency", "diversity", "spectral", "grad_norm"):
        np.testing.assert_allclose(
            [row[name] for row in found],
            [row[name] for row in expected],
            rtol=1e-3, atol=1e-5, err_msg=name,
        )  # fmt: skip
    assert found[0]["task_loss"] == pytest.approx(expected[0]["task_loss"], rel=1e-5)


@pytest.mark.parametrize(("title", "distance"), [("int8", 0.02), ("nf4", 0.2)])
def test_the_loss_is_near_that_of_the_float_run(runs, title, distance):
    found = [row["loss"] for row in metrics_of(runs(title))]
    exact = [row["loss"] for row in metrics_of(runs("float"))]
    difference = np.abs(np.subtract(found, exact))
    assert difference.max() < distance
    assert difference.min() > 1e-6  # the codes were used
    assert found[-1] < found[0]


def loaded(runs, title, **changes):
    config = load_config(runs(title) / "config.yaml", [f"{k}={v}" for k, v in changes.items()])
    run = text_run.check(config)
    return run, run.load()


@pytest.mark.parametrize(("title", "dtype"), [("int8", np.int8), ("nf4", np.uint8)])
def test_codes_are_what_memory_holds(runs, title, dtype):
    run, arrays = loaded(runs, title)
    kernels = {path: value for path, value in arrays.frozen.items() if path.endswith(".kernel")}
    assert {path.removeprefix("layers.").removesuffix(".kernel") for path in kernels} == set(LINEAR)
    assert {value.dtype for value in kernels.values()} == {np.dtype(dtype)}
    assert {p: (v.shape, v.dtype) for p, v in arrays.frozen.items()} == {
        p: (s.shape, s.dtype) for p, s in run.plain.frozen.items()
    }
    held = sum(np.asarray(value).nbytes for value in arrays.frozen.values())
    assert bytes_of(run.plain.frozen) == held
    numbers = sum(out * into for out, into in SHAPES.values()) * LAYERS
    outputs = sum(out for out, _ in SHAPES.values()) * LAYERS
    rest = 4 * (2 * VOCAB_SIZE * WIDTH + WIDTH + 2 * LAYERS * WIDTH)
    by_hand = {"int8": numbers + 4 * outputs, "nf4": numbers // 2 + numbers // 64 * 2}
    assert held == by_hand[title] + rest
    assert run.total == numbers + rest // 4


def test_a_run_goes_on_where_it_stopped(runs, bases, tmp_path):
    title = "nf4 dora"
    base, options = RUNS[title]
    chosen = {"model.name_or_path": bases / base, **options}
    command = ["train", config_file(bases, tmp_path), "--workdir", tmp_path / "run"]
    assert invoke(*command, *settings({**chosen, "training.stop_at": 2})).code == 0
    assert checkpoint_steps(tmp_path / "run") == [2]
    code, out, err = invoke(*command, "--resume", *settings(chosen))
    assert code == 0, err
    assert "resumed at step 2" in out
    assert metrics_of(tmp_path / "run") == metrics_of(runs(title))
    # What was trained on other weights may not go on.
    other = settings({**chosen, "model.quantization": "int8"})
    code, _, err = invoke(*command, "--resume", *other)
    assert code == 2
    assert "model.quantization" in err


@pytest.mark.parametrize("title", ["int8", "nf4 dora"])
def test_the_adapter_leaves_for_peft(runs, bases, title):
    """On the weights that the codes stand for PEFT computes our logits; it loads on the float base."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    ids = np.random.default_rng(1).integers(3, VOCAB_SIZE, (2, 9))

    def theirs(base):
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        with torch.no_grad():
            plain = model(torch.tensor(ids)).logits.numpy()
            model = peft.PeftModel.from_pretrained(model, runs(title) / "adapter").eval()
            return plain, model(torch.tensor(ids)).logits.numpy()

    kind = title.split()[0]
    run, arrays = loaded(runs, title, **{"adapter.start": runs(title) / "adapter"})
    forward = jax.jit(lambda parts: run.student.bind(*parts)(jnp.asarray(ids)))
    ours = np.asarray(forward(arrays))
    plain, adapted = theirs(bases / kind)
    reach = np.ptp(adapted)
    assert np.abs(adapted - plain).max() > 1e-2 * reach
    assert np.abs(ours - adapted).max() < 1e-4 * reach
    _, on_float = theirs(bases / "float")
    assert 0 < np.abs(ours - on_float).max() < (0.05 if kind == "int8" else 0.3) * reach


def test_the_merged_export_adds_to_the_float_weights(runs, bases, tmp_path):
    command = ["export", runs("int8") / "config.yaml", "--workdir", runs("int8")]
    code, _, err = invoke(*command, "--out", tmp_path / "m", "--format", "merged")
    assert code == 0, err
    before = load_file(bases / "float" / "model.safetensors")
    after = load_file(tmp_path / "m" / "model.safetensors")
    changed = {name for name, value in before.items() if not np.array_equal(value, after[name])}
    assert changed == {
        f"model.layers.{i}.{name}.weight" for i in range(LAYERS) for name in LINEAR
        if name.endswith(FEW)
    }  # fmt: skip
    assert {value.dtype for value in after.values()} == {np.dtype(np.float32)}


def test_widths_that_blocks_do_not_divide_are_refused(place):
    place.refused(
        "model.quantization: expected every layer's input width to be a multiple of 64 (the rows "
        "that share a scale of nf4), got 16 for layers.self_attn.q_proj.kernel. Use int8 or none.",
        overrides={"model.quantization": "nf4"},
    )


def test_without_qwix_nothing_is_written(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    place.refused(
        "model.quantization: expected the package qwix, which is not installed. "
        "Install balora_jax[quant].",
        overrides={"model.quantization": "int8"},
    )


def test_experts_are_held_in_codes_and_routers_are_not(tmp_path):
    """Structure and loading agree on it, expert by expert."""
    mesh_program.write_checkpoint(tmp_path / "mixtral", mesh_program.MODELS["mixtral"])
    base = open_base(str(tmp_path / "mixtral"))
    made = structure(base.config, quantization="int8")
    frozen = base.load_for(made)
    assert {p: (v.shape, v.dtype) for p, v in frozen.items()} == {
        p: (s.shape, s.dtype) for p, s in made.frozen.items()
    }
    codes = {path.split(".")[-2] for path, value in frozen.items() if value.dtype == np.int8}
    assert codes == {"q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3"}
    stored = load_file(Path(base.folder) / "model.safetensors")
    want = stored["model.layers.1.block_sparse_moe.experts.1.w2.weight"].T
    path = "layers.block_sparse_moe.experts.w2.kernel"
    scale = np.abs(want).max(axis=0) / 127
    got = np.asarray(frozen[path][5], np.float32) * np.asarray(frozen[f"{path}_scale"][5])
    np.testing.assert_allclose(got, want, atol=0.51 * scale.max())
    # The layers of an adapter's start are found in both forms.
    kernels = kernels_of(frozen, ModelConfig(name_or_path="unread", quantization="int8"))
    assert {kernels[path].dtype for path in kernels} == {np.dtype(np.float32)}
