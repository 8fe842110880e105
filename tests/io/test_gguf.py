"""GGUF adapters: what gguf reads back, and what llama.cpp's rules compute from it."""

import dataclasses
import sys
from typing import NamedTuple

import numpy as np
import pytest

from balora_jax.errors import InputError
from balora_jax.io.gguf_writer import Served, export_gguf
from balora_jax.models.adapters import plan_adapters
from balora_jax.models.families.base import FAMILIES, family_of, read_config
from balora_jax.models.methods import METHODS
from balora_jax.models.structure import structure
from balora_jax.models.weight_names import linear_shapes

gguf = pytest.importorskip("gguf")

SIZES = {
    "vocab_size": 59,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "num_local_experts": 3,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "query_pre_attn_scalar": 8,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "no_rope_layers": [1, 0, 1],
}
CHANGED = {
    "phi3": {"head_dim": None, "hidden_size": 48},
    "gpt2": {"n_embd": 24, "n_inner": 40, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "gemma3": {"text_config": SIZES},
    "smollm3": {"layer_types": None},
}
ATTENTION = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
GATED = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
EXPERTS = {name: f"{theirs}_exps" for name, theirs in GATED.items()} | {"gate": "ffn_gate_inp"}
# From a family to its name in llama.cpp, whether q and k are in Meta's order there, and its layers.
NAMES = {
    "llama": ("llama", True, ATTENTION | GATED),
    "mistral": ("llama", True, ATTENTION | GATED),
    "smollm3": ("smollm3", True, ATTENTION | GATED),
    "granite": ("granite", True, ATTENTION | GATED),
    "qwen2": ("qwen2", False, ATTENTION | GATED),
    "qwen3": ("qwen3", False, ATTENTION | GATED),
    "olmo2": ("olmo2", False, ATTENTION | GATED),
    "gemma": ("gemma", False, ATTENTION | GATED),
    "gemma2": ("gemma2", False, ATTENTION | GATED),
    "gemma3_text": ("gemma3", False, ATTENTION | GATED),
    "gemma3": ("gemma3", False, ATTENTION | GATED),
    "phi3": (
        "phi3", False,
        {"qkv_proj": "attn_qkv", "o_proj": "attn_output", "gate_up_proj": "ffn_up",
         "down_proj": "ffn_down"},
    ),
    "gpt2": (
        "gpt2", False,
        {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up",
         "mlp.c_proj": "ffn_down"},
    ),
    "mixtral": (
        "llama", True,
        ATTENTION | {"w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps",
                     "gate": "ffn_gate_inp"},
    ),
    "qwen3_moe": ("qwen3moe", False, ATTENTION | EXPERTS),
}  # fmt: skip


class Trained(NamedTuple):
    base: Served
    modules: tuple
    adapters: dict

    def factors(self, module):
        """A [in, r] and B [r, out] of a module."""
        a, b = (self.adapters[f"{module.path}.lora_{side}"][module.layer] for side in "ab")
        return a[:, : module.rank].astype(np.float64), b[: module.rank].astype(np.float64)

    def delta(self, module):
        """[out, in] in float64, by its definition."""
        a, b = self.factors(module)
        return module.scale * (a @ b).T


def trained(family, seed=0, **options):
    """Random adapters of rank 4 on every layer of a tiny model that has no weights."""
    values = {"model_type": family, **SIZES, **CHANGED.get(family, {})}
    values = {key: value for key, value in values.items() if value is not None}
    config = read_config(values, "config.json")
    linears = linear_shapes(family_of(config).rules(config), structure(config).frozen)
    options = {"rank": 4, "alpha": 6.0, "target_modules": "all-linear", **options}
    modules = plan_adapters(linears, **options)
    rng, adapters = np.random.default_rng(seed), {}
    for shape in linears:
        for side, size in (("a", (shape.in_features, 4)), ("b", (4, shape.out_features))):
            value = rng.standard_normal((len(shape.names), *size))
            adapters[f"{shape.path}.lora_{side}"] = value.astype(np.float32)
    served = Served(config, family_of(config).gguf, "org/base", "https://huggingface.co/org/base")
    return Trained(served, modules, adapters)


def written(folder, given, **options):
    """The file as gguf reads it: fields, and tensors by name."""
    report = export_gguf(
        folder, modules=given.modules, adapters=given.adapters, base=given.base, **options
    )
    reader = gguf.GGUFReader(folder / "adapter.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    assert report.parameters == sum(value.size for value in tensors.values())
    return fields, tensors


def in_checkpoint_order(rows, heads):
    """Row 2 i + j of a head in Meta's order is row i + j K/2 of it in a checkpoint."""
    found, size = np.empty_like(rows), len(rows) // heads
    for row in range(len(rows)):
        head, place = divmod(row, size)
        i, j = divmod(place, 2)
        found[head * size + i + j * size // 2] = rows[row]
    return found


def layer_number(module):
    return int(next(part for part in module.name.split(".") if part.isdigit()))


def name_of(module, layers):
    ends = [end for end in layers if module.name.endswith(f".{end}")]
    return f"blk.{layer_number(module)}.{layers[max(ends, key=len)]}.weight"


@pytest.mark.parametrize("family", NAMES)
def test_names_and_deltas_of_every_family(tmp_path, family):
    """Of each tensor ``alpha / r · B A`` is the trained delta, once its rows are put back."""
    arch, meta, layers = NAMES[family]
    given = trained(family)
    fields, tensors = written(tmp_path / "g", given)
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == arch
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 6.0
    assert fields["general.file_type"] == gguf.LlamaFileType.ALL_F32
    seen = set()
    for module in given.modules:
        name = name_of(module, layers)
        seen |= {f"{name}.lora_a", f"{name}.lora_b"}
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        if ".experts." in module.name:
            expert = int(module.name.split(".experts.")[1].split(".")[0])
            a, b = a[expert], b[expert]
        if meta and name.endswith(("attn_q.weight", "attn_k.weight")):
            b = in_checkpoint_order(b, heads=6 if "attn_q" in name else 2)
        ours_a, ours_b = given.factors(module)
        np.testing.assert_array_equal(a, ours_a.T)
        np.testing.assert_array_equal(b, ours_b.T)
        rank = b.shape[-1]
        delta = fields["adapter.lora.alpha"] / rank * np.float64(b) @ np.float64(a)
        np.testing.assert_allclose(delta, given.delta(module), rtol=1e-12)
    assert set(tensors) == seen


@pytest.mark.parametrize("family", NAMES)
def test_names_are_those_of_the_packages_own_table(family):
    arch, _, layers = NAMES[family]
    number = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    table = gguf.get_tensor_name_map(number, 3)
    known = {name for names in table.mapping.values() for name in names[1:]}
    assert {f"blk.{i}.{name}" for i in range(3) for name in layers.values()} <= known


def test_every_family_of_decoders_is_here():
    served = {family.name for family in FAMILIES.values() if family.gguf is not None}
    assert served == set(NAMES)


def rotated(heads, positions, pairs):
    """[T, H, K] turned by the angle of each position and pair; ``pairs`` lists the two places."""
    found, width = heads.copy(), heads.shape[-1]
    for place, (one, other) in enumerate(pairs):
        angle = positions * 10000.0 ** (-2.0 * place / width)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        found[..., one] = heads[..., one] * cos - heads[..., other] * sin
        found[..., other] = heads[..., other] * cos + heads[..., one] * sin
    return found


def test_llama_cpps_rules_give_the_scores_of_the_trained_model(tmp_path):
    """Its order of rows with its rotation of neighbours: the scores of the checkpoint's order.

    ``y = W x + (alpha / r) · B (A x)``, and pairs (2 i, 2 i + 1) turn, not (i, i + K/2).
    """
    given = trained("llama")
    fields, tensors = written(tmp_path / "g", given)
    rng = np.random.default_rng(3)
    x, positions = rng.standard_normal((5, 24)), np.arange(5.0)
    ours, theirs = {}, {}
    for leaf, heads in (("q_proj", 6), ("k_proj", 2)):
        module = next(m for m in given.modules if m.name == f"model.layers.1.self_attn.{leaf}")
        weight = rng.standard_normal((heads * 8, 24))
        y = x @ (weight + given.delta(module)).T
        ours[leaf] = rotated(y.reshape(5, heads, 8), positions, [(i, i + 4) for i in range(4)])
        # The converter of whole models: row i + 4 j of a head goes to row 2 i + j.
        order = [h * 8 + i + 4 * j for h in range(heads) for i in range(4) for j in range(2)]
        a, b = (tensors[f"blk.1.attn_{leaf[0]}.weight.lora_{side}"] for side in "ab")
        y = x @ weight[order].T
        y += fields["adapter.lora.alpha"] / b.shape[1] * (x @ np.float64(a).T) @ np.float64(b).T
        theirs[leaf] = rotated(
            y.reshape(5, heads, 8), positions, [(2 * i, 2 * i + 1) for i in range(4)]
        )
    scores = [np.einsum("thk,sgk->htsg", held["q_proj"], held["k_proj"]) for held in (ours, theirs)]
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-9, atol=1e-9 * np.abs(scores[0]).max())


def test_one_alpha_whatever_ranks_and_alphas_there_are(tmp_path):
    given = trained(
        "qwen2", rank_pattern={"q_proj": 2, r"1\.self_attn\.v_proj": 1},
        alpha_pattern={"down_proj": 1.5}, use_rslora=True,
    )  # fmt: skip
    fields, tensors = written(tmp_path / "g", given)
    for module in given.modules:
        name = name_of(module, ATTENTION | GATED)
        a, b = (np.float64(tensors[f"{name}.lora_{side}"]) for side in "ab")
        assert b.shape[1] == module.rank
        delta = fields["adapter.lora.alpha"] / b.shape[1] * b @ a
        np.testing.assert_allclose(delta, given.delta(module), rtol=1e-6, atol=1e-6)
    # Those of most modules are as they were trained, sqrt(4) for a rank-stabilised 6 / sqrt(4).
    assert fields["adapter.lora.alpha"] == 6.0 / 2.0 * 4


def test_experts_of_different_ranks_and_one_without(tmp_path):
    given = trained("mixtral", target_modules=r".*experts\.[02]\.w1", rank_pattern={r"2\.w1": 3})
    fields, tensors = written(tmp_path / "g", given)
    a, b = (tensors[f"blk.2.ffn_gate_exps.weight.lora_{side}"] for side in "ab")
    assert a.shape == (3, 4, 24)
    assert b.shape == (3, 36, 4)
    assert not a[1].any()
    assert not b[1].any()
    for module in given.modules[-2:]:
        expert = int(module.name.split(".")[-2])
        delta = fields["adapter.lora.alpha"] / 4 * np.float64(b[expert]) @ np.float64(a[expert])
        np.testing.assert_allclose(delta, given.delta(module), rtol=1e-6, atol=1e-6)


def test_float16_and_its_limit(tmp_path):
    given = trained("gemma")
    fields, tensors = written(tmp_path / "g", given, dtype="float16")
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16
    module = given.modules[0]
    a = tensors[f"{name_of(module, ATTENTION | GATED)}.lora_a"]
    np.testing.assert_array_equal(a, given.factors(module)[0].T.astype(np.float16))
    given.adapters[f"{module.path}.lora_b"][0, 0, 0] = 7e4
    with pytest.raises(InputError, match=r"that float16 can hold, got 7e\+04 in blk\.0\."):
        written(tmp_path / "h", given, dtype="float16")
    assert not (tmp_path / "h").exists()


def test_a_smaller_rank(tmp_path):
    given = trained("phi3")
    fields, tensors = written(tmp_path / "g", given, rank=2)
    module = given.modules[0]
    name = name_of(module, NAMES["phi3"][2])
    a, b = (np.float64(tensors[f"{name}.lora_{side}"]) for side in "ab")
    assert b.shape[1] == 2
    u, s, vt = np.linalg.svd(given.delta(module))
    best = u[:, :2] * s[:2] @ vt[:2]
    np.testing.assert_allclose(fields["adapter.lora.alpha"] / 2 * b @ a, best, atol=1e-5 * s[0])


def refused(tmp_path, given, phrase, **options):
    with pytest.raises(InputError, match=phrase):
        written(tmp_path / "g", given, **options)
    assert not (tmp_path / "g").exists()


def test_what_llama_cpp_cannot_serve_is_refused(tmp_path, monkeypatch):
    given = trained("llama")
    whole = [dataclasses.replace(m, method=METHODS["dora"]) for m in given.modules]
    refused(tmp_path, given._replace(modules=whole), "expected an adapter without DoRA")
    odd = dataclasses.replace(given.modules[0], name="model.layers.0.self_attn.odd_proj")
    refused(tmp_path, given._replace(modules=(odd,)), "names for in llama, got model.layers.0")
    rope = dataclasses.replace(given.base.config.rope, rotary_dim=4)
    part = dataclasses.replace(given.base.config, rope=rope)
    refused(tmp_path, given._replace(base=given.base._replace(config=part)), "rotate whole")
    newer = given.base._replace(layout=given.base.layout._replace(arch="llama9"))
    refused(tmp_path, given._replace(base=newer), "a package gguf that knows llama9")
    refused(tmp_path, given, "expected float32 or float16 with --format gguf", dtype="bfloat16")
    refused(tmp_path, given, "rank: expected at least 1", rank=0)
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(tmp_path, given, r"the package gguf, which is not installed\. Install balora_jax\[gguf")
