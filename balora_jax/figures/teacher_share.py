"""Time that a kept or sampled teacher saves, and the noise that the sample adds to the gradient.

``python -m balora_jax.figures.teacher_share CONFIG --rounds 8`` takes steps in turn and prints CPU
seconds. ``… CONFIG --draws 16 --steps 30`` trains first, then prints how far gradients on a share
of the rows are from that on all rows, beside how far those of batches are from each other.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from balora_jax.options import Parser, add_config

SHARES = (0.5, 0.25)
FRACTION, CACHE = "regularizers.teacher_fraction", "regularizers.teacher_cache"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one of the tables."""
    parser = Parser(description=__doc__)
    add_config(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--rounds", type=int, help="steps of each case, timed")
    what.add_argument("--draws", type=int, help="samples of rows of each batch")
    parser.add_argument("--steps", type=int, default=30, help="steps before the draws")
    parser.add_argument("--batches", type=int, default=8, help="batches that are compared")
    options = parser.parse_args(arguments)
    if options.rounds:
        print(f"{'case':>32}  {'CPU s':>7}  {'over LoRA':>9}")
        for name, (seconds, ratio) in times(options.config, options.set, options.rounds).items():
            print(f"{name:>32}  {seconds:7.3f}  {ratio:9.3f}", flush=True)
        return
    print(f"{'relative standard deviation':>32}  {'consistency':>11}  {'whole':>9}")
    found = noise(options.config, options.set, options.steps, options.draws, options.batches)
    for name, (term, whole) in found.items():
        print(f"{name:>32}  {term:11.4f}  {whole:9.5f}", flush=True)


def times(file: str, changes: Sequence[str], rounds: int) -> dict[str, tuple[float, float]]:
    """Median CPU seconds of a step by case, and the median of its ratios to LoRA's in a round."""
    from balora_jax.bench.cases import Case, published
    from balora_jax.bench.weights import weights_of
    from balora_jax.config_file import load_config

    config = load_config(file, list(changes))
    base, weights = weights_of(config, full=True)
    terms, half, fourth = published(), {FRACTION: 0.5}, {FRACTION: 0.25}
    cases = (
        Case("LoRA", "lora", ()),
        Case("BA-LoRA", None, terms),
        Case("teacher_fraction 0.5", None, terms, half),
        Case("teacher_fraction 0.25", None, terms, fourth),
        Case("teacher_cache", None, terms, {CACHE: True}),
        Case("teacher_cache, fraction 0.25", None, terms, {CACHE: True} | fourth),
    )
    steps = {case.name: _step(config, case, base, weights) for case in cases}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            began = time.process_time()
            step()
            if number:
                seconds[name].append(time.process_time() - began)
    lora = seconds["LoRA"]
    return {
        name: (
            statistics.median(found),
            statistics.median(a / b for a, b in zip(found, lora, strict=True)),
        )
        for name, found in seconds.items()
    }


def _step(config: Any, case: Any, base: Any, weights: Any) -> Callable[[], Any]:
    """A compiled step of a case on the batch that all share."""
    import jax
    import numpy as np

    from balora_jax.bench.cases import configured
    from balora_jax.bench.measure import text_step
    from balora_jax.bench.weights import loaded_for
    from balora_jax.tasks.text.loss import HIDDEN, READ
    from balora_jax.tasks.text.program import text_program

    program = text_program(configured(config, case), base.config)
    loaded, batch = loaded_for(program, weights), dict(weights.batches[0])
    if program.keeps_teacher:
        forward = jax.jit(lambda frozen, *tokens: program.plain.bind(frozen).hidden(*tokens))
        with jax.set_mesh(program.mesh):
            each = [
                forward(loaded.frozen, *(batch[name][i] for name in READ))
                for i in range(len(batch["input_ids"]))
            ]
        batch[HIDDEN] = np.stack([np.asarray(hidden) for hidden in each])
    return text_step(program, loaded, [batch])


def noise(
    file: str, changes: Sequence[str], steps: int, draws: int, batches: int
) -> dict[str, tuple[float, float]]:
    """Relative standard deviations of gradients: of the consistency term and of the whole loss.

    ``between batches`` is that of the gradient on all rows over batches; each share is that of the
    gradient on a sample of a batch's rows over draws, in the mean over the batches.
    """
    from balora_jax.config_file import load_config
    from balora_jax.tasks.text import run as text_run

    run = text_run.check(load_config(file, list(changes)))
    trained, given, constants = _trained(run, steps, batches)
    on_all = _gradients(run, 1.0, trained, constants)
    whole = [on_all(batch, 1)[0] for batch in given]
    table = {"between batches": _deviation(whole, None)}
    for share in SHARES:
        on_some = _gradients(run, share, trained, constants)
        pairs = zip(given, whole, strict=True)
        each = [_deviation(on_some(batch, draws), one) for batch, one in pairs]
        table[f"a share of {share}"] = (
            statistics.fmean(term for term, _ in each),
            statistics.fmean(loss for _, loss in each),
        )
    return table


def _trained(run: Any, steps: int, batches: int) -> tuple[Any, list[Any], Any]:
    """What trains after some steps, batches [B, T] that come next, and the constants."""
    import jax

    from balora_jax.training import steps as training_steps

    parts, mesh = run.step_parts(max(steps, 1)), run.mesh
    with jax.set_mesh(mesh):
        loaded = run.load()
        constants, source = run.constants(loaded), run.batches()
        state = training_steps.initial_state(loaded.trainable, parts.optimizer, mesh)
        step = training_steps.compile_step(parts, state, mesh)
        key = jax.random.key(run.config.training.seed)
        for _ in range(steps):
            batch = training_steps.place_batch(next(source), mesh)
            state, _ = step(state, constants, batch, key)
        given = [training_steps.place_batch(next(source), mesh) for _ in range(batches)]
    return state.adapters, given, constants


def _gradients(
    run: Any, share: float, trained: Any, constants: Any
) -> Callable[[Any, int], list[tuple[Any, Any]]]:
    """``(batch, draws)`` -> gradients of consistency and of the whole loss, float64 and flat."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from balora_jax.numerics.objective import TASK
    from balora_jax.numerics.terms import TERMS
    from balora_jax.tasks.text.sample import Share

    parts = run.step_parts(1)
    loss = _replaced(parts.loss, Share(share) if share < 1.0 else None)
    alone = {name: jnp.float32(name == "consistency") for name in (TASK, *TERMS)}
    together = dict.fromkeys((TASK, *TERMS), jnp.float32(1))

    @jax.jit
    def gradient(batch: Any, key: Any, emphasis: Any) -> Any:
        micro = jax.tree.map(lambda x: x[0], batch)
        counts, weights = parts.counts(batch), parts.weights(jnp.int32(0))
        rest = (constants, micro, counts, weights, key, emphasis)
        found = jax.grad(loss, has_aux=True)(trained, *rest)[0]
        return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(found)])

    def flat(batch: Any, key: Any, emphasis: Any) -> Any:
        return np.asarray(gradient(batch, key, emphasis), np.float64)

    def drawn(batch: Any, draws: int) -> list[tuple[Any, Any]]:
        keys = jax.random.split(jax.random.key(0), draws)
        return [(flat(batch, key, alone), flat(batch, key, together)) for key in keys]

    return drawn


def _replaced(loss: Any, share: Any) -> Any:
    import dataclasses

    return dataclasses.replace(loss, share=share, drops=False)


def _deviation(found: Sequence[tuple[Any, Any]], centre: Any) -> tuple[float, float]:
    """Root of the mean squared distance from a centre, or from the mean, over the centre's norm."""
    import numpy as np

    table = []
    for i in range(2):
        values = [one[i] for one in found]
        middle = np.mean(values, axis=0) if centre is None else centre[i]
        spread = sum(np.sum((value - middle) ** 2) for value in values)
        count = len(values) - 1 if centre is None else len(values)
        table.append(float(np.sqrt(spread / count) / np.linalg.norm(middle)))
    return table[0], table[1]


if __name__ == "__main__":
    main()
