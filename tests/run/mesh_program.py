"""A program: one training step of many models on eight virtual devices against one, as JSON.

``python -m tests.run.mesh_program``; run by test_family_meshes.py in a process of its own, because
the number of devices is fixed when JAX starts.
"""

import importlib.util
import json
import os
import re
import tempfile
import zlib
from dataclasses import replace
from pathlib import Path

from tests import compiler

if __name__ == "__main__":
    os.environ.update(compiler.on_cpu(8))

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from balora_jax.config import MeshConfig
from balora_jax.config_file import parse_config
from balora_jax.data.examples import Example
from balora_jax.models import attention
from balora_jax.models.structure import structure
from balora_jax.parallel import sharding
from balora_jax.pretrained.checkpoint import open_base, open_encoder
from balora_jax.tasks.labels import loss as labels_loss
from balora_jax.tasks.labels import run as labels_run
from balora_jax.tasks.text.program import text_program
from balora_jax.tasks.text.validate import TextValidator
from balora_jax.training import steps
from balora_jax.training.run import Loaded

SIZES = {"vocab_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 32}
DECODER = {
    **SIZES,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
MODELS = {
    "llama": {
        **DECODER,
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "head_dim": 16,
    },
    # No width is a number of tokens, see test_only_keys_and_values_are_gathered_over_tokens.
    "long": {
        **DECODER,
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 160,
        "head_dim": 16,
        "vocab_size": 56,
    },
    "mixtral": {
        **DECODER,
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 6,
    },
    "gemma2": {
        **DECODER,
        "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 7,
        "sliding_window": 5,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 4.0,
        "tie_word_embeddings": True,
    },
    "qwen3": {**DECODER, "model_type": "qwen3", "attention_bias": True},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 48,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 32,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
    },
    "phi3": {**DECODER, "model_type": "phi3", "num_attention_heads": 2, "pad_token_id": 0},
    "modernbert": {
        **SIZES,
        "model_type": "modernbert",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 4,
        "local_attention": 6,
        "global_attn_every_n_layers": 2,
        "classifier_pooling": "mean",
        "pad_token_id": 0,
        "initializer_range": 0.5,
    },
    "bert": {
        **SIZES,
        "model_type": "bert",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 4,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
        "pad_token_id": 0,
        "initializer_range": 0.5,
    },
}
# Title → model, adapter section, quantization; every method and kind of codes once.
CASES = {
    "mixtral, DoRA": (
        "mixtral",
        {"target_modules": ["o_proj", "w1", "w2"], "method": "dora"},
        "none",
    ),
    "mixtral, int8": (
        "mixtral",
        {"target_modules": ["v_proj", "w2", "w3"], "start": "pissa"},
        "int8",
    ),
    "gemma2": ("gemma2", {"target_modules": ["k_proj", "down_proj"]}, "none"),
    "qwen3, LoRA-FA": (
        "qwen3",
        {"target_modules": ["o_proj", "gate_proj"], "method": "lora_fa", "start": "pissa"},
        "none",
    ),
    "gpt2, int8": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "start": "pissa"}, "int8"),
    "phi3": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}, "none"),
    "llama, nf4, DoRA": (
        "llama",
        {"target_modules": ["o_proj", "up_proj"], "method": "dora"},
        "nf4",
    ),
    "modernbert": ("modernbert", {"target_modules": ["Wqkv", "mlp.Wo"]}, "none"),
    "bert": ("bert", {"target_modules": ["query", "intermediate.dense"]}, "none"),
    "llama, long": ("long", {"target_modules": ["v_proj", "down_proj"], "dropout": 0.3}, "none"),
    "gpt2, int8, plain head": ("gpt2", {"target_modules": ["c_attn", "c_fc"]}, "int8"),
}
PLAIN = "gpt2, int8, plain head"
# Sizes of data, fsdp, sequence and tensor.
MESHES = {
    "2x2x2": (2, 2, 1, 2),
    "1x4x2": (1, 4, 1, 2),
    "1x1x8": (1, 1, 1, 8),
    "1x2x2, sequence 2": (1, 2, 2, 2),
    "2x1x1, sequence 4": (2, 1, 4, 1),
    "1x2x1, sequence 4": (1, 2, 4, 1),
}
# On eight devices phi3's two heads are split inside, on four a block of nf4's codes.
SPECIAL = {"phi3": "1x1x8", "mixtral, DoRA": "1x4x2", "llama, nf4, DoRA": "1x4x2"}
SPLIT = {
    "gemma2": "1x2x2, sequence 2",
    "llama, long": "1x2x1, sequence 4",
    PLAIN: "2x1x1, sequence 4",
}
PAIRS = [
    *((case, SPECIAL.get(case, "2x2x2")) for case in CASES if case not in ("llama, long", PLAIN)),
    *SPLIT.items(),
]
ROWS, LENGTH = 8, 12
ENCODERS = ("bert", "modernbert")


def available():
    """The cases that can run here: quantised ones need the package qwix."""
    without = importlib.util.find_spec("qwix") is None
    return [case for case, (_, _, kind) in CASES.items() if kind == "none" or not without]


def config_of(folder, adapter, quantization, head="fused"):
    """All three terms on, constant; plain gradient steps, so that an update is a gradient."""
    labels = {"text_columns": ["text"], "labels": ["a", "b", "c"]}
    is_encoder = folder.name in ENCODERS
    schedules = {f"{term}_schedule": "constant" for term in ("consistency", "diversity")}
    return parse_config(
        {
            "task": "labels" if is_encoder else "text",
            "model": {"name_or_path": str(folder), "quantization": quantization, "remat": "none"},
            "adapter": {"rank": 2, "alpha": 3.0, "start": "lora", **adapter},
            "regularizers": {
                "consistency": 0.5,
                "diversity": 0.2,
                "spectral": 0.3,
                **({} if is_encoder else {"top_k": 5}),
                "k": 2,
                **schedules,
                "spectral_schedule": "constant",
            },
            "data": {"train": "unread", **(labels if is_encoder else {})},
            "training": {
                "max_steps": 2,
                "batch_size": 2 * ROWS,
                "accumulation": 2,
                "optimizer": "sgd",
                "learning_rate": 0.5,
                "schedule": "constant",
                "warmup": 0.0,
                **({} if is_encoder else {"head_chunk": 16, "head": head}),
            },
            "eval": {"task": "none"},
        },
        folder.name,
    )


def noise(name, shape, size=0.3):
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return (size * rng.standard_normal(shape)).astype(np.float32)


def write_checkpoint(folder, raw):
    """Random weights under the names of the family's table."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    save_file({}, folder / "model.safetensors")  # to open it, for the shapes
    is_encoder = raw["model_type"] in ENCODERS
    base = open_encoder(str(folder), num_labels=3) if is_encoder else open_base(str(folder))
    shapes = structure(base.config).frozen
    tensors = {}
    for rule in base.rules:
        value = noise(rule.path, shapes[rule.path].shape)
        value = value + 1 if rule.path.endswith("scale") else value
        parts = value if rule.stacked else [value]
        for name, part in zip(rule.names(len(value)), parts, strict=True):
            tensors[name] = np.ascontiguousarray(part.T if rule.transpose else part)
    save_file(tensors, folder / "model.safetensors")


def batch_of(is_encoder):
    rng = np.random.default_rng(3)
    shape = (2, ROWS, LENGTH)
    ids = rng.integers(3, 48, shape).astype(np.int32)
    if is_encoder:
        mask = (np.arange(LENGTH) < rng.integers(5, LENGTH + 1, (2, ROWS, 1))).astype(np.int32)
        return {
            "input_ids": ids * mask,
            "attention_mask": mask,
            "token_type_ids": np.broadcast_to(np.arange(LENGTH) // 6, shape).astype(np.int32),
            "labels": rng.integers(0, 3, shape[:2]).astype(np.int32),
        }
    # Two texts in every row, and a different number of answers' tokens on every device.
    return {
        "input_ids": ids,
        "positions": np.broadcast_to(np.arange(LENGTH) % 7, shape).astype(np.int32),
        "segment_ids": np.broadcast_to(1 + np.arange(LENGTH) // 7, shape).astype(np.int32),
        "loss_mask": (rng.random(shape) < np.linspace(0.3, 1, ROWS)[:, None]).astype(np.int32),
    }


def prepared(config, folder, mesh):
    """Program, step and arrays on a mesh, as a run makes them."""
    if config.task == "labels":
        base = open_encoder(str(folder), num_labels=3)
        program = replace(labels_run.labels_program(config, base), mesh=mesh)
        parts = program.step_parts(2)
    else:
        base = open_base(str(folder))
        program = text_program(config, base.config, mesh)
        parts = program.step_parts(2)
    frozen = base.load_for(program.plain, mesh)
    trainable, origin = program.adapters.begin(
        frozen, config.model, program.layout, seed=config.training.seed
    )
    if config.task == "labels":
        head = program.layout.placed(base.load_head(jax.random.key(1)))
        copies = {path: jnp.array(value, copy=True) for path, value in head.items()}
        return program, parts, trainable | head, labels_loss.Constants(frozen, origin, copies)
    constants = program.constants(Loaded(frozen, origin, trainable))
    return program, parts, trainable, constants


def run(case, folder, mesh):
    """Metrics, updates, layouts and exchanged shapes of one step from adapters that moved."""
    model, adapter, quantization = CASES[case]
    head = "plain" if case == PLAIN else "fused"
    config = config_of(folder / model, adapter, quantization, head)
    with jax.set_mesh(mesh):
        program, parts, trainable, constants = prepared(config, folder / model, mesh)
        before = {path: np.asarray(value) for path, value in trainable.items()}
        # At the start the student is the teacher, and consistency would have no gradient.
        before = {path: value + noise(path, value.shape, 0.1) for path, value in before.items()}
        state = steps.initial_state(program.layout.placed(before), parts.optimizer, mesh)
        step = steps.compile_step(parts, state, mesh)
        batch = steps.place_batch(batch_of(config.task == "labels"), mesh)
        step = step.lower(state, constants, batch, jax.random.key(0)).compile()
        state, metrics = step(state, constants, batch, jax.random.key(0))
    held = {**constants.frozen, **constants.origin, **state.adapters}
    return (
        {name: float(value) for name, value in metrics.items()},
        {path: np.asarray(value, np.float64) - before[path] for path, value in state.adapters.items()},
        {path: np.asarray(value) for path, value in constants.frozen.items()},
        {
            path: value
            for path, value in held.items()
            if value.sharding.spec != program.layout(path, value.shape).spec
        },
        exchanged(step.as_text()),
    )  # fmt: skip


def validated(case, folder, mesh, *, packed):
    """Loss and terms of eleven held-out examples with adapters that moved, eight at a time."""
    model, adapter, quantization = CASES[case]
    config = config_of(folder / model, adapter, quantization)
    rng = np.random.default_rng(7)
    examples = [
        Example(rng.integers(3, 48, n).astype(np.int32), (np.arange(n) > n // 2).astype(np.int8))
        for n in rng.integers(3, LENGTH + 1, 11)
    ]
    with jax.set_mesh(mesh):
        program, _, trainable, constants = prepared(config, folder / model, mesh)
        moved = {k: np.asarray(v) + noise(k, v.shape, 0.1) for k, v in trainable.items()}
        validator = TextValidator(
            program.whole_loss,
            examples,
            micro_batch=ROWS,
            length=LENGTH,
            packed=packed,
            pad_id=0,
            mesh=mesh,
        )
        return validator(constants, program.layout.placed(moved))


def exchanged(text):
    """Shapes of the floats that devices give each other, but for those within the head's pass."""
    kinds = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
    shapes = set()
    for line in text.splitlines():
        found = re.search(rf"= (.*?) (?:{kinds})(?:-start)?\(", line)
        if found and "shard_map/" not in line:
            shapes |= set(re.findall(r"(?:bf16|f16|f32)\[([\d,]+)\]", found[1]))
    return sorted([int(size) for size in shape.split(",")] for shape in shapes)


def compared(one, other):
    """Largest differences, each as a share of the largest number of its kind."""
    (values, updates, frozen, *_), (found, moved, held, elsewhere, shapes) = one, other
    names = ("loss", "task_loss", "consistency", "diversity", "spectral", "grad_norm")
    return {
        "values": max(abs(found[n] - values[n]) / max(abs(values[n]), 1e-3) for n in names),
        "updates": max(
            np.abs(moved[path] - update).max() / np.abs(update).max()
            for path, update in updates.items()
        ),
        "smallest update": min(np.abs(update).max() for update in updates.values()),
        "terms": {name: values[name] for name in names},
        "same frozen": all(np.array_equal(held[path], value) for path, value in frozen.items()),
        "codes": sorted({str(v.dtype) for p, v in held.items() if f"{p}_scale" in held}),
        "elsewhere": sorted(elsewhere),
        "exchanged": shapes,
    }


def mesh_of(title):
    """One of the meshes by name."""
    sizes = zip(("data", "fsdp", "sequence", "tensor"), MESHES[title], strict=True)
    return sharding.make_mesh(MeshConfig(**dict(sizes)))


def main():
    # Rows of 12 tokens by blocks, but for meshes that split them: these take the plain form.
    attention.WHOLE, attention.BLOCK = 4, 4
    found = {}
    one = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, raw in MODELS.items():
            write_checkpoint(folder / name, raw)
        for case in available():
            alone = run(case, folder, one)
            for title in [mesh for name, mesh in PAIRS if name == case]:
                mesh = mesh_of(title)
                found[f"{case} / {title}"] = compared(alone, run(case, folder, mesh))
        found["validation"] = [
            validated("gemma2", folder, one, packed=False),
            validated("gemma2", folder, mesh_of("1x2x2, sequence 2"), packed=True),
        ]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
