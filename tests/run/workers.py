"""Processes of their own, for signals and for other numbers of devices.

The imports take seconds, so they happen once, in a fork server; each run is then a fork of it. No
device is in use before the fork, so every process may have its own devices.
"""

import json
import multiprocessing
import os
import sys
from pathlib import Path

import jax
import transformers

from balora_jax import cli, finetune
from balora_jax.io import drawing
from balora_jax.parallel import child
from tests import compiler

_ROOT = str(Path(__file__).parents[2])
# Imported now; the last one brings torch along, where that is installed.
_IMPORTED = (
    transformers.AutoTokenizer,
    transformers.PreTrainedTokenizerFast,
    transformers.LlamaConfig,
)
_TRAINING = finetune.Training


def start(target, *arguments):
    """Start ``target(*arguments)``, a function of this module, in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    before = os.environ.get("PYTHONPATH")
    # Older Pythons do not hand sys.path to the server, which then imports nothing.
    os.environ["PYTHONPATH"] = os.pathsep.join([_ROOT, *filter(None, [before])])
    try:
        process = context.Process(target=target, args=arguments)
        process.start()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return process


def command(arguments, log, cache, devices=1):
    """``balora ARGUMENTS`` on virtual CPU devices; what it prints goes to the file ``log``."""
    _prepare(log, cache, devices)
    sys.exit(cli.main(arguments))


def stuck(arguments, log, cache):
    """As :func:`command`, but the first score is one long instruction in which no handler runs."""
    _prepare(log, cache, 1)

    class Stuck(_TRAINING):
        def score(self, title):
            print("scoring", flush=True)
            forever = jax.jit(lambda x: jax.lax.while_loop(lambda x: x >= 0, lambda x: x * 0, x))
            return forever(jax.numpy.float32(1)).block_until_ready()

    finetune.Training = Stuck
    sys.exit(cli.main(arguments))


def _prepare(log, cache, devices):
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ["XLA_FLAGS"] = compiler.flags(devices)
    drawing.draw_curves = lambda rows, path: False
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def commands(runs, log, cache, devices):
    """Several commands in turn; each ``(arguments, file)`` leaves its exit code and layouts.

    The file gets ``code`` and, where it came so far, ``layouts``: for frozen, adapters, origin and
    optimizer state, of every leaf, the mesh axes of each dimension and the shape on one device.
    """
    _prepare(log, cache, devices)
    for arguments, file in runs:
        watched = _watch()
        code = cli.main(arguments)
        layouts = _layouts(watched[0]) if watched else None
        Path(file).write_text(json.dumps({"code": code, "layouts": layouts}))


def _watch():
    """A list that gets the next ``Training`` object."""
    seen = []

    class Watched(_TRAINING):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            seen.append(self)

    finetune.Training = Watched
    return seen


def _layouts(training):
    groups = {
        "frozen": training.constants.frozen,
        "origin": training.constants.origin,
        "adapters": training.state.adapters,
        "opt_state": training.state.opt_state,
    }
    return {
        group: {
            jax.tree_util.keystr(path): _layout(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for group, tree in groups.items()
    }


def _layout(leaf):
    axes = list(leaf.sharding.spec)
    axes += [None] * (leaf.ndim - len(axes))
    return {
        "axes": axes,
        "shape": list(leaf.shape),
        "local": list(leaf.addressable_shards[0].data.shape),
    }


def host(arguments, log, cache, devices, port, processes, process, parent):
    """One of several processes of ``balora ARGUMENTS``, as a child; ``parent`` is its socket."""
    _prepare(log, cache, devices)
    os.environ[child.VARIABLE] = str(parent.detach())
    start = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(processes)]
    options = ["--process", str(process), "--host-timeout", "20"]
    code = cli.main([*arguments, *start, *options])
    jax.distributed.shutdown()
    sys.exit(code)
