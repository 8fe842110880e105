"""What a teacher that is the start of a run costs: its bytes and its operations, by hand."""

from pathlib import Path

import jax
import pytest

from balora_jax.bench import against
from balora_jax.config_file import parse_config
from balora_jax.errors import InputError
from balora_jax.plan import arguments, compiled
from balora_jax.plan import report as plan_report
from balora_jax.tasks import flops
from balora_jax.tasks.text import run as text_run
from tests.run.test_teacher import text_adapter
from tests.tiny_run import LAYERS, LINEAR, VOCAB_SIZE, WIDTH, config_tree, write_inputs

RANK = 2
FACTORS = LAYERS * RANK * 2 * WIDTH  # of the query's projection alone


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """A run in bfloat16 that goes on from an adapter with a head of its own, by its teacher."""
    folder = tmp_path_factory.mktemp("planned")
    inputs, adapter = write_inputs(folder), text_adapter(folder / "adapter")

    def made(teacher, **regularizers):
        tree = config_tree(
            inputs, model={"dtype": "bfloat16"}, adapter={"start": str(adapter)},
            regularizers={"teacher": teacher, **regularizers},
        )  # fmt: skip
        return text_run.check(parse_config(tree, "here"))

    return made


def test_bytes_by_hand(run_of):
    """Factors stay in float32; the head lies as the model holds it."""
    held = {}
    for teacher in ("base", "start"):
        given = arguments.abstract_arguments(run_of(teacher), 4)
        held[teacher] = compiled.held_bytes(given)
    taught = held["start"].pop("teacher")
    assert taught == 4 * FACTORS + 2 * VOCAB_SIZE * WIDTH
    assert held["start"] == held["base"]
    assert set(held["base"]) < set(plan_report.KINDS)
    nothing = arguments.abstract_arguments(run_of("start", consistency=0.0), 4)
    assert "teacher" not in compiled.held_bytes(nothing)


def test_the_plan_has_the_arrays_of_the_run(run_of):
    run = run_of("start")
    planned = arguments.abstract_arguments(run, 4)[1].start
    loaded = run.load()
    found = run.constants(loaded).start
    shapes = {
        path: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=value.sharding)
        for path, value in found.items()
    }
    assert shapes == planned
    # Copies: the step is given the others.
    for path, value in found.items():
        given = loaded.trainable[path]
        assert value.unsafe_buffer_pointer() != given.unsafe_buffer_pointer()


def test_operations_by_hand(run_of):
    """Two for each number of a factor and each token."""
    counts = [flops.model_flops(run_of(t), (2, 4, 16), 20) for t in ("base", "start")]
    assert counts[1] - counts[0] == 2 * FACTORS * 2 * 4 * 16


def test_a_kept_and_a_sampled_teacher_by_hand(run_of):
    """Two operations for each weight of a layer and token, and causal attention; head on 20."""
    shape, counted = (2, 4, 16), 20
    tokens, head = 2 * 4 * 16, 2 * VOCAB_SIZE * WIDTH * counted
    layers = sum(out * into for out, into in LINEAR.values())
    forward = LAYERS * (2 * layers * tokens + 2 * 2 * WIDTH * 16 * tokens / 2)
    each, once, some, both = (
        run_of("base", **regularizers)
        for regularizers in (
            {},
            {"teacher_cache": True},
            {"teacher_fraction": 0.3},  # two of four rows
            {"teacher_cache": True, "teacher_fraction": 0.3},
        )
    )
    counts = [flops.model_flops(run, shape, counted) for run in (each, once, some, both)]
    assert counts[0] - counts[1] == forward
    assert counts[0] - counts[2] == (forward + head) / 2
    assert counts[0] - counts[3] == forward + head / 2
    batch = arguments.abstract_arguments(once, 4)[2]
    assert batch["teacher_hidden"].shape == (*batch["input_ids"].shape, WIDTH)
    assert batch["teacher_hidden"].dtype == "bfloat16"
    assert "teacher_hidden" not in arguments.abstract_arguments(some, 4)[2]


def test_the_reference_in_torch_has_another_teacher(run_of):
    where = Path("here")
    with pytest.raises(InputError) as caught:
        against.spec_of(run_of("start"), where, where, 1)
    assert str(caught.value) == (
        "--against torch: expected regularizers.teacher base, got start: the reference's teacher "
        "has no adapter. Leave it out."
    )
    assert against.spec_of(run_of("start", consistency=0.0), where, where, 1)["teacher"] is False
