import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_llama import (
    LAYERS,
    assert_close_in_range,
    float64_delta,
    logits,
    make_llama,
    merged_logits,
    random_adapters,
)

from balora_jax.errors import InputError
from balora_jax.io import hf_export
from balora_jax.io.hf_export import export_merged, merged_delta, module_deltas


def deltas_of(adapted):
    return module_deltas(adapted.modules, adapted.adapters, adapted.origin)


def load(folder, **options):
    from transformers import LlamaForCausalLM

    model, report = LlamaForCausalLM.from_pretrained(
        folder, output_loading_info=True, use_safetensors=True, **options
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("origin", [False, True])
@pytest.mark.parametrize("shard_bytes", [10**9, 60_000])
def test_transformers_loads_the_merged_model(
    llama_folder, tmp_path, monkeypatch, origin, shard_bytes
):
    monkeypatch.setattr(hf_export, "MAX_SHARD_BYTES", shard_bytes)
    adapted = random_adapters(origin=origin, rank_of=lambda name, layer: 2 if layer == 1 else 4)
    folder = tmp_path / "merged"
    report = export_merged(
        folder,
        source=llama_folder,
        deltas=deltas_of(adapted),
        dtype="float32",
    )
    assert_close_in_range(logits(load(folder)), merged_logits(adapted))
    assert report.merged == len(adapted.modules)
    assert report.tensors == 3 + 9 * LAYERS
    weights = list(folder.glob("*.safetensors"))
    assert len(weights) == report.files
    assert (report.files == 1) == (shard_bytes == 10**9)
    sizes = [sum(v.nbytes for v in load_file(file).values()) for file in weights]
    assert sum(sizes) == report.total_bytes
    assert max(sizes) <= shard_bytes
    assert (folder / "tokenizer.json").exists()
    assert (folder / "generation_config.json").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merged"]


def test_unadapted_tensors_are_the_same_bytes(llama_folder, tmp_path):
    adapted = random_adapters(layers=(1,))
    export_merged(tmp_path / "m", source=llama_folder, deltas=deltas_of(adapted), dtype="float32")
    before = load_file(llama_folder / "model.safetensors")
    after = load_file(tmp_path / "m" / "model.safetensors")
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert list(before) == list(after) or set(before) == set(after)
    assert changed == {f"{module.name}.weight" for module in adapted.modules}


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_delta_is_added_in_float32_and_rounded_once(tmp_path, stored, dtype):
    import torch

    source = tmp_path / "source"
    make_llama(stored).save_pretrained(source, max_shard_size="60KB")
    adapted = random_adapters()
    export_merged(tmp_path / "m", source=source, deltas=deltas_of(adapted), dtype=dtype)
    model = load(tmp_path / "m", dtype="auto")
    assert model.dtype == getattr(torch, dtype)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["dtype"] == dtype
    base = make_llama(stored)
    for module in adapted.modules:
        weight = base.get_submodule(module.name).weight.detach().float().numpy()
        # The delta itself is float32, so a tie may round the other way: one unit at most.
        exact = (weight.astype(np.float64) + float64_delta(adapted, module)).astype(np.float32)
        merged = model.get_submodule(module.name).weight.detach().float().numpy()
        unit = {"float32": 2**-22, "bfloat16": 2**-8, "float16": 2**-10}[dtype]
        np.testing.assert_allclose(merged, exact, rtol=unit, atol=1e-6)
        rounded = exact.astype(getattr(ml_dtypes, dtype, dtype)).astype(np.float32)
        assert dtype == "float32" or np.mean(merged == rounded) > 0.99
    norm = model.get_submodule("model.norm").weight.detach()
    assert torch.equal(norm, base.get_submodule("model.norm").weight.to(norm.dtype))


def test_code_and_pickles_stay_behind_and_integers_stay_whole(llama_folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(llama_folder, source)
    state = load_file(source / "model.safetensors") | {"positions": np.arange(5)}
    save_file(state, source / "model.safetensors")
    for name in ("pytorch_model.bin", "modeling_x.py", "tokenizer_config.json"):
        (source / name).write_text("{}")
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_x.X"}
    del config["dtype"]
    config["torch_dtype"] = "float32"
    (source / "config.json").write_text(json.dumps(config))
    adapted = random_adapters()
    export_merged(tmp_path / "m", source=source, deltas=deltas_of(adapted), dtype="bfloat16")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    written = load_file(tmp_path / "m" / "model.safetensors")
    np.testing.assert_array_equal(written["positions"], np.arange(5))
    assert written["positions"].dtype == np.int64
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert "auto_map" not in config


KEPT = (
    "tokenizer.model", "tokenizer.model.v3", "tokenizer.model.v7m1", "tekken.json", "spm.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "additional_chat_templates/tool_use.jinja",
    "chat_templates/a.jinja", "added_tokens.json", "preprocessor_config.json", "LICENSE", "NOTICE.txt",
)  # fmt: skip
LEFT = (
    "tokenizer.model.py", "tokenizer.model.v3.py", "tokenization_x.py", "additional_chat_templates/x.py",
    "additional_chat_templates/deep/x.jinja", "README.md", "training_args.bin", "optimizer.pt",
)  # fmt: skip


def test_all_of_a_tokenizer_is_kept_and_nothing_else(llama_folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(llama_folder, source)
    for name in KEPT + LEFT:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    options = {"source": source, "deltas": deltas_of(random_adapters()), "dtype": None}
    beside = {"chat_template.jinja": b"the run's"}
    for _ in range(2):  # a second time over its own
        export_merged(tmp_path / "m", **options, beside=beside, overwrite=True)
    found = {str(f.relative_to(tmp_path / "m")) for f in (tmp_path / "m").rglob("*") if f.is_file()}
    own = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert found == {*KEPT, *own}
    assert (tmp_path / "m" / "additional_chat_templates" / "tool_use.jinja").read_text() == KEPT[7]
    assert (tmp_path / "m" / "chat_template.jinja").read_text() == "the run's"
    (tmp_path / "m" / "additional_chat_templates" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="got one with other files in it"):
        export_merged(tmp_path / "m", **options, overwrite=True)


def test_each_tensor_keeps_the_dtype_of_the_base_and_the_config_says_it(llama_folder, tmp_path):
    """A base in bfloat16 with norms in float32, whose config says something else."""
    source = tmp_path / "source"
    shutil.copytree(llama_folder, source)
    state = load_file(source / "model.safetensors")
    stored = {n: v if "norm" in n else v.astype(ml_dtypes.bfloat16) for n, v in state.items()}
    stored["model.norm.weight"] = stored["model.norm.weight"].astype(np.float64)
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    quantized = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    inner = {"dtype": "float32", "torch_dtype": "float32", "quantization_config": quantized}
    config |= {"dtype": "float16", "quantization_config": quantized, "text_config": inner}
    (source / "config.json").write_text(json.dumps(config))
    head = np.full(state["lm_head.weight"].shape, 1 / 3, np.float32)
    report = export_merged(
        tmp_path / "m", source=source, deltas=deltas_of(random_adapters()), dtype=None,
        added={"lm_head.weight": head},
    )  # fmt: skip
    written = load_file(tmp_path / "m" / "model.safetensors")
    for name, value in written.items():
        assert value.dtype == (np.float32 if "norm" in name else ml_dtypes.bfloat16), name
    assert (written["lm_head.weight"] == head.astype(ml_dtypes.bfloat16)).all()
    assert report.dtype == "bfloat16"
    said = json.loads((tmp_path / "m" / "config.json").read_text())
    assert said["dtype"] == "bfloat16"
    assert said["text_config"] == {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    assert "quantization_config" not in said


def test_merged_delta_is_the_definition():
    adapted = random_adapters(origin=True, rank_of=lambda name, layer: 2 if layer == 1 else 4)
    for module in adapted.modules[:3]:
        delta = merged_delta(module, adapted.adapters, adapted.origin)
        assert delta.dtype == np.float32
        assert delta.shape == (module.out_features, module.in_features)
        np.testing.assert_allclose(delta, float64_delta(adapted, module), atol=1e-6)


def test_refusals_write_nothing(llama_folder, tmp_path):
    adapted = random_adapters()
    options = {"source": llama_folder, "deltas": deltas_of(adapted), "dtype": "float32"}
    with pytest.raises(InputError, match="dtype: expected one of float32, bfloat16, float16, got"):
        export_merged(tmp_path / "m", **options | {"dtype": "int4"})
    with pytest.raises(InputError, match="expected the weights that were adapted, got none"):
        export_merged(tmp_path / "m", **options | {"deltas": lambda name, value: None})
    with pytest.raises(ValueError, match=r"new value is \(1, 1\), weight is \(32, 32\)"):
        export_merged(
            tmp_path / "m",
            **options
            | {
                "deltas": lambda name, value: (
                    np.ones((1, 1)) if name.endswith("q_proj.weight") else None
                )
            },
        )
    other = deltas_of(random_adapters(targets=("mlp.down_proj",)))
    with pytest.raises(ValueError, match=r"down_proj: delta is \(32, 48\), weight is \(48, 32\)"):
        other("model.layers.0.mlp.down_proj.weight", np.ones((48, 32)))
    assert list(tmp_path.iterdir()) == []
    quantised = tmp_path / "q"
    shutil.copytree(llama_folder, quantised)
    state = {"x": np.ones(3, ml_dtypes.float8_e4m3fn)}
    save_file(state, quantised / "model.safetensors")
    with pytest.raises(InputError, match=r"got x is F8_E4M3\. Merge into the unquantised"):
        export_merged(tmp_path / "m", **options | {"source": quantised})
    with pytest.raises(InputError, match="expected a new or empty folder"):
        export_merged(quantised, **options)
    assert not (tmp_path / "m").exists()
