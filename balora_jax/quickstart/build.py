"""The making of the files that ship with the quickstart.

``python -m balora_jax.quickstart.build --out DIR`` writes the text of ``generate``, builds a
byte-level BPE tokenizer on it, pretrains a Llama of under a million parameters with this package's
decoder, and saves everything in the layout of a Hugging Face checkpoint, with the task set beside
it. The text is never repeated: every training row is new.
"""

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from balora_jax.array_types import Array, Float, Int
from balora_jax.data.templates import ALPACA
from balora_jax.models.families.base import read_config, weight_rules
from balora_jax.models.structure import Structure, structure
from balora_jax.quickstart import generate

SEED = 7
STEPS = 6000
BATCH_ROWS = 8
ROW_TOKENS = 128
PEAK_LEARNING_RATE = 2.5e-3
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.05
INIT_STD = 0.02

UNK, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"
UNK_ID, BOS_ID, EOS_ID, PAD_ID = range(4)
VOCAB_SIZE = 640
TOKENIZER_DOCUMENTS = 20_000

MODEL_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "initializer_range": INIT_STD,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
    "use_cache": True,
    "torch_dtype": "bfloat16",
}
GENERATION_CONFIG = {
    "_from_model_config": True,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
    "do_sample": False,
}
SPECIAL_TOKENS = {"unk_token": UNK, "bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
TOKENIZER_CONFIG = {
    **SPECIAL_TOKENS,
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": MODEL_CONFIG["max_position_embeddings"],
    "clean_up_tokenization_spaces": False,
    "padding_side": "left",
}


def build_tokenizer() -> Tokenizer:
    """Byte-level BPE in which every digit is a token; encoding puts BOS in front.

    Returns:
      A tokenizer that reads any text: bytes without an entry of their own do not exist.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[UNK, BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # The tokenizer sees the task's prompts, so that they cost few tokens; the model does not.
    rows, _ = generate.task_rows()
    prompts = (ALPACA.format(**row) + row["output"] for row in rows)
    text = itertools.islice(generate.documents(SEED), TOKENIZER_DOCUMENTS)
    tokenizer.train_from_iterator(itertools.chain(text, prompts), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, BOS_ID)],
    )
    return tokenizer


def packed_rows(tokenizer: Tokenizer, seed: int) -> Iterator[np.ndarray]:
    """Yield rows of whole documents, padded.

    Args:
      tokenizer: puts BOS in front of each document; EOS is added here.
      seed: of the text.

    Yields:
      int32 [3, T]: token ids, positions within the document, and the document's number in the
      row (0 is padding).
    """
    texts = generate.documents(seed)
    row, used, segment = _empty_row(), 0, 0
    while True:
        for encoding in tokenizer.encode_batch(list(itertools.islice(texts, 4096))):
            ids = [*encoding.ids, EOS_ID]
            end = used + len(ids)
            if end > ROW_TOKENS:
                yield row
                row, used, segment, end = _empty_row(), 0, 0, len(ids)
            segment += 1
            row[:, used:end] = (ids, range(len(ids)), [segment] * len(ids))
            used = end


def _empty_row() -> np.ndarray:
    row = np.zeros((3, ROW_TOKENS), np.int32)
    row[0] = PAD_ID
    return row


def initial_weights(model: Structure, seed: int) -> dict[str, Array]:
    """Draw the weights a Llama starts from: normal, norms at one, outputs of blocks smaller."""
    key = jax.random.key(seed)
    depth = MODEL_CONFIG["num_hidden_layers"]
    weights = {}
    for i, (path, leaf) in enumerate(sorted(model.frozen.items())):
        if path.endswith(".scale"):
            weights[path] = jnp.ones(leaf.shape, jnp.float32)
            continue
        residual = path.endswith(("o_proj.kernel", "down_proj.kernel"))
        std = INIT_STD / (2 * depth) ** 0.5 if residual else INIT_STD
        weights[path] = std * jax.random.normal(jax.random.fold_in(key, i), leaf.shape)
    return weights


def next_token_loss(
    weights: dict[str, Array], batch: Int[Array, "three B T"], model: Structure
) -> Float[Array, ""]:
    """Mean cross-entropy of every token but the first of each document."""
    ids, positions, segments = batch[0], batch[1], batch[2]
    decoder = model.bind(weights)
    logits = decoder.logits(decoder.hidden(ids, positions, segments))[:, :-1]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
    counted = (segments[:, 1:] > 0) & (segments[:, 1:] == segments[:, :-1])
    return jnp.sum(losses * counted) / jnp.sum(counted)


def optimizer() -> optax.GradientTransformation:
    """AdamW under a warm-up and a cosine; norms do not decay."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, PEAK_LEARNING_RATE, WARMUP_STEPS, STEPS, end_value=0.01 * PEAK_LEARNING_RATE
    )

    def decays(weights: dict[str, Array]) -> dict[str, bool]:
        return {path: not path.endswith(".scale") for path in weights}

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=WEIGHT_DECAY, mask=decays),
    )


def pretrain(tokenizer: Tokenizer, model: Structure) -> dict[str, Array]:
    """Train the weights from nothing; prints the loss every 200 steps."""
    tx = optimizer()
    weights = initial_weights(model, SEED)
    state = tx.init(weights)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(weights, state, batch):
        loss, gradient = jax.value_and_grad(next_token_loss)(weights, batch, model)
        updates, state = tx.update(gradient, state, weights)
        return optax.apply_updates(weights, updates), state, loss

    rows = packed_rows(tokenizer, SEED + 1)
    recent, start = [], time.monotonic()
    for number in range(1, STEPS + 1):
        batch = np.stack(list(itertools.islice(rows, BATCH_ROWS)), axis=1)
        weights, state, loss = step(weights, state, batch)
        recent.append(loss)
        if number % 200 == 0 or number == STEPS:
            mean, seconds = float(np.mean(recent)), time.monotonic() - start
            print(f"step {number}/{STEPS}: loss {mean:.4f}, {seconds:.0f} s", flush=True)
            recent.clear()
    return weights


def save_checkpoint(folder: Path, tokenizer: Tokenizer, weights: dict[str, Array]) -> None:
    """Write a checkpoint in the Hugging Face layout, weights in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {}
    for rule in weight_rules(read_config(MODEL_CONFIG, "build")):
        value = np.asarray(weights[rule.path].astype(jnp.bfloat16))
        if not rule.stacked:
            tensors[rule.name] = value
            continue
        for name, layer in zip(rule.names(len(value)), value, strict=True):
            tensors[name] = np.ascontiguousarray(layer.T if rule.transpose else layer)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "config.json", MODEL_CONFIG)
    _write_json(folder / "generation_config.json", GENERATION_CONFIG)
    _write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    _write_json(folder / "special_tokens_map.json", SPECIAL_TOKENS)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Build everything into a folder."""
    parser = argparse.ArgumentParser(description="Make the quickstart's checkpoint and task set.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    out: Path = parser.parse_args().out
    start = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    generate.write_task(out)
    tokenizer = build_tokenizer()
    model = structure(read_config(MODEL_CONFIG, "build"))
    count = sum(int(np.prod(leaf.shape)) for leaf in model.frozen.values())
    print(f"{count:,} parameters, {tokenizer.get_vocab_size()} tokens", flush=True)
    save_checkpoint(out / "model", tokenizer, pretrain(tokenizer, model))
    print(f"wrote {out} in {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
