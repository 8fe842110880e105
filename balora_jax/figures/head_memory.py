"""Memory of the head, fused and plain, by the compiler's own count.

``python -m balora_jax.figures.head_memory [--topology v5p:1x1x1]`` prints the table for this
machine or for a TPU that is not here (extra ``plan``).
"""

import argparse
import os
from collections.abc import Sequence
from typing import Any

from balora_jax.plan.targets import described_devices, parse_target

ROWS, WIDTH = 4096, 4096
VOCABULARIES = (32000, 128256, 256000)
FORMS = ("plain LoRA", "published", "plain BA-LoRA", "fused BA-LoRA")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table of temporaries in MiB."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", help="TPU slice, such as v5p:1x1x1; this machine without it")
    parser.add_argument("--chunk", type=int, help="rows per chunk; as a run would choose it")
    parser.add_argument("--rows", type=int, default=ROWS, help="tokens N")
    options = parser.parse_args(arguments)
    if options.topology:
        os.environ.update(parse_target(options.topology).environment)
    _print_table(options.rows, options.chunk, options.topology)


def _print_table(rows: int, chunk: int | None, topology: str | None) -> None:
    from balora_jax.numerics import head

    dtype = "bfloat16" if topology else "float32"
    memory = head.default_memory_mib("tpu" if topology else "cpu") * 2**20
    print(f"temporaries in MiB on {topology or 'this machine'}, N = {rows}, D = {WIDTH}, {dtype}")
    print(
        f"{'V':>8}  {'chunk':>5}  "
        + "  ".join(f"{f:>14}" for f in FORMS)
        + "  fused/plain  fused/published"
    )
    for vocabulary in VOCABULARIES:
        size = chunk or head.chunk_rows(vocabulary, memory)
        found = [temporaries(f, rows, WIDTH, vocabulary, size, dtype, topology) for f in FORMS]
        cells = "  ".join(f"{size / 2**20:14.0f}" for size in found)
        shares = f"{found[3] / found[2]:11.3f}  {found[3] / found[1]:15.3f}"
        print(f"{vocabulary:8d}  {size:5d}  {cells}  {shares}", flush=True)


def temporaries(
    form: str,
    rows: int,
    width: int,
    vocabulary: int,
    chunk: int,
    dtype: str = "float32",
    topology: str | None = None,
) -> int:
    """Bytes that value and gradient of a head need beside their arguments and results.

    Args:
        form: ``plain LoRA`` is an ordinary cross-entropy; the others have all terms, ``published``
            with a randomized decomposition of the logits that is differentiated.
        rows: N.
        width: D.
        vocabulary: V.
        chunk: rows per chunk of the fused form.
        dtype: of hidden states and head.
        topology: TPU slice of one chip to compile for; this machine where None.
    """
    import jax
    import jax.numpy as jnp

    from balora_jax.numerics import head
    from balora_jax.numerics.head_types import Rows, head_products
    from balora_jax.numerics.objective import TASK, TermSet, objective_of
    from balora_jax.numerics.terms import TERMS
    from balora_jax.plan.compiled import memory_of

    on = form != "plain LoRA"
    chosen = objective_of(dict.fromkeys(TERMS, 1.0) if on else {}).term_set
    one = _device(topology)

    def shape(*dimensions: int, kind: Any = dtype) -> Any:
        return jax.ShapeDtypeStruct(dimensions, kind, sharding=one)

    def loss(student: Any, rest: Any, embedding: Any, factor: Any) -> Any:
        scales: Any = dict.fromkeys((TASK, *TERMS), jnp.float32(0.01))
        parts = rest._replace(student=student, teacher=rest.teacher if on else None)
        if form == "published":
            others = TermSet(tuple(term for term in chosen.terms if not term.couples_rows))
            others = head.plain_head_loss(parts, embedding, scales, others)[0]
            return others + 0.01 * _published_spectral(head_products(student, embedding))
        if form.startswith("plain"):
            return head.plain_head_loss(parts, embedding, scales, chosen)[0]
        return head.head_loss(parts, embedding, scales, chosen, chunk=chunk, factor=factor)[0]

    hidden, mask = shape(rows, width), shape(rows, kind=jnp.bool_)
    rest = Rows(hidden, hidden, shape(rows, kind=jnp.int32), mask, mask)
    arguments = (
        hidden,
        rest,
        shape(vocabulary, width),
        shape(width, width, kind=jnp.float32),
    )
    compiled = jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile()
    return memory_of(compiled)["temporaries"]


def _published_spectral(logits: Any) -> Any:
    """The published estimate: k + 5 random columns, two power iterations, differentiated through.

    **Source:** the budget of the official 2026 code, k = 10.
    """
    import jax
    import jax.numpy as jnp

    basis = logits @ jax.random.normal(jax.random.key(0), (logits.shape[1], 15))
    for _ in range(2):
        basis = logits @ (logits.T @ jnp.linalg.qr(basis)[0])
    small = jnp.linalg.qr(basis)[0].T @ logits
    values = jnp.linalg.svd(small, full_matrices=False)[1]
    return -jnp.sum(values[:10]) / jnp.linalg.norm(logits)


def _device(topology: str | None) -> Any:
    import jax

    device = described_devices(parse_target(topology or "auto"))[0]
    return jax.sharding.SingleDeviceSharding(device)


if __name__ == "__main__":
    main()
