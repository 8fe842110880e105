import json
import math

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_llama import (
    LAYERS,
    LINEAR,
    assert_close_in_range,
    float64_delta,
    logits,
    make_llama,
    merged_logits,
    random_adapters,
)

from balora_jax.errors import InputError
from balora_jax.io.lora_pairs import delta_pair
from balora_jax.io.peft_reader import read_peft
from balora_jax.io.peft_writer import export_peft

CASES = {
    "plain": {},
    "all-linear": {"targets": tuple(LINEAR)},
    "rank-pattern": {"rank_of": lambda name, layer: 2 if layer == 1 else 4},
    "alpha-pattern": {"alpha_of": lambda name, layer: 9.5 if layer == 11 else 3.0},
    "both-patterns": {
        "rank_of": lambda name, layer: {1: 2, 11: 3}.get(layer, 5),
        "alpha_of": lambda name, layer: {1: 7.0, 10: 1.5}.get(layer, 4.0),
    },
    "some-layers": {"layers": (1, 11)},
    "rslora": {"rslora": True, "rank_of": lambda name, layer: 3 if layer == 1 else 4},
}


def export(folder, adapted, **options):
    return export_peft(
        folder,
        modules=adapted.modules,
        adapters=adapted.adapters,
        origin=adapted.origin,
        base_name="someone/base",
        **options,
    )


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def peft_logits(folder):
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(make_llama(), str(folder)).eval())


@pytest.mark.parametrize("origin", [False, True], ids=["zero-start", "origin"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("error:.*missing adapter keys:UserWarning")
def test_peft_on_the_untouched_base_computes_the_merged_weights(tmp_path, case, origin):
    adapted = random_adapters(**CASES[case], origin=origin)
    folder = tmp_path / "adapter"
    report = export(folder, adapted, use_rslora=CASES[case].get("rslora", False))
    expected = merged_logits(adapted)
    assert_close_in_range(peft_logits(folder), expected)
    # The update is large enough for the comparison to mean something.
    assert np.abs(expected - logits(make_llama())).max() > 1e-2 * np.ptp(expected)
    assert report.modules == len(adapted.modules)
    sizes = [value.size for value in load_file(folder / "adapter_model.safetensors").values()]
    true = sum(m.rank * (m.in_features + m.out_features) for m in adapted.modules)
    assert report.parameters == sum(sizes) == true * (2 if origin else 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]


def test_config_is_uniform_where_all_agree_and_exact_where_not(tmp_path):
    export(tmp_path / "a", random_adapters())
    config = config_of(tmp_path / "a")
    assert (config["r"], config["lora_alpha"]) == (4, 6)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["target_modules"] == ["down_proj", "q_proj"]
    assert config["base_model_name_or_path"] == "someone/base"

    export(tmp_path / "b", random_adapters(**CASES["both-patterns"]))
    config = config_of(tmp_path / "b")
    assert config["r"] == 5
    assert config["rank_pattern"]["model.layers.1.self_attn.q_proj"] == 2
    assert len(config["rank_pattern"]) == len(config["alpha_pattern"]) == 4

    export(tmp_path / "c", random_adapters(**CASES["some-layers"]))
    assert config_of(tmp_path / "c")["target_modules"] == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.11.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.11.mlp.down_proj",
    ]


def test_suffixes_are_used_only_if_they_name_the_same_layers_of_the_base(tmp_path):
    adapted = random_adapters(targets=("self_attn.q_proj",))
    names = [module.name for module in adapted.modules]
    export(tmp_path / "a", adapted, base_modules=[*names, "lm_head"])
    assert config_of(tmp_path / "a")["target_modules"] == ["q_proj"]
    export(tmp_path / "b", adapted, base_modules=[*names, "vision.q_proj"])
    assert config_of(tmp_path / "b")["target_modules"] == names


def test_rslora_is_kept_for_zero_starts_and_folded_into_alpha_otherwise(tmp_path):
    plain = random_adapters(rslora=True)
    export(tmp_path / "plain", plain, use_rslora=True)
    config = config_of(tmp_path / "plain")
    assert (config["use_rslora"], config["r"], config["lora_alpha"]) == (True, 4, 6)
    moved = random_adapters(rslora=True, origin=True)
    export(tmp_path / "moved", moved, use_rslora=True)
    config = config_of(tmp_path / "moved")
    assert (config["use_rslora"], config["r"]) == (False, 8)
    assert config["lora_alpha"] == pytest.approx(6 / math.sqrt(4) * 8, rel=1e-12)


def test_delta_of_an_origin_keeps_tiny_updates():
    adapted = random_adapters(targets=("self_attn.q_proj",), layers=(0,), origin=True)
    for key in "ab":
        start = adapted.origin[f"layers.self_attn.q_proj.origin_{key}"]
        moved = (start * np.float32(1 + 1e-5)).astype(np.float32)
        adapted.adapters[f"layers.self_attn.q_proj.lora_{key}"] = moved
    module = adapted.modules[0]
    down, up = delta_pair(module, adapted.adapters, adapted.origin)
    assert down.dtype == up.dtype == np.float32
    exact = float64_delta(adapted, module).T
    ours = module.scale * (down @ up)
    a, b = (adapted.adapters[f"layers.self_attn.q_proj.lora_{k}"][0] for k in "ab")
    a0, b0 = (adapted.origin[f"layers.self_attn.q_proj.origin_{k}"][0] for k in "ab")
    cancelled = module.scale * (np.hstack([a, a0]) @ np.vstack([b, -b0]))
    assert np.abs(ours - exact).max() < 1e-5 * np.abs(exact).max()
    assert np.abs(cancelled - exact).max() > 1e-3 * np.abs(exact).max()


@pytest.mark.parametrize("origin", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_recompression_is_numpys_best_of_that_rank(tmp_path, rank, origin):
    adapted = random_adapters(origin=origin, rank_of=lambda n, layer: 2 if layer == 1 else 5)
    report = export(tmp_path / "a", adapted, rank=rank)
    best, lost, whole = {}, 0.0, 0.0
    for module in adapted.modules:
        delta = float64_delta(adapted, module)
        u, s, vt = np.linalg.svd(delta, full_matrices=False)
        best[module.name] = (u[:, :rank] * s[:rank]) @ vt[:rank]
        lost += np.sum(s[rank:] ** 2)
        whole += np.sum(s**2)
        error = math.sqrt(np.sum(s[rank:] ** 2) / np.sum(s**2))
        assert report.errors[module.name] == pytest.approx(error, rel=1e-4, abs=2e-6)
    assert report.error == pytest.approx(math.sqrt(lost / whole), rel=1e-4, abs=2e-6)
    assert report.rank == min(rank, 10 if origin else 5)
    assert_close_in_range(peft_logits(tmp_path / "a"), merged_logits(adapted, best))


def test_recompressing_nothing_loses_nothing(tmp_path):
    adapted = random_adapters()
    for value in adapted.adapters.values():
        value[...] = 0
    report = export(tmp_path / "a", adapted, rank=2)
    assert report.error == 0.0
    assert set(report.errors.values()) == {0.0}
    assert export(tmp_path / "b", adapted).errors == {}


def test_export_refuses_what_it_would_overwrite(tmp_path):
    adapted, folder = random_adapters(), tmp_path / "a"
    folder.mkdir()
    export(folder, adapted)  # an empty folder is fine
    before = (folder / "adapter_model.safetensors").read_bytes()
    with pytest.raises(InputError, match="expected a new or empty folder"):
        export(folder, adapted)
    export(folder, random_adapters(seed=1), overwrite=True)
    assert (folder / "adapter_model.safetensors").read_bytes() != before
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="expected a new or empty folder"):
        export(folder, adapted, overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"
    with pytest.raises(InputError, match="expected a folder to write to, got a file"):
        export(folder / "notes.txt", adapted)
    with pytest.raises(InputError, match="expected a folder that can be written"):
        export(folder / "notes.txt" / "a", adapted)


def test_a_failed_export_leaves_nothing(tmp_path):
    adapted = random_adapters()
    del adapted.adapters["layers.mlp.down_proj.lora_b"]
    with pytest.raises(KeyError):
        export(tmp_path / "a", adapted)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_export_or_no_rank(tmp_path):
    adapted = random_adapters()
    with pytest.raises(InputError, match="rank: expected at least 1, got 0"):
        export(tmp_path / "a", adapted, rank=0)
    adapted.modules = []
    with pytest.raises(InputError, match="expected adapted layers to export, got none"):
        export(tmp_path / "a", adapted)


def save_with_peft(folder, **settings):
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]} | settings
    model = get_peft_model(make_llama(), LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, r"layers\.\d+\.mlp.down_proj": 3},
            "alpha_pattern": {"^model.layers.1[01].*q_proj": 9},
        },
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_reads_what_peft_saved(tmp_path, settings):
    model = save_with_peft(tmp_path, **settings)
    read = read_peft(tmp_path)
    assert len(read.tensors) == 2 * LAYERS
    for name, (down, up) in read.tensors.items():
        layer = model.get_submodule(f"base_model.model.{name}")
        assert down.dtype == up.dtype == np.float32
        assert read.ranks[name] == layer.r["default"] == down.shape[1]
        assert read.alphas[name] == layer.lora_alpha["default"]
        assert read.scales[name] == pytest.approx(layer.scaling["default"], rel=1e-12)
        delta = layer.get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(read.scales[name] * (down @ up).T, delta, atol=1e-5)


def test_reads_what_we_exported(tmp_path):
    adapted = random_adapters(**CASES["both-patterns"], origin=True)
    export(tmp_path / "a", adapted)
    read = read_peft(tmp_path / "a")
    assert set(read.tensors) == {module.name for module in adapted.modules}
    for module in adapted.modules:
        down, up = read.tensors[module.name]
        assert read.ranks[module.name] == 2 * module.rank
        delta = read.scales[module.name] * (down @ up).T
        np.testing.assert_allclose(delta, float64_delta(adapted, module), atol=1e-5)


def change(folder, **settings):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "expected peft_type LORA, got 'IA3'"),
        ({"use_dora": True}, r"and lora_magnitude_vector \[out\] for model.layers.0.mlp.down_proj"),
        ({"bias": "all"}, "expected plain LoRA, got bias='all'"),
        ({"lora_bias": True}, "got lora_bias=True"),
        ({"layer_replication": [[0, 2]]}, "got layer_replication"),
        ({"trainable_token_indices": [3]}, "different ids with a row each"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which belongs to a modified"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "modified base"),
        ({"r": 5}, "expected rank 5 for model.layers.0.mlp.down_proj as adapter_config.json says"),
        ({"lora_alpha": "six"}, "expected lora_alpha to be a number of at least .*, got 'six'"),
        (
            {"lora_alpha": float("nan")},
            "expected lora_alpha to be a number of at least .*, got nan",
        ),
        ({"r": 0}, "expected r to be a whole number from 1 to"),
        ({"r": True}, "expected r to be a whole number from 1 to"),
        ({"rank_pattern": 7}, "expected rank_pattern to be an object, got 7"),
        (
            {"rank_pattern": {"q_proj": 0}},
            "expected rank_pattern to be an object of a whole number of at least 1",
        ),
        ({"alpha_pattern": {"q_proj": "x"}}, "expected alpha_pattern to be an object of a number"),
        ({"modules_to_save": 7}, "expected modules_to_save to be a list of names, got 7"),
        ({"modules_to_save": "abc"}, "expected modules_to_save to be a list of names, got 'abc'"),
        ({"use_dora": "no"}, "expected use_dora to be true or false, got 'no'"),
        ({"use_rslora": 1}, "expected use_rslora to be true or false, got 1"),
        ({"rank_pattern": {r"(.|[a-z]|\w)+[0-9]\1": 3}}, "that comes to an end, got"),
        ({"rank_pattern": {"(": 3}}, r"rank_pattern: expected a regular expression, got '\('"),
    ],
)
def test_settings_that_change_the_maths_are_refused(tmp_path, settings, message):
    export(tmp_path / "a", random_adapters())
    change(tmp_path / "a", **settings)
    with pytest.raises(InputError, match=message):
        read_peft(tmp_path / "a")


def test_what_peft_itself_saves_of_pissa_is_refused_until_converted(tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, init_lora_weights="pissa",
        target_modules=["q_proj"],
    )  # fmt: skip
    model = get_peft_model(make_llama(), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.03 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "raw")
    with pytest.raises(InputError, match="got init_lora_weights='pissa'"):
        read_peft(tmp_path / "raw")
    model.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    read = read_peft(tmp_path / "converted")
    name = "model.layers.5.self_attn.q_proj"
    down, up = read.tensors[name]
    tuned = model.merge_and_unload().get_submodule(name).weight.detach().numpy()
    base = make_llama().get_submodule(name).weight.detach().numpy()
    np.testing.assert_allclose(read.scales[name] * (down @ up).T, tuned - base, atol=1e-5)


def test_folders_that_are_no_adapter(tmp_path):
    with pytest.raises(InputError, match="expected a PEFT adapter folder with adapter_config"):
        read_peft(tmp_path / "absent")
    folder = tmp_path / "a"
    export(folder, random_adapters())
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(InputError, match="expected a complete safetensors file"):
        read_peft(folder)
    weights.unlink()
    with pytest.raises(InputError, match="got no weights"):
        read_peft(folder)
    (folder / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"only adapter_model\.bin\. .*safe_serialization=True"):
        read_peft(folder)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    export(tmp_path / "a", random_adapters())
    file = tmp_path / "a" / "adapter_model.safetensors"
    good = load_file(file)
    name = "base_model.model.model.layers.0.self_attn.q_proj"

    def refused(change, message):
        tensors = dict(good)
        change(tensors)
        save_file(tensors, file)
        with pytest.raises(InputError, match=message):
            read_peft(tmp_path / "a")

    extra = {f"{name}.lora_magnitude_vector": np.ones(3, np.float32)}
    refused(lambda t: t.update(extra), r"got .*'lora_magnitude_vector': \[3\]")
    refused(lambda t: t.update({"base_model.model.score.weight": good[f"{name}.lora_A.weight"]}),
            r"linear layers only, got .*score\.weight")  # fmt: skip
    whole = {f"{name}.lora_A.weight": np.ones((4, 32), np.int32)}
    refused(lambda t: t.update(whole), "expected floating-point")
    refused(lambda t: t.clear(), "got no tensors")
    refused(lambda t: t.pop(f"{name}.lora_B.weight"), r"for model.layers.0.self_attn.q_proj, got")
    narrow = {f"{name}.lora_B.weight": np.ones((32, 3), np.float32)}
    refused(lambda t: t.update(narrow), r"expected lora_A \[r, in\] and lora_B \[out, r\]")
