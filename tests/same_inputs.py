"""The runs on which a tree is compared with an older one: checkpoints, rows, eight configs.

The configs are written out here, in words that older commits know, as both trees read them.
"""

import copy

import numpy as np

from tests import tiny_labels_run, tiny_run

CASES = ("quickstart", "packed", "lora", "gemma2", "dora", "labels", "mesh", "int8")
DEVICES = {"mesh": 8}
MODULES = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]


def write_inputs(folder):
    """Random checkpoints in Hugging Face layout with their tokenizers, and rows."""
    folder.mkdir(parents=True)
    tiny_run.write_model(folder / "llama", seed=1)
    write_gemma2(folder / "gemma2")
    tiny_labels_run.write_model(folder / "bert", seed=3)
    tiny_run.write_rows(folder / "sums.jsonl", tiny_run.sums(64, 4))
    tiny_run.write_rows(folder / "sums_held_out.jsonl", tiny_run.sums(5, 5))
    reviews = tiny_labels_run.reviews(400, 6)
    for row in reviews[::5]:  # or a fitted head would be certain of every row
        row["kind"] = "bad" if row["kind"] == "good" else "good"
    tiny_run.write_rows(folder / "reviews.jsonl", reviews)
    tiny_run.write_rows(folder / "reviews_held_out.jsonl", tiny_labels_run.reviews(33, 7))


def write_gemma2(folder):
    """Norms on both sides of every part; caps and window are small enough to matter."""
    rng, tensors = np.random.default_rng(2), tiny_run.random_weights(2)
    del tensors["lm_head.weight"]  # tied
    for i in range(tiny_run.LAYERS):
        for side in ("pre", "post"):
            name = f"model.layers.{i}.{side}_feedforward_layernorm.weight"
            tensors[name] = (0.1 * rng.standard_normal(tiny_run.WIDTH)).astype(np.float32)
    tiny_run.write_model(
        folder,
        tensors=tensors,
        architectures=["Gemma2ForCausalLM"],
        model_type="gemma2",
        head_dim=tiny_run.HEAD_WIDTH,
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=7,
        sliding_window=5,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=4.0,
        tie_word_embeddings=True,
    )


def merged(tree, sections):
    """A config with keys of its sections replaced."""
    tree = copy.deepcopy(tree)
    for section, values in sections.items():
        tree.setdefault(section, {}).update(values)
    return tree


def sums_config(inputs, model, steps):
    """A decoder on sums; every term weighs enough to be seen in the gradient."""
    return {
        "model": {"name_or_path": str(inputs / model), "remat": "none"},
        "adapter": {"rank": 3, "alpha": 4.0, "target_modules": MODULES},
        "regularizers": {
            "consistency": 0.5,
            "diversity": 0.05,
            "spectral": 0.05,
            "top_k": 5,
            "k": 3,
        },
        "data": {
            "train": str(inputs / "sums.jsonl"),
            "validation": str(inputs / "sums_held_out.jsonl"),
            "template": "{question}=",
            "prompt_column": "question",
            "response_column": "answer",
            "max_length": 16,
            "packing": False,  # what older trees know, and did where nothing was said
        },
        "training": {
            "max_steps": steps,
            "batch_size": 8,
            "accumulation": 2,
            "learning_rate": 0.01,
            "weight_decay": 0.01,
            "head_chunk": 16,
            "checkpoint_every": 0,
        },
        "eval": {"marker": "#", "max_new_tokens": 4, "batch_size": 2},
    }


def reviews_config(inputs, steps):
    """An encoder on two classes; k = 1 of two singular values leaves the spectral term a slope."""
    return {
        "task": "nlu",  # the older tree knows the paper's names alone
        "model": {"name_or_path": str(inputs / "bert"), "remat": "none"},
        "adapter": {"start": "pissa", "rank": 3, "target_modules": ["query", "key", "value"]},
        "regularizers": {
            "consistency": 0.15,
            "diversity": 0.001,
            "spectral": 0.5,
            "k": 1,
            "teacher_head": "probe",
            "teacher_cache": True,
        },
        "data": {
            "train": str(inputs / "reviews.jsonl"),
            "validation": str(inputs / "reviews_held_out.jsonl"),
            "text_columns": ["text"],
            "label_column": "kind",
            "labels": ["bad", "good"],
        },
        "training": {
            "max_steps": steps,
            "batch_size": 16,
            "accumulation": 2,
            "learning_rate": 0.005,
            "log_gradient_share_every": 10,
            "checkpoint_every": 0,
        },
        "eval": {"batch_size": 16},
    }


def configs(inputs, quickstart, steps):
    """Case → config tree: all terms on scheduled weights, and most other options in some case."""
    brief = {
        "data": {"packing": False},
        "training": {"max_steps": steps, "checkpoint_every": 0},
        "eval": {"limit": 8},
    }
    quickstart = merged(quickstart, brief)
    llama, gemma2 = (sums_config(inputs, model, steps) for model in ("llama", "gemma2"))
    return {
        "quickstart": quickstart,
        "packed": merged(quickstart, PACKED),
        "lora": merged(llama, LORA),
        "gemma2": merged(gemma2, GEMMA2),
        "dora": merged(llama, DORA),
        "labels": reviews_config(inputs, steps),
        "mesh": merged(llama, {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}}),
        "int8": merged(quickstart, INT8),
    }


PACKED = {
    "regularizers": {
        "consistency_schedule": "constant",
        "diversity_schedule": "linear_warmup",
        "spectral_schedule": "quadratic_warmup",
        "warmup_fraction": 0.5,
        "mask_alignment": "official",
        "k": 4,  # few enough of 128 for the iteration
    },
    "data": {"packing": True},
    "training": {"batch_size": 8, "accumulation": 2, "log_gradient_share_every": 0},
    "eval": {"task": "none"},
}
LORA = {
    "adapter": {"start": "lora", "dropout": 0.1, "use_rslora": True},
    "regularizers": {"variant": "arxiv_v1", "top_k": 0},
    "training": {"accumulation": 4, "lora_plus_ratio": 4.0, "schedule": "linear"},
    "eval": {"temperature": 0.8, "top_p": 0.9},
}
GEMMA2 = {"model": {"remat": "dots"}, "regularizers": {"center_rows": True}}
DORA = {
    "adapter": {"start": "pissa", "method": "dora", "rank_pattern": {"down_proj": 2}},
    "regularizers": {"consistency_schedule": "adaptive"},
    "training": {"head": "plain"},
    "eval": {"task": "none"},
}
INT8 = {
    "model": {"quantization": "int8", "dtype": "bfloat16", "remat": "full"},
    "regularizers": {"k": 5},
    "training": {"batch_size": 8, "log_gradient_share_every": 0},
}
