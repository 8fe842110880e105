"""Several TPU slices: what goes over the network between them, and nothing else.

With libtpu (extra ``plan``) and ``BALORA_SLICES=1`` the real compiler is asked as well.
"""

import os
from dataclasses import dataclass, replace

import numpy as np
import pytest

from balora_jax.config import MeshConfig
from balora_jax.errors import InputError
from balora_jax.parallel import sharding
from balora_jax.plan import hlo
from balora_jax.plan.targets import described_devices, parse_target


@dataclass(frozen=True)
class Device:
    """As much of a TPU device as its place on a mesh depends on."""

    id: int
    slice_index: int
    coords: tuple = (0, 0, 0)
    core_on_chip: int = 0
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


def two_slices():
    """Two slices of 2 x 2 chips, out of order."""
    found = [
        Device(4 * part + 2 * y + x, part, (x, y, 0), process_index=part)
        for part in range(2)
        for y in range(2)
        for x in range(2)
    ]
    return found[::-1]


def test_only_data_goes_over_slices():
    mesh = sharding.make_mesh(MeshConfig(data=4, fsdp=2), two_slices())
    assert mesh.axis_names == sharding.AXES
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert slices.reshape(4, 2).tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert sharding.slices_of(two_slices()) == 2
    assert sharding.slices_of([replace(one, platform="gpu") for one in two_slices()]) == 1


def test_data_must_go_over_slices_evenly():
    with pytest.raises(InputError) as refused:
        sharding.make_mesh(MeshConfig(data=1, fsdp=8), two_slices())
    assert str(refused.value) == (
        "mesh.data: expected a multiple of the 2 TPU slices that there are, as only this axis goes "
        "over the network between them, got 1. Change it."
    )


def test_targets_of_several_slices():
    one, two = parse_target("v5e:4x4"), parse_target("2xv5e:4x4")
    assert (two.devices, two.hosts, two.slices) == (32, 8, 2)
    assert (one.network, one.borders) == (None, 1)
    # 6.4 Tbit/s of a pod of 256 chips, as Google publishes it.
    assert (two.network, two.borders) == (6.4e12 / 8 / 256, 2)
    assert two.environment["TPU_ACCELERATOR_TYPE"] == one.environment["TPU_ACCELERATOR_TYPE"]
    with pytest.raises(InputError, match=r"expected one slice, or several of v5e, v6e, got '2xv5p"):
        parse_target("2xv5p:2x2x1")
    with pytest.raises(InputError, match="got '0xv5e:4x4'"):
        parse_target("0xv5e:4x4")


# As libtpu writes a sum over two slices: each device sends its part, f32[1,128], to the other one.
PROGRAM = """HloModule step

ENTRY %main (p: f32[1,128]) -> f32[1,128] {
  %p = f32[1,128]{1,0} parameter(0)
  %after-all = token[] after-all()
  %send = (f32[1,128]{1,0}, u32[], token[]) send(%p, %after-all), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[1,128]{1,0}, u32[], token[]) recv(%after-all), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %got = f32[1,128]{1,0} get-tuple-element(%recv), index=0
}
"""


def test_bytes_between_slices():
    found = hlo.Module(PROGRAM).between_slices(2, "data")
    seen = [(one.kind, one.axes, one.count, one.bytes, one.between_hosts) for one in found]
    assert seen == [("all-reduce", ("data",), 1, 512, 512)]


@pytest.mark.skipif("BALORA_SLICES" not in os.environ, reason="needs libtpu in this process")
def test_libtpu_describes_several_slices():
    found = described_devices(parse_target("2xv5e:2x2"))
    assert len(found) == 8
    assert sharding.slices_of(found) == 2
