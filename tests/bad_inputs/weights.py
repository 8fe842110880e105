"""Safetensors and their index, and PEFT adapters."""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.bad_inputs.case import Arguments, Case, Place
from tests.bad_inputs.values import KINDS, deep
from tests.tiny_run import random_weights

ONE = "model.norm.weight"
APART = ("header-deep", "header-size-1GB", "name-1MB")


def cases() -> Iterator[Case]:
    """All of them."""
    for name, edit in FILES.items():
        yield Case(f"st/{name}", _bytes(edit), apart=name in APART, stop="tensors")
    for name, edit in HEADERS.items():
        unsure = name in UNSURE
        make = _bytes(lambda data, edit=edit: _with_header(data, edit))
        yield Case(f"st/{name}", make, "any" if unsure else "refuse", stop="tensors")
    for name, change in TENSORS.items():
        yield Case(f"st/{name}", _tensors(change), stop="tensors")
    for name, change in INSTEAD.items():
        yield Case(f"st/{name}", _instead(change), apart=name.endswith("fifo"), stop="tensors")
    for name, content in INDEXES.items():
        # A shard is read whole, as transformers does: what the index leaves out of it is there.
        unsure = name in ("extra-keys", "name-unknown", "self-folder", "part-missing")
        expect = "any" if unsure else "refuse"
        yield Case(f"ix/{name}", _index(content), expect, stop="tensors")
    yield from _adapters()


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _joined(header: bytes, rest: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + rest


def _with_header(data: bytes, edit: Callable[[dict[str, Any]], Any]) -> bytes:
    header, rest = _split(data)
    found = edit(header)
    header = header if found is None else found
    text = header if isinstance(header, str) else json.dumps(header)
    return _joined(text.encode(), rest)


FILES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "seven-bytes": lambda data: data[:7],
    "header-cut": lambda data: data[:100],
    "cut": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "text": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "pickle": lambda data: b"\x80\x04\x95\x10\0\0\0\0\0\0\0",
    "zip": lambda data: b"PK\x03\x04" + data,
    "header-size-huge": lambda data: struct.pack("<Q", 2**63) + data[8:],
    "header-size-1GB": lambda data: struct.pack("<Q", 2**30) + data[8:],
    "header-no-json": lambda data: _joined(b"{" * 64, data),
    "header-list": lambda data: _joined(b"[]", b""),
    "header-deep": lambda data: _joined(deep('{"a":', "}", 50_000, "1").encode(), b""),
    "header-utf8": lambda data: _joined(b'{"\xff": {}}', b""),
    "no-tensors": lambda data: _joined(b"{}", b""),
    "name-1MB": lambda data: _with_header(
        data, lambda h: {("n" * 10**6 if k == ONE else k): v for k, v in h.items()}
    ),
    "name-escape": lambda data: _with_header(
        data, lambda h: {("\x1b[2J\n" if k == ONE else k): v for k, v in h.items()}
    ),
    "names-many": lambda data: _with_header(data, _many),
}
UNSURE = ("metadata-odd", "metadata-huge", "key-unknown")
HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "offsets-beyond": lambda h: h[ONE].update(data_offsets=[0, 10**12]),
    "offsets-swapped": lambda h: h[ONE].update(data_offsets=h[ONE]["data_offsets"][::-1]),
    "offsets-negative": lambda h: h[ONE].update(data_offsets=[-64, 0]),
    "offsets-overlap": lambda h: h[ONE].update(data_offsets=h["lm_head.weight"]["data_offsets"]),
    "offsets-text": lambda h: h[ONE].update(data_offsets=["0", "64"]),
    "shape-negative": lambda h: h[ONE].update(shape=[-16]),
    "shape-overflow": lambda h: h[ONE].update(shape=[2**62, 4]),
    "shape-text": lambda h: h[ONE].update(shape=["16"]),
    "shape-other": lambda h: h[ONE].update(shape=[4, 4]),
    "shape-scalar": lambda h: h[ONE].update(shape=[]),
    "dtype-unknown": lambda h: h[ONE].update(dtype="F7"),
    "dtype-int": lambda h: h[ONE].update(dtype="I32"),
    "dtype-f8": lambda h: h[ONE].update(dtype="F8_E4M3", shape=[64]),
    "dtype-none": lambda h: h[ONE].pop("dtype") and None,
    "entry-list": lambda h: h.update({ONE: [1]}),
    "metadata-odd": lambda h: h.update(__metadata__={"a": 1}),
    "metadata-huge": lambda h: h.update(__metadata__={"a": "x" * 10**6}),
    "key-unknown": lambda h: h[ONE].update(extra=1),
}


def _many(header: dict[str, Any]) -> dict[str, Any]:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    return {**{f"extra.{i}": empty for i in range(20_000)}, **header}


TENSORS: dict[str, Callable[[dict[str, np.ndarray]], Any]] = {
    "missing": lambda t: t.pop(ONE) is None,
    "extra": lambda t: t.update(extra=np.zeros(1, np.float32)),
    "misshaped": lambda t: t.update({ONE: np.zeros((2, 2), np.float32)}),
    "whole-numbers": lambda t: t.update({ONE: np.ones(16, np.int32)}),
    "bools": lambda t: t.update({ONE: np.ones(16, np.bool_)}),
    "layer-more": lambda t: t.update(
        {"model.layers.2.mlp.up_proj.weight": np.zeros((32, 16), np.float32)}
    ),
    "all-renamed": lambda t: [t.update({f"x.{k}": t.pop(k)}) for k in list(t)],
    "quantized": lambda t: t.update({f"{ONE}.qweight": np.zeros(16, np.int32)}),
}


def _bytes(edit: Callable[[bytes], bytes]):
    def make(place: Place) -> Arguments:
        file = place.text / "model" / "model.safetensors"
        file.write_bytes(edit(file.read_bytes()))
        return place.train()

    return make


def _tensors(change: Callable[[dict[str, np.ndarray]], Any]):
    def make(place: Place) -> Arguments:
        file = place.text / "model" / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        return place.train()

    return make


def _instead(change: Callable[[Path], Any]):
    def make(place: Place) -> Arguments:
        file = place.text / "model" / "model.safetensors"
        change(file)
        return place.train()

    return make


def _fifo(file: Path) -> None:
    import os

    file.unlink()
    os.mkfifo(file)


_TORCH = "pytorch_model.bin"


def _torch(file: Path, pickled: bytes) -> None:
    import zipfile

    file.unlink()
    with zipfile.ZipFile(file.with_name(_TORCH), "w") as archive:
        archive.writestr("archive/data.pkl", pickled)


INSTEAD: dict[str, Callable[[Path], Any]] = {
    "gone": lambda file: file.unlink(),
    "only-pickled": lambda file: file.rename(file.with_name("pytorch_model.pt")),
    "torch-no-pickle": lambda file: file.rename(file.with_name(_TORCH)),
    "torch-system": lambda file: _torch(
        file, b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R."
    ),
    "torch-inst": lambda file: _torch(file, b"(S'true'\niposix\nsystem\n."),
    "torch-number": lambda file: _torch(file, b"\x80\x02K\x01."),
    "torch-empty": lambda file: _torch(file, b"\x80\x02}."),
    "torch-text": lambda file: (file.unlink(), file.with_name(_TORCH).write_bytes(b"\xff")),
    "torch-folder": lambda file: (file.unlink(), file.with_name(_TORCH).mkdir()),
    "torch-fifo": lambda file: _fifo(file.rename(file.with_name(_TORCH))),
    "torch-device": lambda file: (file.unlink(), file.with_name(_TORCH).symlink_to("/dev/zero")),
    "folder": lambda file: (file.unlink(), file.mkdir()),
    "link-loop": lambda file: (file.unlink(), file.symlink_to(file.name)),
    "fifo": _fifo,
    "device": lambda file: (file.unlink(), file.symlink_to("/dev/zero")),
}

_SHARD = "a.safetensors"
INDEXES: dict[str, Any] = {
    "empty": {},
    "no-map": {"metadata": {}},
    "map-list": {"weight_map": [_SHARD]},
    "map-empty": {"weight_map": {}},
    "map-int": {"weight_map": 7},
    "file-int": {"weight_map": dict.fromkeys(random_weights(), 7)},
    "file-list": {"weight_map": {key: [_SHARD] for key in random_weights()}},
    "file-null": {"weight_map": dict.fromkeys(random_weights())},
    "up": {"weight_map": dict.fromkeys(random_weights(), "../secret.safetensors")},
    "absolute": {"weight_map": dict.fromkeys(random_weights(), "/etc/hostname")},
    "windows": {"weight_map": dict.fromkeys(random_weights(), "C:\\a.safetensors")},
    "nul": {"weight_map": dict.fromkeys(random_weights(), "a\0b")},
    "escape": {"weight_map": dict.fromkeys(random_weights(), "\x1b[2J\n.safetensors")},
    "long": {"weight_map": dict.fromkeys(random_weights(), "x" * 5000)},
    "dot": {"weight_map": dict.fromkeys(random_weights(), ".")},
    "blank": {"weight_map": dict.fromkeys(random_weights(), "")},
    "missing-shard": {"weight_map": dict.fromkeys(random_weights(), "b.safetensors")},
    "missing-shards": {"weight_map": {k: f"{i}.st" for i, k in enumerate(random_weights())}},
    "many-shards": {"weight_map": {f"t{i}": f"{i}.safetensors" for i in range(20_000)}},
    "json-shard": {"weight_map": dict.fromkeys(random_weights(), "config.json")},
    "part-missing": {"weight_map": {k: _SHARD for k in list(random_weights())[1:]}},
    "name-unknown": {"weight_map": dict.fromkeys([*random_weights(), "more"], _SHARD)},
    "extra-keys": {"weight_map": dict.fromkeys(random_weights(), _SHARD), "x": 1},
    "self-folder": {"weight_map": dict.fromkeys(random_weights(), f"./{_SHARD}")},
    "list": [1],
    "no-json": '{"weight_map": ',
    "deep": deep("[", "]", 100_000),
    "deep-map": '{"weight_map": ' + deep('{"a":', "}", 100_000, "1") + "}",
}  # fmt: skip


def _index(content: Any):
    def make(place: Place) -> Arguments:
        model = place.text / "model"
        (model / "model.safetensors").rename(model / _SHARD)
        text = content if isinstance(content, str) else json.dumps(content)
        (model / "model.safetensors.index.json").write_text(text)
        return place.train()

    return make


SETTINGS = {
    "r": ("zero", "neg", "str", "float", "nan", "list", "dict", "null", "1e30", "int"),
    "lora_alpha": ("zero", "neg", "str", "nan", "inf", "list", "dict", "null", "1e30"),
    "rank_pattern": ("str", "list", "float", "int", "bool"),
    "alpha_pattern": ("str", "list", "float", "int", "bool"),
    "modules_to_save": ("int", "str", "dict", "float", "bool", "deep-list"),
    "peft_type": ("int", "str", "list", "dict", "null", "escape", "long"),
    "bias": ("int", "str", "list", "bool"),
    "use_rslora": ("str", "list", "int"),
    "use_dora": ("str", "list", "int", "bool"),
    "init_lora_weights": ("str", "int", "list", "dict"),
    "task_type": ("int", "list", "escape"),
    "target_modules": ("int", "dict", "escape"),
    "layer_replication": ("int", "str", "list"),
    "fan_in_fan_out": ("str", "list", "bool"),
    "lora_dropout": ("str", "nan", "list"),
}
SURE = {
    *(f"r-{k}" for k in ("zero", "neg", "str", "float", "nan", "list", "dict", "null", "1e30")),
    *(f"lora_alpha-{k}" for k in ("str", "nan", "inf", "list", "dict", "null")),
    *(f"peft_type-{k}" for k in SETTINGS["peft_type"]),
}


def _adapters() -> Iterator[Case]:
    for key, kinds in SETTINGS.items():
        for kind in kinds:
            expect = "refuse" if f"{key}-{kind}" in SURE else "any"
            yield Case(f"ad/{key}-{kind}", _adapter({key: KINDS[kind]}), expect)
    yield Case("ad/rank-0", _adapter({"r": 0}))
    yield Case("ad/rank_pattern-3", _adapter({"rank_pattern": 5}), "any")
    yield Case("ad/modules_to_save-0", _adapter({"modules_to_save": 5}), "any")
    evil, open_ = {"(([a-z_.0-9]+)+)+!": 2}, {"(": 2}
    for pattern in ("rank_pattern", "alpha_pattern"):
        yield Case(f"ad/{pattern}-redos", _adapter({pattern: evil}), "any", apart=True)
        yield Case(f"ad/{pattern}-open", _adapter({pattern: open_}))
        for kind in ("str", "zero", "list", "nan", "null", "1e30"):
            keys = {pattern: {".*": KINDS[kind]}}
            # To PEFT an alpha of 0 is one, as it is under lora_alpha.
            expect = "any" if (pattern, kind) == ("alpha_pattern", "zero") else "refuse"
            yield Case(f"ad/{pattern}-value-{kind}", _adapter(keys), expect)
    for name, content in {
        "no-json": "{", "list": "[]", "deep": deep("[", "]", 100_000), "null": "null", "nul": "\0",
    }.items():  # fmt: skip
        yield Case(f"ad/{name}", _adapter_file("adapter_config.json", content.encode()))
    for name, content in {"weights-empty": b"", "weights-text": b"not weights"}.items():
        yield Case(f"ad/{name}", _adapter_file("adapter_model.safetensors", content))
    for verb in ("eval", "generate"):
        make = _adapter({"r": "x"}, verb)
        yield Case(f"ad/{verb}-r-str", make)


def _command(place: Place, verb: str) -> Arguments:
    if verb == "train":
        start = {"start": str(place.adapter)}
        return place.train(place.text_tree(adapter=start))
    config = place.config(place.text_tree(eval={"task": "exact_match"}))
    more = ["--prompt", "1+1"] if verb == "generate" else []
    return [verb, config, "--adapter", place.adapter, *more]


def _adapter(keys: dict[str, Any], verb: str = "train"):
    def make(place: Place) -> Arguments:
        place.edit(place.adapter / "adapter_config.json", lambda found: {**found, **keys})
        return _command(place, verb)

    return make


def _adapter_file(name: str, content: bytes):
    def make(place: Place) -> Arguments:
        (place.adapter / name).write_bytes(content)
        return _command(place, "train")

    return make
