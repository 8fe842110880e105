"""DoRA, LoRA-FA, every start and whole trained modules: to PEFT and back, and merged."""

import json
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from tiny_llama import assert_close_in_range
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from balora_jax.errors import InputError
from balora_jax.io.hf_export import export_merged, merged_weight, module_deltas
from balora_jax.io.peft_reader import read_peft
from balora_jax.io.peft_writer import export_peft
from balora_jax.models.adapters import AdaptedModule, LinearShape, adapter_shapes, plan_adapters
from balora_jax.models.methods import METHODS
from balora_jax.models.starts import STARTS
from balora_jax.models.starts.stacks import start_adapters, start_from_factors
from balora_jax.models.structure import structure
from balora_jax.pretrained.load import load_pretrained

KINDS = ["lora", "dora", "lora_fa"]
NAMES = ["lora", "pissa", "milora", "olora", "orthogonal"]
LINEAR = {"self_attn.q_proj": (16, 16), "self_attn.v_proj": (16, 8), "mlp.down_proj": (24, 16)}
IDS = np.random.default_rng(1).integers(0, 40, (2, 7))


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def make_llama():
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return randomised(LlamaForCausalLM(config))


def torch_logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits.float().numpy()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_llama().save_pretrained(folder)
    return folder, load_pretrained(str(folder))


def plan(method, rslora=False):
    linears = [
        LinearShape(f"layers.{n}", tuple(f"model.layers.{i}.{n}" for i in range(2)), *shape)
        for n, shape in LINEAR.items()
    ]
    return plan_adapters(
        linears, rank=4, alpha=6.0, use_rslora=rslora, method=METHODS[method],
        target_modules=["q_proj", "v_proj", "1.mlp.down_proj"],
        rank_pattern={"1.self_attn.q_proj": 2},
    )  # fmt: skip


def trained(base, method, start, rslora=False):
    """Adapters that have moved away from their start, as host arrays."""
    modules = plan(method, rslora)
    adapters, origin = start_adapters(
        modules, base[1].parts[0], start=STARTS[start], key=jax.random.key(2)
    )
    rng = np.random.default_rng(7)
    moved = {path: np.array(value) for path, value in adapters.items()}
    for module in modules:
        for leaf, part in (
            ("lora_a", (..., slice(module.rank))),
            ("lora_b", slice(module.rank)),
            ("lora_magnitude", ...),
        ):
            if f"{module.path}.{leaf}" in moved:
                one = moved[f"{module.path}.{leaf}"][module.layer]
                one[part] += 0.2 * rng.standard_normal(one[part].shape)
    return modules, moved, {path: np.asarray(value) for path, value in origin.items()}


@cache
def forward(config, method, origin):
    shapes = adapter_shapes(plan(method), origin=origin)
    skeleton = structure(config, adapters=shapes)
    return jax.jit(lambda parts: skeleton.bind(*parts)(jnp.asarray(IDS)))


def our_logits(base, method, origin, adapters, *, starts_at_zero):
    apply = forward(base[1].config, method, not starts_at_zero)
    return np.asarray(apply((base[1].parts[0], origin, adapters)))


def export(folder, modules, adapters, origin, **options):
    return export_peft(
        folder, modules=modules, adapters=adapters, origin=origin, base_name="x/y", **options
    )


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
@pytest.mark.parametrize("start", NAMES)
@pytest.mark.parametrize("method", KINDS)
@pytest.mark.filterwarnings("error:.*missing adapter keys:UserWarning")
def test_peft_computes_our_logits(base, tmp_path, method, start, rslora):
    modules, adapters, origin = trained(base, method, start, rslora)
    report = export(tmp_path / "a", modules, adapters, origin, use_rslora=rslora)
    ours = our_logits(base, method, origin, adapters, starts_at_zero=start == "lora")
    theirs = torch_logits(PeftModel.from_pretrained(make_llama(), str(tmp_path / "a")))
    assert_close_in_range(ours, theirs)
    assert np.abs(theirs - torch_logits(make_llama())).max() > 1e-2 * np.ptp(theirs)
    config = config_of(tmp_path / "a")
    assert config["use_dora"] == (method == "dora")
    doubled = STARTS[start].has_origin and method != "lora_fa"
    assert (config["r"], config["use_rslora"]) == (8 if doubled else 4, rslora and not doubled)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert report.parameters == sum(value.size for value in tensors.values())
    assert sum("lora_magnitude_vector" in n for n in tensors) == 5 * (method == "dora")


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
@pytest.mark.parametrize("start", ["lora", "pissa"])
def test_a_server_with_one_factor_for_all_modules(tmp_path, start, rslora, rank):
    """vLLM takes alpha / r (or alpha / sqrt(r)) of the config for every module, and no patterns."""
    linears = [
        LinearShape(f"layers.{n}", tuple(f"model.layers.{i}.{n}" for i in range(2)), *shape)
        for n, shape in LINEAR.items()
    ]
    modules = plan_adapters(
        linears, rank=4, alpha=6.0, use_rslora=rslora, method=METHODS["lora"],
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"1.self_attn.q_proj": 2}, alpha_pattern={"v_proj": 24.0, "down_proj": 1.0},
    )  # fmt: skip
    rng = np.random.default_rng(3)
    adapters, origin, wanted = {}, {}, {}
    for name, (d_in, d_out) in LINEAR.items():
        shapes = {"a": (2, d_in, 4), "b": (2, 4, d_out)}
        for side, shape in shapes.items():
            adapters[f"layers.{name}.lora_{side}"] = rng.standard_normal(shape).astype(np.float32)
            if start == "pissa":
                near = adapters[f"layers.{name}.lora_{side}"] + 0.1 * rng.standard_normal(shape)
                origin[f"layers.{name}.origin_{side}"] = near.astype(np.float32)
    for module in modules:
        factors = []
        for arrays, kind in ((adapters, "lora"), (origin, "origin")):
            if arrays:
                a = arrays[f"{module.path}.{kind}_a"][module.layer][:, : module.rank]
                factors.append(a.astype(np.float64) @ arrays[f"{module.path}.{kind}_b"][
                    module.layer][: module.rank])  # fmt: skip
        alpha = {"v_proj": 24.0, "down_proj": 1.0}.get(module.name.rpartition(".")[2], 6.0)
        scale = alpha / (module.rank**0.5 if rslora else module.rank)
        wanted[module.name] = scale * (factors[0] - (factors[1] if origin else 0))
    export(tmp_path / "a", modules, adapters, origin, use_rslora=rslora, rank=rank)
    config, tensors = (
        config_of(tmp_path / "a"),
        load_file(tmp_path / "a" / "adapter_model.safetensors"),
    )
    one = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    again = read_peft(tmp_path / "a")
    for name, delta in wanted.items():
        a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        served = one * (b.astype(np.float64) @ a).T
        if rank is None:
            assert np.abs(served - delta).max() < 1e-5 * np.abs(delta).max()
        elif len(a) <= rank:
            assert np.linalg.norm(served - delta, 2) <= 1.001 * np.linalg.svd(
                delta, compute_uv=False)[rank:][:1].sum() + 1e-5 * np.abs(delta).max()  # fmt: skip
        # PEFT's rule, by the patterns, is the same.
        assert again.scales[name] == pytest.approx(one)


@pytest.mark.parametrize("start", ["lora", "pissa"])
@pytest.mark.parametrize("method", KINDS)
def test_round_trip_through_peft(base, tmp_path, method, start):
    modules, adapters, origin = trained(base, method, start)
    export(tmp_path / "a", modules, adapters, origin)
    model = PeftModel.from_pretrained(make_llama(), str(tmp_path / "a"))
    model.save_pretrained(tmp_path / "b", save_embedding_layers=False)  # "auto" asks the Hub
    first, again = read_peft(tmp_path / "a"), read_peft(tmp_path / "b")
    for name, factors in first.tensors.items():
        for got, want in zip(again.tensors[name], factors, strict=True):
            assert np.array_equal(got, want)
    assert again.scales == pytest.approx(first.scales)
    assert set(again.magnitudes) == (set(first.tensors) if method == "dora" else set())
    kind = METHODS["dora" if method == "dora" else "lora"]
    back = [
        replace(m, method=kind, rank=again.ranks[m.name], scale=again.scales[m.name])
        for m in modules
    ]
    frozen = base[1].parts[0]
    ours = our_logits(base, method, origin, adapters, starts_at_zero=start == "lora")
    loaded, constants = start_from_factors(back, frozen, again.tensors, again.magnitudes)
    skeleton = structure(base[1].config, adapters=adapter_shapes(back, origin=False))
    got = skeleton.bind(frozen, constants, loaded)(jnp.asarray(IDS))
    assert_close_in_range(np.asarray(got), ours)


def definition(module, adapters, origin, delta=None):
    """The tuned weight [out, in] in float64."""

    def part(arrays, leaf):
        return arrays[f"{module.path}.{leaf}"][module.layer].astype(np.float64)

    if delta is None:
        delta = part(adapters, "lora_a") @ part(adapters, "lora_b")
        if f"{module.path}.origin_a" in origin:
            delta = delta - part(origin, "origin_a") @ part(origin, "origin_b")
    weight = make_llama().get_submodule(module.name).weight.detach().numpy().astype(np.float64).T
    weight = weight + module.scale * delta
    if module.method.name == "dora":
        weight = weight * part(adapters, "lora_magnitude") / np.linalg.norm(weight, axis=0)
    return weight.T


@pytest.mark.parametrize("start", ["lora", "pissa"])
def test_merged_dora_loads_in_transformers(base, tmp_path, start):
    modules, adapters, origin = trained(base, "dora", start)
    deltas = module_deltas(modules, adapters, origin)
    report = export_merged(tmp_path / "m", source=base[0], deltas=deltas, dtype="float32")
    assert report.merged == 5
    model = LlamaForCausalLM.from_pretrained(tmp_path / "m")
    ours = our_logits(base, "dora", origin, adapters, starts_at_zero=start == "lora")
    assert_close_in_range(torch_logits(model), ours)
    for module in modules:
        weight = model.get_submodule(module.name).weight.detach().numpy()
        want = definition(module, adapters, origin)
        np.testing.assert_allclose(weight, want, atol=1e-5 * np.abs(want).max())


def test_merging_keeps_an_output_of_zeros():
    module = AdaptedModule("fc", "fc", 0, 1, 1.0, 1.0, 3, 2, METHODS["dora"])
    adapters = {
        "fc.lora_a": np.zeros((1, 3, 1)),
        "fc.lora_b": np.zeros((1, 1, 2)),
        "fc.lora_magnitude": np.full((1, 2), 4.0),
    }
    merged = merged_weight(module, adapters, {}, np.array([[0, 0, 0], [0, 0, 2.0]]))
    assert merged.tolist() == [[0, 0, 0], [0, 0, 4.0]]


@pytest.mark.parametrize("start", ["lora", "olora"])
def test_recompression_of_dora_keeps_the_magnitude(base, tmp_path, start):
    modules, adapters, origin = trained(base, "dora", start)
    report = export(tmp_path / "a", modules, adapters, origin, rank=2)
    model = make_llama()
    for module in modules:
        plain = replace(module, method=METHODS["lora"])
        weight = model.get_submodule(module.name).weight
        base_weight = weight.detach().numpy().astype(np.float64)
        delta = (definition(plain, adapters, origin) - base_weight) / module.scale
        u, s, vt = np.linalg.svd(delta)
        best = (u[:, :2] * s[:2] @ vt[:2]).T
        tuned = definition(module, adapters, origin, best)
        with torch.no_grad():
            weight.copy_(torch.tensor(tuned))
        error = np.sqrt(np.sum(s[2:] ** 2) / np.sum(s**2))
        assert report.errors[module.name] == pytest.approx(error, rel=1e-3, abs=1e-5)
    assert report.error > 0.05
    theirs = torch_logits(PeftModel.from_pretrained(make_llama(), str(tmp_path / "a")))
    assert_close_in_range(theirs, torch_logits(model))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_weights_stored_in_by_out(tmp_path, dora):
    """GPT-2's Conv1D: fan_in_fan_out for PEFT, transposed for the merged checkpoint."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    gpt2 = randomised(GPT2LMHeadModel(config))
    gpt2.save_pretrained(tmp_path / "base")
    rng = np.random.default_rng(3)
    names = [f"transformer.h.{i}.attn.c_attn" for i in range(2)]
    modules = [
        AdaptedModule(name, "c_attn", i, 2, 3.0, 1.5, 16, 48, METHODS["dora" if dora else "lora"])
        for i, name in enumerate(names)
    ]
    adapters = {
        "c_attn.lora_a": 0.3 * rng.standard_normal((2, 16, 2)).astype(np.float32),
        "c_attn.lora_b": 0.3 * rng.standard_normal((2, 2, 48)).astype(np.float32),
        "c_attn.lora_magnitude": 1 + rng.random((2, 48)).astype(np.float32),
    }
    export(tmp_path / "a", modules, adapters, {}, fan_in_fan_out=True)
    deltas = module_deltas(modules, adapters, {}, transposed=set(names))
    export_merged(tmp_path / "m", source=tmp_path / "base", deltas=deltas, dtype="float32")
    read = read_peft(tmp_path / "a")
    assert read.config["fan_in_fan_out"] is True
    assert read.tensors[names[1]][1].shape == (2, 48)
    with torch.no_grad():
        for i, name in enumerate(names):
            weight = gpt2.get_submodule(name).weight
            tuned = (
                weight.numpy() + 1.5 * adapters["c_attn.lora_a"][i] @ adapters["c_attn.lora_b"][i]
            )
            if dora:
                tuned *= adapters["c_attn.lora_magnitude"][i] / np.linalg.norm(tuned, axis=0)
            weight.copy_(torch.tensor(tuned))
    want = torch_logits(gpt2)
    fresh = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    assert np.abs(torch_logits(fresh) - want).max() > 1e-2 * np.ptp(want)
    assert_close_in_range(torch_logits(PeftModel.from_pretrained(fresh, tmp_path / "a")), want)
    assert_close_in_range(torch_logits(GPT2LMHeadModel.from_pretrained(tmp_path / "m")), want)


def make_bert():
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, num_labels=3, max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    return randomised(BertForSequenceClassification(config))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_whole_modules_travel_both_ways(tmp_path, dora):
    rng = np.random.default_rng(3)
    options = LoraConfig(
        task_type="SEQ_CLS", r=2, lora_alpha=5, target_modules=["query", "value"],
        modules_to_save=["pooler"], use_dora=dora,
    )  # fmt: skip
    model = get_peft_model(make_bert(), options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.tensor(0.2 * rng.standard_normal(parameter.shape)))
    model.save_pretrained(tmp_path / "theirs")
    want = torch_logits(model)
    read = read_peft(tmp_path / "theirs")
    assert set(read.saved) == {
        *("classifier.weight", "classifier.bias"),
        *("bert.pooler.dense.weight", "bert.pooler.dense.bias"),
    }
    trained_head = model.base_model.model.classifier.modules_to_save["default"].weight
    assert np.array_equal(read.saved["classifier.weight"], trained_head.detach().numpy())
    assert len(read.magnitudes) == (4 if dora else 0)
    modules = [
        AdaptedModule(name, name, 0, 2, 5.0, 2.5, 16, 16, METHODS["dora" if dora else "lora"])
        for name in read.tensors
    ]
    adapters = {f"{n}.lora_{s}": pair[i][None] for n, pair in read.tensors.items()
                for i, s in enumerate("ab")}  # fmt: skip
    adapters |= {f"{n}.lora_magnitude": value[None] for n, value in read.magnitudes.items()}
    export(
        tmp_path / "ours", modules, adapters, {},
        task_type="SEQ_CLS", saved=read.saved, modules_to_save=["pooler", "classifier"],
    )  # fmt: skip
    config = config_of(tmp_path / "ours")
    assert config["task_type"] == "SEQ_CLS"
    assert config["modules_to_save"] == ["pooler", "classifier"]
    files = [load_file(tmp_path / x / "adapter_model.safetensors") for x in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    for name, value in files[0].items():
        assert np.array_equal(value, files[1][name])
    again = PeftModel.from_pretrained(make_bert(), str(tmp_path / "ours"))
    assert_close_in_range(torch_logits(again), want)
    assert np.abs(torch_logits(make_bert()) - want).max() > 1e-2 * np.ptp(want)


def test_saved_tensors_have_a_named_module(base, tmp_path):
    modules, adapters, origin = trained(base, "lora", "lora")
    saved = {"score.weight": np.ones((3, 16)), "score_norm.bias": np.ones(3)}
    with pytest.raises(InputError) as caught:
        export(tmp_path / "a", modules, adapters, origin, saved=saved, modules_to_save=["score"])
    assert str(caught.value) == (
        "saved: expected tensors of modules_to_save=['score'], got score_norm.bias. Name their "
        "modules there."
    )
    assert list(tmp_path.iterdir()) == []
    export(
        tmp_path / "a", modules, adapters, origin,
        saved=saved, modules_to_save=["score", "score_norm"],
    )  # fmt: skip
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    assert {str(value.dtype) for value in tensors.values()} == {"float32"}
    # As others may have saved it.
    save_file({name: value.astype("bfloat16") for name, value in tensors.items()}, file)
    read = read_peft(tmp_path / "a")
    assert {name: value.dtype for name, value in read.saved.items()} == dict.fromkeys(
        saved, np.float32
    )


@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"init_lora_weights": "orthogonal"}],
    ids=["dora", "orthogonal"],
)
def test_reads_what_peft_saved(tmp_path, settings):
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]} | settings
    model = get_peft_model(make_llama(), LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    read = read_peft(tmp_path)
    tuned = model.merge_and_unload()
    for name, (down, up) in read.tensors.items():
        method = METHODS["dora" if read.magnitudes else "lora"]
        module = AdaptedModule(
            name, name, 0, 4, 6.0, read.scales[name], down.shape[0], up.shape[1], method
        )
        arrays = {f"{name}.lora_a": down[None], f"{name}.lora_b": up[None]}
        if read.magnitudes:
            arrays[f"{name}.lora_magnitude"] = read.magnitudes[name][None]
        weight = make_llama().get_submodule(name).weight.detach().numpy()
        got = merged_weight(module, arrays, {}, weight)
        want = tuned.get_submodule(name).weight.detach().numpy()
        np.testing.assert_allclose(got, want, atol=1e-5)
        assert np.abs(got - weight).max() > 0.05
    assert len(read.magnitudes) == (4 if "use_dora" in settings else 0)


def test_magnitudes_that_do_not_fit_are_named(base, tmp_path):
    export(tmp_path / "a", *trained(base, "dora", "lora"))
    file = tmp_path / "a" / "adapter_model.safetensors"
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_magnitude_vector"
    good = load_file(file)
    save_file({**good, name: np.ones(7, np.float32)}, file)
    with pytest.raises(
        InputError, match=r"vector \[out\] for model.layers.1.self_attn.v_proj, got"
    ):
        read_peft(tmp_path / "a")
    save_file({**good, name.replace("v_proj", "o_proj"): np.ones(16, np.float32)}, file)
    with pytest.raises(InputError, match=r"for model.layers.1.self_attn.o_proj, got \{'lora_mag"):
        read_peft(tmp_path / "a")


def test_names_of_experts_pass_through(tmp_path):
    names = [f"model.layers.0.block_sparse_moe.experts.{i}.w1" for i in (1, 3, 11)]
    modules = [AdaptedModule(n, "w1", i, 2, 4.0, 2.0, 6, 5) for i, n in enumerate(names)]
    rng = np.random.default_rng(0)
    adapters = {
        "w1.lora_a": rng.standard_normal((12, 6, 2)),
        "w1.lora_b": rng.standard_normal((12, 2, 5)),
    }
    export(tmp_path / "a", modules, adapters, {})
    assert config_of(tmp_path / "a")["target_modules"] == names
    read = read_peft(tmp_path / "a")
    assert set(read.tensors) == set(names)
    for i, name in enumerate(names):
        assert np.array_equal(read.tensors[name][0], np.float32(adapters["w1.lora_a"][i]))
