"""Collectives, loops and memory traffic read from small programs whose figures are known by hand."""

import json
import os
import subprocess
import sys

import pytest

from balora_jax.plan import hlo, hlo_groups
from tests import compiler

PROGRAM = """
import json, jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from balora_jax.plan import hlo, hlo_groups

mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

def compiled(function, *specs, out):
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
    shape = jax.ShapeDtypeStruct((16, 24), jnp.float32)
    given = [jax.ShapeDtypeStruct((16, 24), jnp.float32, sharding=NamedSharding(mesh, s)) for s in specs]
    return jax.jit(mapped).lower(*given).compile()

def exchange(x):
    def body(carry, _):
        whole = jax.lax.all_gather(carry, "fsdp", axis=0, tiled=True)          # [4,24] -> [16,24]
        summed = jax.lax.psum(jnp.sin(whole), "data")                          # [16,24]
        part = jax.lax.psum_scatter(summed, "fsdp", scatter_dimension=0, tiled=True)
        return part, None
    once = jax.lax.ppermute(x, "data", [(0, 1), (1, 0)])
    return jax.lax.scan(body, once, None, length=5)[0]

def once(x):
    return jnp.sin(x) @ jnp.ones((24, 24))

def plain(x):
    return jax.lax.scan(lambda carry, _: (once(carry), None), x, None, length=7)[0]

found = {}
program = compiled(exchange, P("fsdp", None), out=P("fsdp", None))
module = hlo.Module(program.as_text())
found["exchange"] = [vars(one) for one in module.collectives(dict(mesh.shape))]
program = compiled(plain, P(("data", "fsdp"), None), out=P(("data", "fsdp"), None))
module = hlo.Module(program.as_text())
single = compiled(once, P(("data", "fsdp"), None), out=P(("data", "fsdp"), None))
cost = single.cost_analysis()
cost = cost[0] if isinstance(cost, list) else cost
found["plain"] = {"once": hlo.Module(single.as_text()).traffic(), "all": module.traffic(),
                  "xla": cost["bytes accessed"], "unknown": module.unknown_loops}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    path = os.pathsep.join(filter(None, sys.path))
    environment = os.environ | compiler.on_cpu(8) | {"PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_collectives_count_as_often_as_their_loop_runs(found):
    """Blocks of [4, 24] and arrays of [16, 24] in float32, five rounds over 4 and over 2 devices."""
    block, whole = 4 * 24 * 4, 16 * 24 * 4
    expected = {
        ("all-gather", ("fsdp",)): (5, 5 * block * 3),
        ("all-reduce", ("data",)): (5, 5 * 2 * whole // 2),
        ("reduce-scatter", ("fsdp",)): (5, 5 * whole * 3 // 4),
        ("collective-permute", ("data",)): (1, block),
    }
    seen = {
        (one["kind"], tuple(one["axes"])): (one["count"], one["bytes"]) for one in found["exchange"]
    }
    assert seen == expected
    assert [one["bytes"] for one in found["exchange"]] == sorted(
        (size for _, size in expected.values()), reverse=True
    )


def test_traffic_is_xlas_own_count_and_a_loops_body_counts_each_round(found):
    plain = found["plain"]
    assert plain["once"] == pytest.approx(plain["xla"], rel=0.1)
    # At least seven times: rows read and written, and the matrix of ones read, in each round.
    assert plain["all"] > 7 * (2 * 2 * 24 * 4 + 24 * 24 * 4)
    assert plain["all"] > 5 * plain["once"]
    assert plain["unknown"] == 0


# A TPU's program in small: a loop unrolled twice whose counter is only compared, a loop over chunks
# up to a number from the data, one that may stop early, and one asynchronous gather in pieces.
TPU = """HloModule jit_step

%start (p.0: f32[2,8]) -> f32[8,8] {
  %p.0 = f32[2,8]{1,0} parameter(0)
  %all-gather.1 = f32[8,8]{1,0:T(8,128)} all-gather(%p.0), channel_id=1, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}, frontend_attributes={chain_id="7"}
  ROOT %custom-call.1 = f32[8,8]{1,0} custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%piece (p.1: f32[2,8]) -> f32[8,8] {
  %p.1 = f32[2,8]{1,0} parameter(0)
  ROOT %all-gather.2 = f32[8,8]{1,0} all-gather(%p.1), channel_id=1, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}, frontend_attributes={chain_id="7"}
}

%all-reduce-scatter.3 (p.2: f32[8,8]) -> f32[4,8] {
  %p.2 = f32[8,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %all-reduce.1 = f32[8,8]{1,0} all-reduce(%p.2), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  ROOT %dynamic-slice.1 = f32[4,8]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={4,8}
}

%body.1 (p.3: (s32[], f32[2,8], s32[])) -> (s32[], f32[2,8], s32[]) {
  %p.3 = (s32[], f32[2,8]{1,0}, s32[]) parameter(0)
  %two = s32[] constant(2)
  %i.1 = s32[] get-tuple-element(%p.3), index=0
  %x.1 = f32[2,8]{1,0} get-tuple-element(%p.3), index=1
  %n.1 = s32[] get-tuple-element(%p.3), index=2
  %copy.1 = s32[]{:T(128)S(6)} copy(%i.1)
  %next.1 = s32[] add(%copy.1, %two)
  %begun = f32[8,8]{1,0} fusion(%x.1), kind=kCustom, calls=%start
  %going = f32[8,8]{1,0} fusion(%x.1), kind=kCustom, calls=%piece
  %sent = f32[4,8]{1,0} fusion(%going), kind=kCustom, calls=%all-reduce-scatter.3
  ROOT %tuple.1 = (s32[], f32[2,8]{1,0}, s32[]) tuple(%next.1, %x.1, %n.1)
}

%body.2 (p.4: (s32[], f32[2,8], s32[])) -> (s32[], f32[2,8], s32[]) {
  %p.4 = (s32[], f32[2,8]{1,0}, s32[]) parameter(0)
  %one = s32[] constant(1)
  %i.2 = s32[] get-tuple-element(%p.4), index=0
  %x.2 = f32[2,8]{1,0} get-tuple-element(%p.4), index=1
  %n.2 = s32[] get-tuple-element(%p.4), index=2
  %next.2 = s32[] add(%i.2, %one)
  %permute.2 = f32[2,8]{1,0} collective-permute(%x.2), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  ROOT %tuple.2 = (s32[], f32[2,8]{1,0}, s32[]) tuple(%next.2, %permute.2, %n.2)
}

%until_ten (p.5: (s32[], f32[2,8], s32[])) -> pred[] {
  %p.5 = (s32[], f32[2,8]{1,0}, s32[]) parameter(0)
  %ten = s32[] constant(10)
  %i.3 = s32[] get-tuple-element(%p.5), index=0
  ROOT %less.1 = pred[] compare(%i.3, %ten), direction=LT
}

%until_data (p.6: (s32[], f32[2,8], s32[])) -> pred[] {
  %p.6 = (s32[], f32[2,8]{1,0}, s32[]) parameter(0)
  %i.4 = s32[] get-tuple-element(%p.6), index=0
  %n.4 = s32[] get-tuple-element(%p.6), index=2
  ROOT %less.2 = pred[] compare(%i.4, %n.4), direction=LT
}

%until_close (p.7: (s32[], f32[2,8], s32[])) -> pred[] {
  %p.7 = (s32[], f32[2,8]{1,0}, s32[]) parameter(0)
  %four = s32[] constant(4)
  %i.5 = s32[] get-tuple-element(%p.7), index=0
  %n.5 = s32[] get-tuple-element(%p.7), index=2
  %far = pred[] compare(%n.5, %four), direction=GT
  %less.3 = pred[] compare(%i.5, %four), direction=LT
  ROOT %both = pred[] and(%less.3, %far)
}

ENTRY %main (x: f32[2,8], n: s32[]) -> f32[2,8] {
  %x = f32[2,8]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %nought = s32[] constant(0)
  %init = (s32[], f32[2,8]{1,0}, s32[]) tuple(%nought, %x, %n)
  %while.1 = (s32[], f32[2,8]{1,0}, s32[]) while(%init), condition=%until_ten, body=%body.1
  %while.2 = (s32[], f32[2,8]{1,0}, s32[]) while(%init), condition=%until_data, body=%body.2
  %while.3 = (s32[], f32[2,8]{1,0}, s32[]) while(%init), condition=%until_close, body=%body.2
  ROOT %out = f32[2,8]{1,0} get-tuple-element(%while.1), index=1
}
"""


@pytest.mark.parametrize(("chunks", "rounds", "unknown"), [(6, 6, 0), (None, 1, 1)])
def test_a_tpus_text(chunks, rounds, unknown):
    """Ten in steps of two, the chunks that were given (else once), and at most four."""
    module = hlo.Module(TPU, chunks)
    assert module.unknown_loops == unknown
    seen = {
        (one.kind, one.axes): (one.count, one.bytes) for one in module.collectives({"a": 2, "b": 4})
    }
    block = 2 * 8 * 4
    assert seen == {
        ("all-gather", ("b",)): (5, 5 * block * 3),  # its pieces are one
        ("reduce-scatter", ("a",)): (5, 5 * 4 * block // 2),
        ("collective-permute", ("b",)): (rounds + 4, (rounds + 4) * block),
    }


def test_axes_of_groups_that_are_no_axes():
    text = TPU.replace("[4,2]<=[2,4]T(1,0)", "{{0,5},{1,4},{2,7},{3,6}}")
    found = hlo.Module(text).collectives({"a": 2, "b": 4})
    assert ("reduce-scatter", ()) in {(one.kind, one.axes) for one in found}


MESHES = {
    # Devices in columns: 0 and 2 lie side by side, so that along the first axis are 0 and 1.
    "mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}": [[0, 1], [2, 3]],
    "mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}": [[0, 2], [1, 3]],
    "mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}": [[3, 1], [2, 0]],
    "mesh['a'=2,'b'=2], device_ids=([4]) {'a','b'}": [[0, 1, 2, 3]],
    # A part of an axis: numbers that differ in their first digit, or in their last.
    "mesh['a'=4] {'a':(1)2}": [[0, 2], [1, 3]],
    "mesh['a'=4] {'a':(2)2}": [[0, 1], [2, 3]],
    "mesh['a'=2,'b'=2] {'b','a'}": [[0, 2, 1, 3]],
}


@pytest.mark.parametrize("text", MESHES)
def test_groups_by_the_names_of_a_mesh(text):
    found = hlo_groups.replica_groups(f"channel_id=1, replica_groups={text}, dimensions={{0}}", 4)
    assert {frozenset(group) for group in found.tolist()} == {
        frozenset(group) for group in MESHES[text]
    }


def test_groups_that_nobody_can_read():
    with pytest.raises(
        ValueError, match="expected replica_groups as XLA writes them, got 'replica"
    ):
        hlo_groups.replica_groups("replica_groups=@mesh<4>, dimensions={0}", 4)
