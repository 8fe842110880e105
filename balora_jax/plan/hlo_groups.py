"""The mesh axes that a collective goes over."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from balora_jax.plan.hlo_text import Instruction


@dataclass(frozen=True)
class Group:
    """The devices that take part in a collective together.

    Attributes:
        axes: of the mesh; empty where the groups are those of no set of axes.
        size: devices.
        hosts: that the widest group is spread over.
    """

    axes: tuple[str, ...]
    size: int
    hosts: int


def group_over(mesh_shape: Mapping[str, int], axes: Sequence[str], hosts: int = 1) -> Group:
    """The group of the devices along axes of a mesh, which hosts hold one after another.

    >>> group_over({"data": 2, "fsdp": 4}, ("data",), hosts=2)
    Group(axes=('data',), size=2, hosts=2)
    >>> group_over({"data": 2, "fsdp": 4}, ("fsdp",), hosts=2)
    Group(axes=('fsdp',), size=4, hosts=1)
    """
    sizes = tuple(mesh_shape.values())
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    places = [list(mesh_shape).index(axis) for axis in axes]
    along = np.moveaxis(ids, places, range(-len(places), 0)).reshape(-1, _size(mesh_shape, axes))
    return Group(tuple(axes), along.shape[1], _hosts_of(along, ids.size // hosts))


class AxesOfGroups:
    """From the groups of a collective to mesh axes: the set of axes that has the same groups.

    Args:
        mesh_shape: size of each axis.
        hosts: that the devices are spread over, one after another.
    """

    def __init__(self, mesh_shape: Mapping[str, int], hosts: int = 1):
        self.devices = math.prod(mesh_shape.values())
        self.of_host = self.devices // hosts
        self.shape = tuple(mesh_shape.values())
        used = [axis for axis, size in mesh_shape.items() if size > 1]
        names = list(mesh_shape)
        ids = np.arange(self.devices).reshape(self.shape)
        self.known: dict[frozenset, tuple[str, ...]] = {}
        for count in range(1, len(used) + 1):
            for axes in itertools.combinations(used, count):
                places = [names.index(axis) for axis in axes]
                moved = np.moveaxis(ids, places, range(-count, 0))
                self.known[_as_sets(moved.reshape(-1, _size(mesh_shape, axes)))] = axes
        self.names = names

    def __call__(self, one: Instruction) -> Group:
        """The group of a collective."""
        if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", one.rest):
            numbers = [int(number) for number in re.findall(r"\d+", pairs[1])]
            hosts = _hosts_of(np.reshape(numbers, (-1, 2)), self.of_host)
            places = np.stack(np.unravel_index(numbers, self.shape), -1).reshape(
                -1, 2, len(self.shape)
            )
            differs = (places[:, 0] != places[:, 1]).any(0)
            axes = tuple(name for name, yes in zip(self.names, differs, strict=True) if yes)
            return Group(axes, self.devices, hosts)
        groups = replica_groups(one.rest, self.devices)
        axes = self.known.get(_as_sets(groups), ())
        return Group(axes, groups.shape[1], _hosts_of(groups, self.of_host))


def _hosts_of(groups: np.ndarray, devices: int) -> int:
    """Hosts, of so many devices each, of the group that is spread over most."""
    return max(len(set(group)) for group in (groups // devices).tolist())


def _size(mesh_shape: Mapping[str, int], axes: Sequence[str]) -> int:
    return math.prod(mesh_shape[axis] for axis in axes)


def _as_sets(groups: np.ndarray) -> frozenset:
    return frozenset(frozenset(group) for group in groups.tolist())


def replica_groups(text: str, devices: int) -> np.ndarray:
    """The groups of a collective, ``[groups, size]``, in any of the ways they are written.

    Raises:
        ValueError: in another way.

    >>> replica_groups("replica_groups=[2,2]<=[2,2]T(1,0), x", 4).tolist()
    [[0, 2], [1, 3]]
    >>> replica_groups("replica_groups={{0,1},{2,3}}", 4).tolist()
    [[0, 1], [2, 3]]
    >>> replica_groups("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", 4).tolist()
    [[0, 2], [1, 3]]
    >>> replica_groups("replica_groups=mesh['a'=4], device_ids=([2,2]T(1,0)) {'a'}", 4).tolist()
    [[0, 2, 1, 3]]
    >>> replica_groups("replica_groups={}", 2).tolist()
    [[0, 1]]
    """
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _iota(found[2], found[3]).reshape(_numbers(found[1]))
    if found := re.search(_MESH, text):
        ids = np.arange(devices)
        if found[2]:
            ids = _iota(found[2], found[3])
        elif found[4]:
            ids = np.array(_numbers(found[4]))
        return _along(ids, found[1], found[5])
    if found := re.search(r"replica_groups=\{(\{[\d,{}\s]*\})\}", text):
        groups = [group.split(",") for group in re.findall(r"\{([\d,\s]+)\}", found[1])]
        return np.array(groups, dtype=int)
    if "replica_groups=" in text and "replica_groups={}" not in text:
        told = text[text.index("replica_groups=") :][:80]
        raise ValueError(f"expected replica_groups as XLA writes them, got {told!r}")
    return np.arange(devices)[None]


_MESH = (
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, ?device_ids=\((?:\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+))\))?"
    r"\s*\{([^}]*)\}"
)
"""A mesh with names, the devices in its order where that is not theirs, and axes of a group."""


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _iota(source: str, order: str | None) -> np.ndarray:
    """Devices by number, in a shape whose axes are then exchanged."""
    shape = _numbers(source)
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose(_numbers(order) if order else None)


def _along(ids: np.ndarray, mesh: str, taken: str) -> np.ndarray:
    """Groups along axes of a mesh, of which one may be cut: ``'a':(pre)size``."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    parts = {name: [size] for name, size in sizes.items()}
    wanted = []
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", taken):
        wanted.append((name, bool(size)))
        if size:
            parts[name] = [int(before), int(size), sizes[name] // int(before) // int(size)]
    dimensions = [(name, place) for name, cut in parts.items() for place in range(len(cut))]
    shape = [parts[name][place] for name, place in dimensions]
    places = [dimensions.index((name, int(cut))) for name, cut in wanted]
    moved = np.moveaxis(ids.reshape(shape), places, range(-len(places), 0))
    return moved.reshape(-1, math.prod(shape[place] for place in places))
