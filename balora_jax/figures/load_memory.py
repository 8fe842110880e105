"""Host memory that loading a checkpoint takes, beside what lies on the devices.

``python -m balora_jax.figures.load_memory [--gib 2] [--devices 8] [--mesh fsdp=8 …] [--json FILE]``
writes a random sharded checkpoint to a temporary folder, loads it in a fresh process on virtual CPU
devices, and compares the excess with the bound of :mod:`balora_jax.io.hf_weights`.

The parameters are loaded one after another, as a run with a quantised base does, so that each has
an excess of its own: the most anonymous memory (``RssAnon``: the program's own) at any time of its
load that is neither there before nor its blocks on the devices, which on a CPU are anonymous too.
This process reads that a thousand times a second from outside. The growth of ``VmHWM``, the
kernel's own peak, is exact but has the mapped pages of the files in it, which the kernel may drop.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from balora_jax.figures.watched import Samples, watched
from balora_jax.plan.targets import parse_target

ALLOWANCE = 6 * 2**20
"""Bytes that Python and the allocator may add: programs, index tables, freed pages kept."""

_FILE_BYTES = 256 * 2**20


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each mesh; exit code 1 where a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=2.0, help="size of the checkpoint")
    parser.add_argument("--devices", type=int, default=8, help="virtual CPU devices")
    parser.add_argument("--mesh", nargs="+", metavar="AXIS=N,…", help="such as tensor=2,fsdp=4")
    parser.add_argument(
        "--by-device", action="store_true", help="write pieces on the device, as on an accelerator"
    )
    parser.add_argument("--json", metavar="FILE", help="the figures as JSON")
    options = parser.parse_args(arguments)
    half = options.devices // 2
    meshes = options.mesh or [f"fsdp={options.devices}", f"tensor=2,fsdp={half}"]
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), options.gib)
        how = {"devices": options.devices, "by_device": options.by_device}
        rows = [measured(folder, mesh, **how) for mesh in meshes]
    print(_table(rows), flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if not all(row["holds"] for row in rows):
        raise SystemExit(1)


def llama_shape(gib: float) -> dict[str, Any]:
    """The ``config.json`` of a Llama of about this size in bfloat16."""
    width = 2048 if gib >= 1 else 512
    inner, vocabulary = width * 43 // 16, 16 * width
    layer = 2 * (4 * width**2 + 3 * width * inner)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "num_hidden_layers": max(1, round((gib * 2**30 - 4 * vocabulary * width) / layer)),
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }


def write_checkpoint(folder: Path, gib: float) -> None:
    """Random finite bfloat16 weights in several files; one file at a time is in memory."""
    raw = llama_shape(gib)
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    rng, index, held, size = np.random.default_rng(0), {}, {}, 0

    def flush() -> None:
        name = f"model-{len(set(index.values())) + 1:05d}.safetensors"
        save_file(held, folder / name)
        index.update(dict.fromkeys(held, name))
        held.clear()

    for name, shape in _tensors(raw):
        bits = rng.integers(0, 2**16, shape, np.uint16)
        # Any sign and fraction, exponents of 2⁻⁷ and 2⁻⁶: no infinity and no NaN.
        held[name] = ((bits & 0x80FF) | 0x3C00).view(ml_dtypes.bfloat16)
        size += bits.nbytes
        if size >= _FILE_BYTES:
            flush()
            size = 0
    if held:
        flush()
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _tensors(raw: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, inner, vocabulary = raw["hidden_size"], raw["intermediate_size"], raw["vocab_size"]
    yield "model.embed_tokens.weight", (vocabulary, width)
    for i in range(raw["num_hidden_layers"]):
        for name in "qkvo":
            yield f"model.layers.{i}.self_attn.{name}_proj.weight", (width, width)
        yield f"model.layers.{i}.mlp.gate_proj.weight", (inner, width)
        yield f"model.layers.{i}.mlp.up_proj.weight", (inner, width)
        yield f"model.layers.{i}.mlp.down_proj.weight", (width, inner)
        yield f"model.layers.{i}.input_layernorm.weight", (width,)
        yield f"model.layers.{i}.post_attention_layernorm.weight", (width,)
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (vocabulary, width)


def measured(
    folder: str, mesh: str, *, devices: int = 8, by_device: bool = False
) -> dict[str, Any]:
    """Load in a process of its own and watch it.

    Args:
        folder: of the checkpoint.
        mesh: sizes of its axes, such as ``tensor=2,fsdp=4``.
        devices: virtual CPU devices.
        by_device: put blocks together on the devices, as an accelerator does.

    Returns:
        Bytes: ``stored`` (in the files), ``shards`` (on all devices), ``largest`` (tensor of the
        files), ``bound``, ``excess`` (most anonymous memory beside the shards) and the
        ``parameter`` it belongs to, ``rss_excess`` (with mapped pages); ``anonymous`` and ``rss``,
        the growth over the whole load. Whether the bound ``holds``; ``seconds`` and
        ``megabytes_per_second`` (as stored, read from the page cache).
    """
    options = json.dumps({"folder": folder, "mesh": mesh, "by_device": by_device})
    environment = os.environ | parse_target(f"cpu:{devices}").environment
    command = [sys.executable, "-m", "balora_jax.figures.load_memory_process", options]
    return _row(*watched(command, environment))


def _row(found: dict[str, Any], samples: Samples) -> dict[str, Any]:
    windows = found["parameters"]
    for window in windows:
        inside = [size for when, size in samples if window["begin"] <= when <= window["end"]]
        peak = max([*inside, window["anonymous_after"]])
        window["excess"] = peak - window["anonymous_before"] - window["shards"]
    worst = max(windows, key=lambda window: window["excess"])
    seconds = sum(window["end"] - window["begin"] for window in windows)
    before = windows[0]["anonymous_before"]
    bound = max(1.2 * found["largest"], 10 * 2**20) + ALLOWANCE
    return {
        "mesh": found["mesh"],
        "stored": found["stored"],
        "shards": sum(window["shards"] for window in windows),
        "largest": found["largest"],
        "bound": int(bound),
        "excess": worst["excess"],
        "parameter": worst["path"],
        "rss_excess": max(window["rss_excess"] for window in windows),
        "anonymous": max(size for when, size in samples if when <= windows[-1]["end"]) - before,
        "rss": windows[-1]["peak"] - windows[0]["rss_before"],
        "holds": worst["excess"] <= bound,
        "seconds": round(seconds, 2),
        "megabytes_per_second": round(found["stored"] / seconds / 1e6),
    }


def _table(rows: Sequence[dict[str, Any]]) -> str:
    titles = {
        "stored": "files", "shards": "on devices", "anonymous": "anonymous", "rss": "RSS",
        "largest": "largest", "excess": "excess", "rss_excess": "with pages", "bound": "bound",
    }  # fmt: skip
    lines = [
        "MiB; growth of anonymous memory and of RSS, excess of one parameter beside its shards"
    ]
    lines.append(f"{'mesh':>16}" + "".join(f"  {title:>10}" for title in titles.values()))
    for row in rows:
        cells = "".join(f"  {row[name] / 2**20:10.1f}" for name in titles)
        verdict = "holds" if row["holds"] else f"BROKEN by {row['parameter']}"
        speed = f"{row['seconds']:.1f} s, {row['megabytes_per_second']} MB/s"
        lines.append(f"{row['mesh']:>16}{cells}  {verdict}, {speed}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
