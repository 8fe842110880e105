"""Floating point operations of a training step."""

import math
from collections.abc import Sequence

from balora_jax.tasks.text.program import TextProgram


def model_flops(program: TextProgram, shape: Sequence[int], counted: float) -> float:
    """Floating point operations that a step cannot do without.

    ``4·P·N + 6·P_A·N + 4·V·D·M + 3·attention``, and ``2·P·N + 2·V·D·M + attention`` for a teacher:
    P parameters of the frozen linear layers (of experts, those that a token takes), P_A of the
    adapters (twice with an origin), N tokens, M counted tokens. LoRA-FA's A has no gradient, so 4
    there and no second half; a full fine-tuning has 6 for P and for the head, and no adapters.
    Attention is causal, so half of the square. Rematerialisation is not counted, nor what does not
    grow with the tokens, such as DoRA's norms. A teacher that is the start of a run from an adapter
    has ``2·P_A·N`` more. Of a teacher on a share of the rows, that share is counted; of one that is
    kept on disk, its head alone.

    Args:
        program: the step.
        shape: of the batch, ``[micro-batches, B, T]``.
        counted: M.
    """
    tokens = math.prod(shape)
    linear, attention = linear_parameters(program), attention_flops(program, shape)
    passes = 6.0 if program.adapters.method.trains_base else 4.0
    head = program.decoder.vocab_size * program.decoder.hidden_size * counted
    flops = passes * (linear * tokens + head) + adapter_flops(program) * tokens + 3 * attention
    if program.objective.needs_teacher:
        forward = 2.0 * linear * tokens + attention
        if program.taught_by_start:
            forward += adapter_flops(program, forward=True) * tokens
        sample = None if program.share is None else program.share.of(shape[1])
        share = 1.0 if sample is None else 1.0 / sample.factor
        flops += share * (2.0 * head + (0.0 if program.keeps_teacher else forward))
    return flops


def recomputed_flops(program: TextProgram, shape: Sequence[int], remat: str) -> float:
    """Operations that rematerialisation, as ``model.remat`` names it, adds to the model's.

    ``full`` runs the student's layers forward once more: ``2·P·N + 2·P_A·N + attention``. ``dots``
    and ``offload`` keep every product with a weight, so only attention is repeated. The fused head
    forms its gradient in the forward and repeats nothing.
    """
    tokens = math.prod(shape)
    if remat == "none":
        return 0.0
    attention = attention_flops(program, shape)
    if remat != "full":
        return attention
    forward = 2.0 * linear_parameters(program) + adapter_flops(program, forward=True)
    return forward * tokens + attention


def attention_flops(program: TextProgram, shape: Sequence[int]) -> float:
    """Operations of the scores and of the weighted values, forward, causal."""
    decoder = program.decoder
    heads = decoder.num_layers * decoder.num_heads * decoder.head_dim
    return 2 * 2 * heads * shape[-1] * math.prod(shape) / 2


def linear_parameters(program: TextProgram) -> float:
    """Parameters of the frozen linear layers that a token goes through, without the head."""
    return sum(
        leaf.size * taken_share(program, path)
        for path, leaf in program.plain.parameters.items()
        if path.endswith(".kernel")
    )


def adapter_flops(program: TextProgram, *, forward: bool = False) -> float:
    """Operations of the adapters' products for one token, forward and backward or forward only."""
    has_origin, total = program.adapters.start.has_origin, 0.0
    for module in program.adapters.modules:
        sizes = module.rank, module.in_features, module.out_features
        one = module.method.flops(*sizes, origin=has_origin, backward=not forward)
        total += one * taken_share(program, module.path)
    return total


def taken_share(program: TextProgram, path: str) -> float:
    """The share of a stack's layers that a token goes through: all, but for experts."""
    decoder = program.decoder
    return decoder.experts_per_token / decoder.experts if ".experts." in path else 1.0


def encoder_flops(
    linear: int, layers: int, width: int, shape: Sequence[int], *, taught: bool
) -> float:
    """The same for an encoder, whose attention sees the whole square; its small head is left out.

    ``4·P·N + 3·attention``, and ``2·P·N + attention`` for a teacher that runs in each step.

    Args:
        linear: P, parameters of the layers.
        layers: how many.
        width: D.
        shape: of the batch, ``[micro-batches, B, T]``.
        taught: whether the teacher runs.
    """
    tokens = math.prod(shape)
    attention = 4 * layers * width * shape[-1] * tokens
    flops = 4.0 * linear * tokens + 3 * attention
    return flops + (2.0 * linear * tokens + attention if taught else 0.0)
