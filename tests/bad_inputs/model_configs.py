"""``config.json`` of every family: each key with every kind of value, and files that are none."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from tests import tiny_labels_run, tiny_run
from tests.bad_inputs.case import Arguments, Case, Place
from tests.bad_inputs.values import KINDS, deep

BAD_SIZES = ("zero", "neg", "str", "float", "list", "dict", "bool", "1e9", "1e18", "1e30", "null")
BAD_NUMBERS = ("str", "list", "dict", "nan", "inf", "neg", "bool", "1e30", "long", "null")
BAD_FLAGS = ("str", "int", "list", "dict", "float")
BAD_WORDS = ("list", "dict", "int", "str", "escape", "long", "null")

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "head_dim"),
)
MAY_BE_NULL = ("num_key_value_heads", "head_dim")
NUMBERS = ("rms_norm_eps", "rope_theta", "partial_rotary_factor", "attention_dropout")
FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_bidirectional_attention")
WORDS = ("hidden_act", "model_type")
IGNORED = ("attention_dropout", "mlp_bias", "bos_token_id", "torch_dtype", "architectures")

GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh"}
FAMILIES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "mistral": ({"sliding_window": 8}, ("sliding_window",)),
    "mixtral": (
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        ("num_local_experts", "num_experts_per_tok", "sliding_window"),
    ),
    "gemma": ({**GEMMA, "head_dim": 4}, ("head_dim", "hidden_activation")),
    "gemma2": (
        {**GEMMA, "head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 8},
        (
            *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
            *("sliding_window", "layer_types", "num_hidden_layers"),
        ),
    ),
    "gemma3_text": (
        {**GEMMA, "head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 8},
        ("sliding_window_pattern", "rope_local_base_freq", "layer_types", "rope_scaling"),
    ),
    "qwen2": (
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
    ),
    "qwen3": ({"head_dim": 4}, ("head_dim", "attention_bias")),
    "phi3": ({}, ("sliding_window", "partial_rotary_factor", "rope_scaling")),
    "olmo2": ({}, ("attention_bias", "rms_norm_eps")),
    "qwen3_moe": (
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 4},
        (
            *("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
            *("mlp_only_layers", "decoder_sparse_step", "use_sliding_window"),
        ),
    ),
    "smollm3": (
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 8},
        ("no_rope_layer_interval", "no_rope_layers", "use_sliding_window", "layer_types"),
    ),
    "granite": (
        {"logits_scaling": 8.0},
        (
            *("embedding_multiplier", "attention_multiplier", "residual_multiplier"),
            "logits_scaling",
        ),
    ),
    "gpt2": (
        {"n_embd": 16, "n_head": 4, "n_layer": 2, "n_positions": 64},
        (
            *("n_embd", "n_head", "n_layer", "n_positions", "n_inner", "layer_norm_epsilon"),
            *("activation_function", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"),
        ),
    ),
}
"""Family → what its config has beside Llama's keys, and the keys that are tried."""

ENCODERS: dict[str, tuple[str, ...]] = {
    "bert": (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "max_position_embeddings", "type_vocab_size", "layer_norm_eps"),
        *("hidden_act", "pad_token_id", "is_decoder", "position_embedding_type", "num_labels"),
        *("id2label", "initializer_range"),
    ),
    "roberta": ("pad_token_id", "max_position_embeddings", "type_vocab_size"),
    "deberta-v2": (
        *("max_relative_positions", "position_buckets", "pos_att_type", "norm_rel_ebd"),
        *("share_att_key", "relative_attention", "position_biased_input", "pooler_hidden_act"),
        *("conv_kernel_size", "embedding_size", "attention_head_size"),
    ),
    "distilbert": (
        *("dim", "hidden_dim", "n_layers", "n_heads", "activation", "max_position_embeddings"),
        *("pad_token_id", "vocab_size"),
    ),
    "modernbert": (
        *("local_attention", "global_attn_every_n_layers", "layer_types", "classifier_pooling"),
        *("norm_eps", "hidden_activation", "global_rope_theta", "rope_parameters", "norm_bias"),
    ),
}
DEBERTA = {
    "relative_attention": True, "max_relative_positions": 16, "position_buckets": 8,
    "pos_att_type": "p2c|c2p", "norm_rel_ebd": "layer_norm", "share_att_key": True,
    "position_biased_input": False, "type_vocab_size": 0,
}  # fmt: skip

DISTILBERT = {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4, "activation": "gelu"}


def cases() -> Iterator[Case]:
    """All of them."""
    seen = set()
    for case in (*_llama(), *_families(), *_encoders(), *_found(), *_files()):
        if case.name not in seen:
            seen.add(case.name)
            yield case


def _llama() -> Iterator[Case]:
    for key in SIZES:
        for kind in BAD_SIZES:
            unsure = kind == "null" and key in MAY_BE_NULL
            # Rotations have no table: any row fits.
            unsure = unsure or (key, kind) == ("max_position_embeddings", "1e9")
            yield _one(key, kind, "any" if unsure else "refuse")
    for key, kinds in {
        **dict.fromkeys(NUMBERS, BAD_NUMBERS),
        **dict.fromkeys(FLAGS, BAD_FLAGS),
        **dict.fromkeys(WORDS, BAD_WORDS),
        **dict.fromkeys(("eos_token_id", "bos_token_id"), BAD_SIZES),
        **dict.fromkeys(("torch_dtype", "architectures"), BAD_WORDS),
        "rope_scaling": ("str", "int", "list", "dict", "float", "bool"),
    }.items():
        for kind in kinds:
            yield _one(key, kind, "any")
    for kind, value in ROPES.items():
        yield Case(f"cj/rope_scaling-{kind}", _keys(rope_scaling=value), "any")
        yield Case(f"cj/rope_parameters-{kind}", _keys(rope_parameters=value), "any")
    for kind, keys in {
        "heads-no-divisor": {"num_attention_heads": 3},
        "kv-heads-no-divisor": {"num_key_value_heads": 3},
        "heads-above-width": {"num_attention_heads": 32, "num_key_value_heads": 32},
        "head-dim-odd": {"head_dim": 3},
        "vocabulary-below-tokens": {"vocab_size": 5},
        "positions-below-rows": {"max_position_embeddings": 3},
        "quantized": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "auto-map": {"auto_map": {"AutoModelForCausalLM": "evil.py--Evil"}},
        "huge-all": dict.fromkeys(SIZES, 10**12),
    }.items():
        unsure = kind in ("auto-map", "quantized", "head-dim-odd")
        yield Case(f"cj/{kind}", _keys(**keys), "any" if unsure else "refuse")


ROPES: dict[str, Any] = {
    "type-list": {"rope_type": ["linear"], "factor": 2.0},
    "type-dict": {"type": {"a": 1}, "factor": 2.0},
    "type-escape": {"rope_type": "\x1b[2J\n", "factor": 2.0},
    "factor-str": {"rope_type": "linear", "factor": "x"},
    "factor-zero": {"rope_type": "linear", "factor": 0},
    "factor-nan": {"rope_type": "linear", "factor": float("nan")},
    "factor-list": {"rope_type": "dynamic", "factor": [2]},
    "factor-none": {"rope_type": "linear"},
    "theta-str": {"rope_type": "default", "rope_theta": "x"},
    "theta-huge": {"rope_type": "default", "rope_theta": 10**400},
    "yarn-beta": {"rope_type": "yarn", "factor": 2.0, "beta_fast": "x"},
    "yarn-mscale": {"rope_type": "yarn", "factor": 2.0, "mscale": [1], "mscale_all_dim": 1},
    "yarn-original": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0},
    "llama3-equal": {
        "rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
    "long-none": {"rope_type": "longrope"},
    "long-bools": {
        "rope_type": "longrope", "short_factor": [True, True], "long_factor": [True, True],
        "original_max_position_embeddings": 1,
    },
    "long-original-one": {
        "rope_type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [1.0, 1.0],
        "original_max_position_embeddings": 1,
    },
    "long-strings": {"rope_type": "longrope", "short_factor": ["a", "b"], "long_factor": "ab"},
    "by-layer": {"full_attention": {"rope_type": "default"}},
}  # fmt: skip


def _families() -> Iterator[Case]:
    for family, (keys, tried) in FAMILIES.items():
        for key in tried:
            for kind in (*BAD_SIZES, "nan", "long", "escape", "deep-list"):
                make = _keys(**{**keys, "model_type": family, key: KINDS[kind]})
                yield Case(f"cj/{family}.{key}-{kind}", make, "any")


def _encoders() -> Iterator[Case]:
    for family, tried in ENCODERS.items():
        more = {"deberta-v2": DEBERTA, "distilbert": DISTILBERT}.get(family, {})
        for key in tried:
            for kind in (*BAD_SIZES, "nan", "long", "escape"):
                keys = {**more, "model_type": family, key: KINDS[kind]}
                yield Case(f"cj/{family}.{key}-{kind}", _keys("labels", **keys), "any")


def _found() -> Iterator[Case]:
    """What found a fault once, under the names that it had then."""
    hidden = {"model_type": "gemma", **FAMILIES["gemma"][0], "hidden_size": "x"}
    window = {"model_type": "qwen2", **FAMILIES["qwen2"][0], "max_window_layers": "x"}
    layers = {"model_type": "gemma2", **FAMILIES["gemma2"][0]}
    for name, keys in {
        "mistral-window-str": {"model_type": "mistral", "sliding_window": "x"},
        "mixtral-experts-str": {"model_type": "mixtral", "num_local_experts": "x"},
        "mixtral-experts-1e9": {"model_type": "mixtral", "num_local_experts": 10**9},
        "gemma2-layers-1e9": {**layers, "num_hidden_layers": 10**9},
        "gemma2-layertypes": {**layers, "layer_types": 7},
        "gemma-hidden-str": hidden,
        "qwen-window-layers": window,
    }.items():
        yield Case(f"cj/{name}", _keys(**keys))
    for name, key, value in (
        ("rms_norm_eps-0", "rms_norm_eps", "x"),
        ("rms_norm_eps-2", "rms_norm_eps", [1e-5]),
        ("rope_theta-0", "rope_theta", "x"),
        ("hidden_act-0", "hidden_act", ["silu"]),
        ("hidden_act-1", "hidden_act", {"a": 1}),
        ("model_type-1", "model_type", {"a": 1}),
        ("head_dim-0", "head_dim", "x"),
        ("head_dim-2", "head_dim", -4),
        ("head_dim-4", "head_dim", 2.5),
        ("rope_scaling-1", "rope_scaling", "x"),
        ("rope_scaling-2", "rope_scaling", 7),
        ("rope_scaling-5", "rope_scaling", {"rope_type": "linear", "factor": "x"}),
        ("eos_token_id-0", "eos_token_id", "x"),
        ("partial_rotary_factor-1", "partial_rotary_factor", "x"),
        ("partial_rotary_factor-2", "partial_rotary_factor", [0.5]),
    ):
        yield Case(f"cj/{name}", _keys(**{key: value}), "any")


def _files() -> Iterator[Case]:
    good = json.dumps(tiny_run.MODEL)
    for name, content in {
        "empty": "",
        "cut": good[:40],
        "list": f"[{good}]",
        "scalar": "7",
        "null": "null",
        "two": good + good,
        "deep": deep("[", "]", 100_000),
        "deep2": deep('{"a": ', "}", 100_000, "1"),
        "deep-value": f'{{"x": {deep("[", "]", 100_000)}, {good[1:]}',
        "digits": f'{{"vocab_size": {"9" * 5000}, {good[1:]}',
        "duplicate": f'{{"vocab_size": 5, {good[1:]}',
        "nul": good + "\0",
        "bom": "\ufeff" + good,
        "comment": "// mine\n" + good,
        "huge-number": good.replace("10000.0", "1e999"),
    }.items():
        unsure = name in ("bom", "duplicate", "huge-number", "deep-value")
        yield Case(f"cj/{name}", _file(content.encode()), "any" if unsure else "refuse")
    yield Case("cj/latin-1", _file(b'{"model_type": "\xe9"}'))
    yield Case("cj/utf-16", _file(good.encode("utf-16")))
    for name, make in {
        "folder": lambda file: (file.unlink(), file.mkdir()),
        "link-loop": lambda file: (file.unlink(), file.symlink_to(file.name)),
        "device": lambda file: (file.unlink(), file.symlink_to("/dev/zero")),
        "memory": lambda file: (file.unlink(), file.symlink_to("/proc/self/mem")),
    }.items():
        yield Case(f"cj/{name}", _replaced(make))


def _one(key: str, kind: str, expect: Any) -> Case:
    return Case(f"cj/{key}-{kind}", _keys(**{key: KINDS[kind]}), expect)


def _keys(task: str = "text", **keys: Any) -> Callable[[Place], Arguments]:
    def make(place: Place) -> Arguments:
        tree = place.labels_tree() if task == "labels" else place.text_tree()
        own = tiny_labels_run.MODEL if task == "labels" else tiny_run.MODEL
        file = place.folder / task / "model" / "config.json"
        file.write_text(json.dumps({**own, **keys}))
        return place.train(tree)

    return make


def _file(content: bytes) -> Callable[[Place], Arguments]:
    def make(place: Place) -> Arguments:
        (place.text / "model" / "config.json").write_bytes(content)
        return place.train()

    return make


def _replaced(change: Callable[[Any], Any]) -> Callable[[Place], Arguments]:
    def make(place: Place) -> Arguments:
        change(place.text / "model" / "config.json")
        return place.train()

    return make
