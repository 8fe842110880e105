"""Seconds that a start takes, layer by layer.

``python -m balora_jax.figures.start_time CONFIG [--set …] [--devices N] [--layers L]`` draws random
weights of the config's shape (or loads the checkpoint's), computes the config's start and prints
the seconds of each kind of layer: of the first, with the compilation, and the median of the others.
"""

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from balora_jax.options import Parser, add_config
from balora_jax.plan.targets import parse_target


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each kind of layer and one for the whole start."""
    parser = Parser(description=__doc__)
    add_config(parser)
    parser.add_argument("--devices", type=int, help="virtual CPU devices; those there are without")
    parser.add_argument("--layers", type=int, help="layers of the model; the checkpoint's without")
    options = parser.parse_args(arguments)
    if options.devices:
        # Read when JAX first looks for devices, which nothing has done yet.
        os.environ.update(parse_target(f"cpu:{options.devices}").environment)
    found, start, total = measured(options.config, options.set, options.layers)
    print(f"{'layer':>20}  {'count':>5}  {'shape':>14}  {'first s':>8}  {'median s':>8}")
    for name, (shape, seconds) in found.items():
        later = f"{statistics.median(seconds[1:]):8.3f}" if seconds[1:] else f"{'-':>8}"
        size = " x ".join(map(str, shape))
        print(f"{name:>20}  {len(seconds):5d}  {size:>14}  {seconds[0]:8.3f}  {later}")
    print(f"start {start}: {total:.1f} s in all", flush=True)


def measured(
    file: str, changes: Sequence[str] = (), layers: int | None = None
) -> tuple[dict[str, tuple[tuple[int, int], list[float]]], str, float]:
    """Seconds of the layers by the name of their kind, with [D, F]; the start; seconds in all."""
    import dataclasses

    import jax

    from balora_jax.bench.weights import random_arrays
    from balora_jax.config_file import load_config
    from balora_jax.plan import arguments
    from balora_jax.pretrained.checkpoint import open_base
    from balora_jax.tasks.text.program import text_program

    config = load_config(file, list(changes))
    name = config.model.name_or_path
    base = arguments.shapes_only(name)
    drawn, base = base is not None, base or open_base(name, config.model.revision)
    decoder = base.config if layers is None else dataclasses.replace(base.config, num_layers=layers)
    program = text_program(config, decoder)
    if drawn:
        frozen = random_arrays(program.plain.frozen, program)
    else:
        frozen = base.load_for(program.plain, program.mesh)
    kinds: dict[str, tuple[tuple[int, int], list[float]]] = {}
    seconds: dict[str, list[float]] = defaultdict(list)
    clock = [time.perf_counter()]
    began, waiting = clock[0], iter(modules_in_order(program.adapters.modules))

    def report(stacks: Any) -> None:
        jax.block_until_ready(stacks)
        now, module = time.perf_counter(), next(waiting)
        kind = module.path.removeprefix("layers.")
        seconds[kind].append(now - clock[0])
        kinds[kind] = (module.in_features, module.out_features), seconds[kind]
        clock[0] = now

    found = program.adapters.begin(
        frozen, config.model, program.layout, seed=config.training.seed, report=report
    )
    jax.block_until_ready(found)
    return kinds, config.adapter.start, time.perf_counter() - began


def modules_in_order(modules: Sequence[Any]) -> list[Any]:
    """Layers in the order in which a start reaches them: one stack after another."""
    paths = list(dict.fromkeys(module.path for module in modules))
    return sorted(modules, key=lambda module: paths.index(module.path))


if __name__ == "__main__":
    main()
