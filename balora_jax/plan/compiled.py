"""Needs of one training step by its compiled program: shapes go in, no array is made."""

import math
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from balora_jax.config import RunConfig, TrainingConfig
from balora_jax.models.decoder_config import DecoderConfig
from balora_jax.numerics import head
from balora_jax.numerics.head_types import Rows
from balora_jax.numerics.objective import TASK
from balora_jax.parallel import sharding
from balora_jax.plan import arguments, gpus, hlo
from balora_jax.tasks import flops
from balora_jax.tasks.text.program import TextProgram, text_program
from balora_jax.training import steps

STEPS = 10
"""Length of the run that schedules span; it does not change the program."""

HELD = ("frozen", "adapters", "origin", "optimizer", "batch", "head_factor")
"""Kinds of arrays that stay in memory for the whole step, in the order of the tables."""

Row = dict[str, Any]


def compile_case(
    config: RunConfig, name: str, decoder: DecoderConfig, mesh: Any, *, head_alone: bool
) -> Row:
    """Compile one case for the devices of a mesh.

    Args:
        config: of the step.
        name: title of the row.
        decoder: the model's shape.
        mesh: devices, which need not be here.
        head_alone: compile the head's pass on its own as well, for its share of the temporaries.

    Returns:
        ``case``, what was compiled (mesh, micro-batch, …), ``parameters``, ``trainable``,
        ``bytes_per_device`` (arguments, temporaries, output, total; None where the step does not
        fit, and ``does_not_fit`` then says what it needs), ``bytes_by_kind``, ``model_flops``,
        ``recomputed_flops``, ``flops_per_device`` (the model's, over devices), ``collectives``,
        ``sent`` (their ``bytes``, and of these ``between_hosts``), ``traffic`` (bytes between each
        device and its memory), ``compile_seconds``.
    """
    program = text_program(config, decoder, mesh)
    inputs = arguments.abstract_arguments(program, STEPS)
    began = time.monotonic()
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as dump:
        step = steps.compile_step(program.step_parts(STEPS), inputs[0], mesh)
        compiled, needed = compile_or_size(step.lower(*inputs), dump_options(mesh, dump))
        text = None if compiled is None else program_text(compiled, Path(dump))
    row = _setting(program, name) | _flops(program) | {
        "does_not_fit": needed,
        "bytes_per_device": None if compiled is None else memory_of(compiled),
        "compile_seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip
    temporaries = head_temporaries(program) if head_alone and compiled is not None else None
    row["bytes_by_kind"] = bytes_by_kind(inputs, row["bytes_per_device"], temporaries)
    return row | _moved(program, text)


def dump_options(mesh: Any, folder: str) -> dict[str, Any]:
    """Options that let a compiler write the text of a program where it may not give it back."""
    platform = sharding.platform_of(mesh)
    if platform == "tpu" or (platform == "gpu" and gpus.is_old()):
        return {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    return {}


def program_text(compiled: Any, dump: Path) -> str | None:
    """The text of a compiled program; None where there is none.

    For a v5p libtpu 0.0.52 compiles programs that it cannot give back (JAX reports an error of
    ``async-update``), and an old GPU compiler gives none back; what was written to ``dump`` on the
    way is the same program.
    """
    written = sorted(dump.glob("*jit_step*after_optimizations.txt"))
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:
        if not written:
            raise
        text = None
    return written[-1].read_text(encoding="utf-8") if text is None and written else text


def compile_or_size(
    lowered: Any, options: Mapping[str, Any] | None = None
) -> tuple[Any, str | None]:
    """The compiled program; or None and what it needs, where the compiler refuses it for memory."""
    try:
        return lowered.compile(compiler_options=dict(options or {})), None
    except jax.errors.JaxRuntimeError as error:
        # A step that is too large is a result; whatever else the compiler refuses is not.
        found = re.search(r"temporaries \((\S+)\) exceeds available HBM \((\S+)\)", str(error))
        found = found or re.search(r"Used (\S+) of (\S+) hbm", str(error))
        if found is None:
            raise
        return None, f"{found[1]} of {found[2]}"


def memory_of(compiled: Any) -> dict[str, int]:
    """Bytes per device by the compiler's own analysis; donated outputs are counted once."""
    found = compiled.memory_analysis()
    arguments, temporaries = found.argument_size_in_bytes, found.temp_size_in_bytes
    output = found.output_size_in_bytes - found.alias_size_in_bytes
    return {
        "arguments": arguments,
        "temporaries": temporaries,
        "output": output,
        "total": arguments + temporaries + output,
    }


def _setting(program: TextProgram, name: str) -> Row:
    config = program.config
    training = config.training
    return {
        "case": name,
        "parameters": program.total,
        "trainable": program.trainable,
        "devices": program.mesh.size,
        "mesh": dict(program.mesh.shape),
        "batch": list(batch_shape(training, config.data.max_length)),
        "micro_batch": training.batch_size // training.accumulation,
        "accumulation": training.accumulation,
        "remat": config.model.remat,
        "head": training.head,
    }


def batch_shape(training: TrainingConfig, length: int) -> tuple[int, int, int]:
    """``[micro-batches, B, T]`` of a step, rows as long as ``data.max_length``."""
    micro_batches = training.accumulation
    return micro_batches, training.batch_size // micro_batches, length


def _flops(program: TextProgram) -> Row:
    shape = batch_shape(program.config.training, program.config.data.max_length)
    needed = flops.model_flops(program, shape, counted_tokens(shape))
    return {
        "model_flops": needed,
        "recomputed_flops": flops.recomputed_flops(program, shape, program.config.model.remat),
        "flops_per_device": needed / program.mesh.size,
    }


def counted_tokens(shape: tuple[int, int, int]) -> int:
    """Tokens in the loss of full rows: all but the first of each."""
    return shape[0] * shape[1] * (shape[2] - 1)


def local_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree on one device, by their shardings."""
    return sum(
        int(math.prod(leaf.sharding.shard_shape(leaf.shape)) * _item_bytes(leaf.dtype))
        for leaf in jax.tree.leaves(tree)
    )


def _item_bytes(dtype: Any) -> float:
    """Bytes of one number; a random key is two words, codes of four bits are half a byte."""
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return 8
    return 0.5 if "4" in dtype.name and dtype.itemsize == 1 else dtype.itemsize


def held_bytes(arguments: tuple[Any, ...]) -> dict[str, int]:
    """Bytes on one device of what a step is given, by kind; a teacher that is the start is one."""
    state, constants, batch, key = arguments
    parts = {
        "frozen": constants.frozen,
        "adapters": state.adapters,
        "origin": constants.origin,
        "optimizer": (state.opt_state, state.step, state.guard),
        "batch": (batch, key),
        "head_factor": constants.head_factor,
    }
    held = {kind: local_bytes(parts[kind]) for kind in HELD}
    taught = {} if constants.start is None else {"teacher": local_bytes(constants.start)}
    return held | taught


def bytes_by_kind(
    arguments: tuple[Any, ...], memory: Mapping[str, int] | None, head_alone: int | None
) -> dict[str, int]:
    """Where the bytes of one device go; the kinds add up to the compiler's total.

    What a step is given follows from shapes and mesh; ``padding`` is what the compiler adds to it
    for tiles. An array that the step does not read (the key, which only dropout and samples do)
    takes no bytes, and counts for none in its kind, the batch first. The split of the temporaries
    is an estimate: ``head`` is what the head's pass takes when it is compiled alone on
    the same shapes and mesh, at most all of them, and the step's peak may lie elsewhere.
    """
    held = held_bytes(arguments)
    if memory is None:
        return held
    rest = dict(held)
    left_out = max(sum(held.values()) - memory["arguments"], 0)
    for kind in ("batch", *held):
        cut = min(rest[kind], left_out)
        rest[kind], left_out = rest[kind] - cut, left_out - cut
    rest["padding"] = memory["arguments"] - sum(rest.values())
    if head_alone is not None:
        rest["head"] = min(head_alone, memory["temporaries"])
    rest["activations"] = memory["temporaries"] - rest.get("head", 0)
    rest["output"] = memory["output"]
    return rest


def head_temporaries(program: TextProgram) -> int | None:
    """Bytes per device that the head's pass takes on its own, with all rows of a micro-batch.

    None where it does not fit alone.
    """
    mesh, width = program.mesh, program.decoder.hidden_size
    plan, chosen = program.head_plan, program.objective.term_set
    _, rows, length = batch_shape(program.config.training, program.config.data.max_length)
    placed = NamedSharding(mesh, P(*sharding.batch_sharding(mesh).spec[1:]))

    def shape(*sizes: int, dtype: Any, at: Any = placed) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=at)

    whole = sharding.replicated(mesh)
    hidden = shape(rows, length, width, dtype=program.config.model.dtype)
    labels, mask = (shape(rows, length, dtype=kind) for kind in (jnp.int32, jnp.bool_))
    name = program.decoder.head_path
    table = program.layout.attached({name: program.plain.frozen[name]})[name]
    factor = None
    if program.needs_factor:
        factor = shape(width, width, dtype=jnp.float32, at=whole)
    given: Any = Rows(hidden, hidden, labels, mask, mask)
    one = jnp.float32(1)
    scales: Any = dict.fromkeys((TASK, *(term.name for term in chosen.terms)), one)
    trains = program.adapters.trains_head(program.decoder)
    options: Any = {"logit_map": program.decoder.logit_map, "adapt": lambda scales, _: scales}

    def loss(student: Any, given: Any, table: Any, factor: Any) -> Any:
        given = given._replace(student=student)
        given = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), given)
        options["original"] = table if trains else None
        if plan.kind == "plain":
            given, table = plan.layout(given, table)
            return head.plain_head_loss(given, table, scales, chosen, **options)[0]
        return head.head_loss(
            given, table, scales, chosen, chunk=plan.chunk, factor=factor,
            axes=plan.axes, across=plan.across, **options,
        )[0]  # fmt: skip

    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.value_and_grad(loss)).lower(hidden, given, table, factor)
        compiled, _ = compile_or_size(lowered)
    return None if compiled is None else memory_of(compiled)["temporaries"]


def head_chunks(program: TextProgram) -> int:
    """How many chunks the head's pass takes on one device when every row counts."""
    _, rows, length = batch_shape(program.config.training, program.config.data.max_length)
    spec = sharding.batch_sharding(program.mesh).spec[1:]
    axes = [axis for part in spec if part for axis in ((part,) if isinstance(part, str) else part)]
    split = math.prod(program.mesh.shape[axis] for axis in axes)
    return -(-rows * length // split // program.head_plan.chunk)


def hosts_between(mesh: Any) -> int:
    """Hosts of a mesh of GPUs, which speak over a network; one for TPUs, whose links go on."""
    if sharding.platform_of(mesh) != "gpu":
        return 1
    return len({device.process_index for device in mesh.devices.flat})


def _exchanged(module: hlo.Module, mesh: Any) -> list[hlo.Collective]:
    """Collectives of a program; over several TPU slices it is the program of one of them."""
    sizes = dict(mesh.shape)
    slices = sharding.slices_of(list(mesh.devices.flat)) if isinstance(mesh, Mesh) else 1
    if slices == 1:
        return module.collectives(sizes, hosts_between(mesh))
    over = sharding.AXES[0]
    inside = module.collectives(sizes | {over: sizes[over] // slices})
    return [*module.between_slices(slices, over), *inside]


def _moved(program: TextProgram, text: str | None) -> Row:
    """What a step moves, from the text of the program."""
    if text is None:
        return {"collectives": None, "sent": None, "traffic": None, "open_loops": None}
    module = hlo.Module(text, head_chunks(program))
    found = _exchanged(module, program.mesh)
    return {
        "collectives": [vars(one) | {"axes": list(one.axes)} for one in found],
        "sent": hlo.total(found),
        "traffic": module.traffic(),
        "open_loops": module.unknown_loops,
    }
