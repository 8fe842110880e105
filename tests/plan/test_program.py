"""The trace of a step: no copy and no gradient of the base."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from balora_jax.bench import cases
from balora_jax.config_file import parse_config
from balora_jax.errors import InputError
from balora_jax.plan import arguments
from balora_jax.tasks.text.program import text_program
from balora_jax.training import steps
from tests.bench.test_bench import SHAPE

# Sizes of the frozen weights of SHAPE that nothing else in the step has, one layer and stacked.
WEIGHTS = {(24, 40), (40, 24), (2, 24, 40), (2, 40, 24), (24, 12), (2, 24, 12)}
HEAD = {(151, 24), (24, 151)}


def config_of(folder, **model):
    (folder / "config.json").write_text(json.dumps(SHAPE))
    return parse_config(
        {
            "model": {"name_or_path": str(folder), "dtype": "bfloat16", **model},
            "adapter": {"start": "pissa", "rank": 3},
            "regularizers": {"top_k": 5, "k": 3},
            "data": {"train": "balora_jax:quickstart/train.jsonl", "max_length": 16},
            "training": {"max_steps": 10, "batch_size": 3, "head_chunk": 8},
        },
        "here",
    )


def program_of(folder, name, **model):
    config = config_of(folder, **model)
    case = next(case for case in cases.text_cases() if case.name == name)
    decoder = arguments.shapes_only(str(folder)).config
    return text_program(cases.configured(config, case), decoder)


def arrays_made(program):
    """Shape and dtype of every array that an equation of the traced step makes."""
    parts = program.step_parts(10)
    inputs = arguments.abstract_arguments(program, 10)
    traced = jax.make_jaxpr(partial(steps.train_step, parts))(*inputs)
    made = []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            made.extend((var.aval.shape, var.aval.dtype, equation) for var in equation.outvars
                        if hasattr(var.aval, "shape"))  # fmt: skip
            for value in jax.tree.leaves(
                list(equation.params.values()),
                is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
            ):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    walk(inner)

    walk(traced.jaxpr)
    return made


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("name", ["LoRA", "BA-LoRA"])
def test_no_wide_copy_no_gradient_and_no_product_of_factors(tmp_path, name, remat):
    """In bfloat16 a float32 array of a weight's size could only be a copy, a gradient, or A·B."""
    made = arrays_made(program_of(tmp_path, name, remat=remat))
    assert any(dtype == jnp.float32 for _, dtype, _ in made)
    wide = [(shape, e.primitive.name) for shape, dtype, e in made
            if shape in WEIGHTS | HEAD and dtype == jnp.float32]  # fmt: skip
    assert not wide
    products = [shape for shape, _, e in made
                if e.primitive.name == "dot_general" and shape in WEIGHTS | HEAD]  # fmt: skip
    assert not products


@pytest.mark.parametrize("name", ["LoRA", "BA-LoRA"])
def test_logits_exist_for_a_chunk_only(tmp_path, name):
    """48 tokens, chunks of 8: nothing has tokens and vocabulary as its axes but [8, 151]."""
    shapes = {shape for shape, _, _ in arrays_made(program_of(tmp_path, name)) if 151 in shape}
    assert (8, 151) in shapes
    assert not [shape for shape in shapes if shape[0] in (45, 48) or shape[:2] == (3, 16)]


def test_offload_is_refused_on_a_cpu(tmp_path):
    with pytest.raises(InputError) as error:
        program_of(tmp_path, "LoRA", remat="offload")
    assert str(error.value) == (
        "model.remat: expected none, dots or full on a CPU, got offload: there is no other memory "
        "to move to. Choose one of them."
    )
