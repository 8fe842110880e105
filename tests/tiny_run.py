"""The smallest whole run: a random Llama, a tokenizer, rows and a config, no torch.

Everything is written by NumPy, ``safetensors`` and ``tokenizers`` alone, so that the tests of the
command line also run where neither torch nor PEFT is installed.
"""

import copy
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import yaml
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

BOS, EOS, UNKNOWN = "<s>", "</s>", "<unk>"
CHARACTERS = "0123456789+-*=#:. abcdefghijklmnopqrstuvw"
VOCABULARY = [UNKNOWN, BOS, EOS, *CHARACTERS]
FEW = {"target_modules": ["q_proj", "down_proj"]}  # adapters that compile quickly
# Settings of a run whose step is no matter: one pass over the layers, and nothing to decompose.
PLAIN = {
    "adapter": {**FEW, "start": "lora"},
    "regularizers": {"consistency": 0.0, "diversity": 0.0, "spectral": 0.0},
}
LAYERS, WIDTH, INNER, HEADS, KV_HEADS, VOCAB_SIZE, POSITIONS = 2, 16, 32, 4, 2, 48, 64
HEAD_WIDTH = WIDTH // HEADS

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": POSITIONS,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}

# Shape of every stored tensor, [out, in] as the checkpoint has them.
LINEAR = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (KV_HEADS * HEAD_WIDTH, WIDTH),
    "self_attn.v_proj": (KV_HEADS * HEAD_WIDTH, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}


def random_weights(seed=0):
    """All tensors of the checkpoint by name; large enough that no term of the loss is flat."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return (rng.standard_normal(shape) * 0.3).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": draw(VOCAB_SIZE, WIDTH),
        "lm_head.weight": draw(VOCAB_SIZE, WIDTH),
        "model.norm.weight": 1.0 + 0.1 * draw(WIDTH),
    }
    for i in range(LAYERS):
        for name, shape in LINEAR.items():
            tensors[f"model.layers.{i}.{name}.weight"] = draw(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{name}.weight"] = 1.0 + 0.1 * draw(WIDTH)
    return {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}


def write_model(folder, *, tensors=None, seed=0, **config):
    """A checkpoint folder in Hugging Face layout; keywords replace keys of its config."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(random_weights(seed) if tensors is None else tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**MODEL, **config}))
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder):
    """One token for each character, BOS in front."""
    core = Tokenizer(
        models.WordLevel({text: i for i, text in enumerate(VOCABULARY)}, unk_token=UNKNOWN)
    )
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, 1), (EOS, 2)]
    )
    core.add_special_tokens([UNKNOWN, BOS, EOS])
    core.save(str(Path(folder) / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNKNOWN,
        "model_max_length": POSITIONS,
        "clean_up_tokenization_spaces": False,
    }
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps(settings))


def sums(count, seed):
    """Rows such as ``{"question": "3+14", "answer": "#17"}``, of different lengths."""
    rng = np.random.default_rng(seed)
    numbers = rng.integers(0, 60, (count, 2)).tolist()
    return [{"question": f"{a}+{b}", "answer": f"#{a + b}"} for a, b in numbers]


def write_rows(file, rows):
    """A JSON-lines file."""
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Path(file)


def write_inputs(folder, *, rows=24, seed=0):
    """Checkpoint, training and validation rows under one folder."""
    folder = Path(folder)
    write_model(folder / "model", seed=seed)
    write_rows(folder / "train.jsonl", sums(rows, seed))
    write_rows(folder / "validation.jsonl", sums(3, seed + 1))
    return folder


def config_tree(inputs, **overrides):
    """The config of a tiny BA-LoRA run; keywords are ``section={key: value}``, merged in."""
    inputs = Path(inputs)
    tree = {
        "model": {"name_or_path": str(inputs / "model"), "remat": "none"},
        "adapter": {"start": "pissa", "rank": 2, "alpha": 3.0},
        "regularizers": {
            "consistency": 0.5,
            "diversity": 0.05,
            "spectral": 0.05,
            "top_k": 5,
            "k": 3,
        },
        "data": {
            "train": str(inputs / "train.jsonl"),
            "validation": str(inputs / "validation.jsonl"),
            "template": "{question}=",
            "prompt_column": "question",
            "response_column": "answer",
            "max_length": 16,
        },
        "training": {
            "max_steps": 4,
            "batch_size": 8,
            "accumulation": 2,
            "learning_rate": 0.05,
            "warmup": 0.0,
            "weight_decay": 0.01,
            "head_chunk": 16,
            "checkpoint_every": 2,
        },
        "eval": {"task": "none", "marker": "#", "max_new_tokens": 4, "batch_size": 2},
    }
    for section, values in overrides.items():
        tree.setdefault(section, {}).update(copy.deepcopy(values))
    return tree


def write_config(file, inputs, **overrides):
    """``config_tree`` as a YAML file; returns its path as text."""
    Path(file).write_text(yaml.safe_dump(config_tree(inputs, **overrides), sort_keys=False))
    return str(file)


def metrics_of(workdir, without=("tokens_per_second", "step_seconds", "mfu")):
    """Rows of a run's metrics, without what the clock decides."""
    lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{name: v for name, v in row.items() if name not in without} for row in rows]


def adapter_bytes(workdir):
    """The exported adapter's weights."""
    return (Path(workdir) / "adapter" / "adapter_model.safetensors").read_bytes()


def checkpoint_steps(workdir):
    """Steps of the finished checkpoints."""
    names = [child.name for child in (Path(workdir) / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdigit())


def tree_digest(folder):
    """Name and content of everything below a folder (empty folders too), and of nothing else.

    A link is what it says, not what it leads to.
    """
    folder = Path(folder)
    return {str(path.relative_to(folder)): _content(path) for path in sorted(folder.rglob("*"))}


def _content(path):
    if path.is_symlink():
        return f"link to {os.readlink(path)}"
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return "folder" if path.is_dir() else "neither file nor folder"
