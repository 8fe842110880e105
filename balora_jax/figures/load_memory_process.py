"""Memory of one process while it loads a checkpoint, as the process itself sees it.

Started by :mod:`balora_jax.figures.load_memory`, in a process of its own, because the number of
virtual devices is fixed when JAX starts and because memory once used is seldom given back.
"""

import json
import math
import sys
import time
from typing import Any

import jax
import numpy as np

from balora_jax.bench.measure import reset_peak, resident
from balora_jax.config import MeshConfig
from balora_jax.io import hf_weights
from balora_jax.io.hf_files import open_tensors
from balora_jax.models.structure import structure
from balora_jax.parallel.sharding import Layout, make_mesh, replicated
from balora_jax.pretrained.checkpoint import open_base


def main(text: str) -> None:
    """Load as the options say; print the figures of each parameter as JSON."""
    options = json.loads(text)
    if options["by_device"]:
        hf_weights.on_host = lambda places: False
    pairs = (part.split("=") for part in options["mesh"].split(","))
    sizes = {axis: int(size) for axis, size in pairs}
    mesh = make_mesh(MeshConfig(**{"data": 1, "fsdp": 1, "tensor": 1} | sizes))
    base = open_base(options["folder"])
    model = structure(base.config, dtype="bfloat16")
    layout = Layout(model.axes, mesh)
    with open_tensors(base.folder) as tensors:
        stored = [math.prod(t.shape) * t.itemsize for t in tensors.values()]
    jax.block_until_ready(jax.device_put(np.zeros(1), replicated(mesh)))  # the devices are up
    held: dict[str, jax.Array] = {}
    windows = []
    for path, shape in model.frozen.items():
        window = {"path": path, "anonymous_before": resident("RssAnon")}
        window["rss_before"] = rss = reset_peak()
        window["begin"] = time.monotonic()
        held |= base.load({path: shape}, layout)
        window["end"] = time.monotonic()
        window["anonymous_after"], window["peak"] = resident("RssAnon"), resident("VmHWM")
        window["shards"] = bytes_on_devices(held[path])
        if rss is not None and window["peak"] is not None:
            window["rss_excess"] = window["peak"] - rss - window["shards"]
        windows.append(window)
    figures: dict[str, Any] = {"mesh": options["mesh"], "parameters": windows}
    print(json.dumps(figures | {"largest": max(stored), "stored": sum(stored)}))


def bytes_on_devices(array: jax.Array) -> int:
    """Bytes of an array's shards here; devices that share one host buffer count once."""
    buffers = {
        shard.data.unsafe_buffer_pointer(): shard.data.nbytes for shard in array.addressable_shards
    }
    return sum(buffers.values())


if __name__ == "__main__":
    main(sys.argv[1])
