"""Bytes that a quantised base saves, and the error of its logits before anything trains.

``python -m balora_jax.figures.quantization CONFIG [--set …]`` prints the bytes of the frozen
weights from shapes alone, in all and on each device of the config's mesh, and, where the
checkpoint has weights, the error of the pretrained model's logits on a batch of the config's own
data.
"""

from collections.abc import Sequence
from typing import Any, get_args

import jax
import numpy as np

from balora_jax.config import MeshConfig, RunConfig
from balora_jax.config_file import load_config
from balora_jax.errors import InputError
from balora_jax.models.quantized import Quantization, bytes_of
from balora_jax.models.structure import Structure, structure
from balora_jax.options import Parser, add_config
from balora_jax.parallel import sharding
from balora_jax.plan.arguments import shapes_only
from balora_jax.tasks.labels import run as labels_run
from balora_jax.tasks.labels import score as labels_score
from balora_jax.tasks.registry import TASKS


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table with a line for each way of holding the weights."""
    parser = Parser(description=__doc__)
    add_config(parser)
    options = parser.parse_args(arguments)
    reference = None
    print(f"{'weights':>10}  {'GiB':>8}  {'a device':>8}  {'largest error':>13}  {'rms error':>9}")
    for kind in get_args(Quantization):
        config = load_config(options.config, [*options.set, f"model.quantization={kind}"])
        try:
            model, logits = measured(config)
        except InputError as error:
            print(f"{kind:>10}  {error}")
            continue
        name = config.model.dtype if kind == "none" else kind
        line = f"{name:>10}  {bytes_of(model.frozen) / 2**30:8.3f}"
        line += f"  {on_a_device(config.mesh, model):8.3f}"
        if logits is not None and reference is not None:
            error = (logits - reference) / np.ptp(reference)
            line += f"  {np.abs(error).max():13.2%}  {np.sqrt(np.mean(error**2)):9.3%}"
        reference = logits if kind == "none" else reference
        print(line, flush=True)


def on_a_device(mesh: MeshConfig, model: Structure) -> float:
    """GiB of frozen arrays on each device of the config's mesh."""
    layout = sharding.Layout(model.axes, sharding.make_mesh(mesh))
    shards = {
        path: jax.ShapeDtypeStruct(layout(path, leaf.shape).shard_shape(leaf.shape), leaf.dtype)
        for path, leaf in model.frozen.items()
    }
    return bytes_of(shards) / 2**30


def measured(config: RunConfig) -> tuple[Structure, np.ndarray | None]:
    """The model's structure; logits [rows, C] or [tokens, V], float32, if any."""
    shapes = shapes_only(config.model.name_or_path)
    if shapes is not None:
        options: Any = {"dtype": config.model.dtype, "quantization": config.model.quantization}
        return structure(shapes.config, **options), None
    run: Any = TASKS[config.task].check(config)
    frozen = run.base.load_for(run.plain, run.mesh)
    batch = next(run.batches())
    if isinstance(run, labels_run.LabelsRun):
        head = run.base.load_head(jax.random.key(config.training.seed))
        names = ("input_ids", "attention_mask", "token_type_ids")
        forward = labels_score.logits_forward(run.plain.bind)
        logits = np.asarray(forward((frozen, head), *(batch[name][0] for name in names)))
    else:
        names, valid = ("input_ids", "segment_ids"), batch["segment_ids"][0] > 0
        forward = jax.jit(lambda parts, *arrays: run.plain.bind(*parts)(*arrays))
        logits = np.asarray(forward((frozen,), *(batch[name][0] for name in names)))[valid]
    return run.plain, logits


if __name__ == "__main__":
    main()
