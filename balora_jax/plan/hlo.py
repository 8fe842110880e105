"""Movements of a compiled program: collectives, how often, and memory traffic.

Everything is read from the text of the compiled module of one device. A loop's body counts as often
as the loop runs, one that may stop early as often as it may run at most.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from balora_jax.plan.hlo_groups import AxesOfGroups, Group
from balora_jax.plan.hlo_text import (
    Computation,
    Instruction,
    bytes_of,
    constant_of,
    parse_module,
    parts_of,
    tuple_index,
)

COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind over the same mesh axes.

    Attributes:
        kind: such as ``all-gather``.
        axes: of the mesh; empty where the groups are those of no set of axes.
        count: how many a step runs.
        bytes: sent by each device in a step, by a ring: of a result or operand of S bytes over n
            devices, ``S·(n-1)/n`` for all-gather (S whole), reduce-scatter and all-to-all, twice
            that for all-reduce, S for a permutation.
        between_hosts: those that each device sends to other hosts, or TPU slices, when its group
            first does what it can on its own.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: int
    between_hosts: int


def total(collectives: Sequence[Collective]) -> dict[str, int]:
    """What a device sends in all: ``bytes``, and of these ``between_hosts``."""
    return {
        "bytes": sum(one.bytes for one in collectives),
        "between_hosts": sum(one.between_hosts for one in collectives),
    }


class Module:
    """The text of a compiled module, parsed.

    Attributes:
        computations: by name.
        entry: name of the first one to run.
        unknown_loops: loops whose length only the data decide; they count once.
        chunks: how often a loop up to a number from the data runs; it counts once where None.
    """

    def __init__(self, text: str, chunks: int | None = None):
        self.chunks = chunks
        self.unknown_loops = 0
        self.computations, self.entry = parse_module(text)
        self.executed = list(self._executed(self.entry, 1))

    def _executed(self, name: str, times: int) -> Iterator[tuple[Computation, int]]:
        """Every computation that runs on its own, with how often; fusions are no such."""
        computation = self.computations[name]
        yield computation, times
        for one in computation.instructions.values():
            if one.opcode == "while":
                trips = self.trips(computation, one)
                self.unknown_loops += trips is None
                for body in one.called("body"):
                    yield from self._executed(body, times * (1 if trips is None else trips))
            elif one.opcode in ("call", "conditional", "async-start", "call-start"):
                attributes = ("to_apply", "calls", "called_computations", "branch_computations",
                              "true_computation", "false_computation")  # fmt: skip
                for branch in one.called(*attributes):
                    yield from self._executed(branch, times)

    def trips(self, computation: Computation, loop: Instruction) -> int | None:
        """How often a loop runs at most; None where only the data decide.

        CPU and GPU write the number down; for a TPU it is the constant that the counter, which
        begins at a constant and grows by one (two where unrolled), stays below. A counter that
        stays below a number from the data is the head's, over the chunks of rows that count.
        """
        if found := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.rest):
            return int(found[1])
        (condition,) = (self.computations[name] for name in loop.called("condition"))
        first = computation.instructions.get(loop.operands[0])

        def value(one: Instruction) -> int | None:
            passed = _passed(one, first, computation) if one.opcode == "get-tuple-element" else one
            return constant_of(passed)

        def bound(one: Instruction, seen: Mapping[str, Instruction]) -> int | None:
            operands = [seen[name] for name in one.operands]
            if one.opcode == "fusion":
                return bound(*self._inside(one, operands))
            if one.opcode == "and":
                found = [trips for part in operands if (trips := bound(part, seen)) is not None]
                return min(found, default=None)
            if one.opcode != "compare" or "direction=LT" not in one.rest:
                return None
            begin, end = map(value, operands)
            step = self._step(loop, operands[0])
            if begin is None or step is None:
                return None
            return self.chunks if end is None else max(-(-(end - begin) // step), 0)

        return bound(condition.instructions[condition.root], condition.instructions)

    def _inside(
        self, fusion: Instruction, operands: Sequence[Instruction]
    ) -> tuple[Instruction, dict[str, Instruction]]:
        """The result of a fusion, and what its names stand for: parameters for the operands."""
        inner = self.computations[fusion.called("calls")[0]]
        seen = dict(inner.instructions)
        for place, name in inner.parameters.items():
            seen[name] = operands[place]
        for name, one in inner.instructions.items():
            if one.opcode in ("copy", "bitcast", "convert"):
                seen[name] = seen[one.operands[0]]
        return inner.instructions[inner.root], seen

    def _result_of(self, fusion: Instruction) -> Instruction:
        inner = self.computations[fusion.called("calls")[0]]
        return inner.instructions[inner.root]

    def _step(self, loop: Instruction, counter: Instruction) -> int | None:
        """What a loop's body adds to a counter: 1, or 2 where the compiler unrolled it."""
        place = tuple_index(counter)
        (body,) = (self.computations[name] for name in loop.called("body"))
        root = body.instructions[body.root]
        if place is None or root.opcode != "tuple":
            return None
        one, step = body.instructions[root.operands[place]], 0
        while tuple_index(one) != place:
            terms = [body.instructions[name] for name in one.operands]
            if one.opcode == "fusion":
                inner = self.computations[one.called("calls")[0]].instructions.values()
                added = self._result_of(one).opcode == "add"
                constants = [constant_of(term) for term in (*inner, *terms)]
            else:
                added = one.opcode == "add"
                constants = [constant_of(term) for term in terms]
            grown = [number for number in constants if number is not None]
            others = [term for term in terms if constant_of(term) is None]
            if len(others) != 1 or (added and len(grown) != 1):
                return None
            if not added and one.opcode not in ("copy", "bitcast"):
                return None
            step += sum(grown)
            one = others[0]
        return step or None

    def collectives(self, mesh_shape: Mapping[str, int], hosts: int = 1) -> list[Collective]:
        """What a step exchanges, summed by kind and axes, most bytes first.

        Args:
            mesh_shape: size of each axis; devices are numbered in the mesh's own order.
            hosts: that the devices are spread over, one after another.
        """
        group_of = AxesOfGroups(mesh_shape, hosts)
        total: dict[tuple[str, tuple[str, ...]], list[int]] = {}
        for computation, times in self.executed:
            for where, one in self._collectives_in(computation):
                kind = one.opcode.removesuffix("-start")
                if kind == "all-reduce" and "all-reduce-scatter" in where.name:
                    kind = "reduce-scatter"  # a TPU writes it as a sum and a slice in one fusion
                size = sum(bytes_of(where.instructions[name].shape) for name in one.operands)
                group = group_of(one)
                counted = total.setdefault((kind, group.axes), [0, 0, 0])
                counted[0] += times
                counted[1] += times * ring_bytes(kind, size, group.size)
                counted[2] += times * network_bytes(kind, size, group)
        found = [Collective(*key, *values) for key, values in total.items()]
        return sorted(found, key=lambda one: -one.bytes)

    def between_slices(self, slices: int, axis: str) -> list[Collective]:
        """What a program of one TPU slice exchanges with the others, most bytes first.

        The compiler writes such a collective as sends and receives of the host, and names it.

        Args:
            slices: how many there are.
            axis: of the mesh, which goes over them.
        """
        total: dict[str, list[int]] = {}
        for computation, times in self.executed:
            for where, one in self._flat(computation):
                named = re.search(r'_xla_megascale_transfer_type="(\w+)"', one.rest)
                if one.opcode != "send" or named is None:
                    continue
                kind = named[1].lower().replace("_", "-")
                size = bytes_of(where.instructions[one.operands[0]].shape)
                counted = total.setdefault(kind, [0, 0])
                counted[0] += times
                counted[1] += times * ring_bytes(kind, size, slices)
        found = [Collective(kind, (axis,), n, sent, sent) for kind, (n, sent) in total.items()]
        return sorted(found, key=lambda one: -one.bytes)

    def _collectives_in(
        self, computation: Computation
    ) -> Iterator[tuple[Computation, Instruction]]:
        """Collectives and where they stand, those inside of fusions too.

        A TPU cuts an asynchronous one into a start, pieces beside other work and a done; all of
        them name the same chain, which counts once.
        """
        chains = set()
        for where, one in self._flat(computation):
            if one.opcode.removesuffix("-start") not in COLLECTIVES or _chain(one) in chains:
                continue
            chains |= {_chain(one)} - {None}
            yield where, one

    def _flat(self, computation: Computation) -> Iterator[tuple[Computation, Instruction]]:
        for one in computation.instructions.values():
            yield computation, one
            if one.opcode == "fusion":
                for name in one.called("calls"):
                    yield from self._flat(self.computations[name])

    def traffic(self) -> int:
        """Bytes between the device and its memory: what each instruction reads and writes.

        A fusion reads of an operand what it slices from it and writes of a buffer that it updates
        in place the updated part. Arrays that a TPU holds beside its units (``S(1)``) are no
        traffic. A loop's body counts as often as it runs.
        """
        total = 0
        for computation, times in self.executed:
            moved = sum(self._moved(one, computation) for one in computation.instructions.values())
            for where, one in self._collectives_in(computation):
                if _chain(one) is not None:
                    read = sum(bytes_of(where.instructions[n].shape) for n in one.operands)
                    moved += read + bytes_of(one.shape)
            total += moved * times
        return total

    def _moved(self, one: Instruction, computation: Computation) -> int:
        if one.opcode in _FREE or one.opcode.endswith("-done") or _is_buffer(one):
            return 0
        if one.opcode == "fusion":
            inner = self.computations[one.called("calls")[0]]
            reads = sum(
                self._read(inner, inner.parameters[i], computation.instructions[name])
                for i, name in enumerate(one.operands)
                if i in inner.parameters
            )
            return reads + self._written(inner, inner.instructions[inner.root], one.shape)
        parts = parts_of(one.shape)
        if one.opcode == "slice-start":
            return bytes_of(parts[1]) + bytes_of(parts[1], far=True)
        if one.opcode.endswith("-start"):
            return bytes_of(one.shape, far=True)
        if one.opcode in ("dynamic-slice", "gather", "slice"):
            return 2 * bytes_of(one.shape, far=True)
        sizes = [bytes_of(computation.instructions[n].shape, far=True) for n in one.operands]
        if one.opcode == "dynamic-update-slice":
            return 2 * sizes[1]
        return sum(sizes) + bytes_of(one.shape, far=True)

    def _read(self, inner: Computation, name: str, whole: Instruction) -> int:
        """Bytes that a fusion reads of one operand; what it hands on unread is none."""
        size = bytes_of(whole.shape, far=True)
        read = 0
        for user in inner.users.get(name, []) if size else []:
            if user.opcode in ("dynamic-slice", "gather", "slice") and user.operands[0] == name:
                read += bytes_of(user.shape)
            elif user.opcode == "tuple" or _is_piece(user) or _updates(user, name):
                continue
            elif user.opcode == "bitcast":
                read += self._read(inner, user.name, whole)
            elif user.opcode == "fusion":
                nested = self.computations[user.called("calls")[0]]
                places = [i for i, operand in enumerate(user.operands) if operand == name]
                read += sum(self._read(nested, nested.parameters[i], whole) for i in places)
            else:
                return size
        return min(read, size)

    def _written(self, inner: Computation, root: Instruction, shape: str) -> int:
        """Bytes that a fusion writes, the parts of a tuple one by one."""
        if root.opcode == "tuple":
            return sum(
                self._written(inner, inner.instructions[name], part)
                for name, part in zip(root.operands, parts_of(shape), strict=True)
            )
        size = bytes_of(shape, far=True)
        if root.opcode in ("parameter", "get-tuple-element") or _is_piece(root):
            return 0
        if root.opcode == "bitcast":
            return self._written(inner, inner.instructions[root.operands[0]], shape)
        if root.opcode == "dynamic-update-slice":
            return min(size, bytes_of(inner.instructions[root.operands[1]].shape))
        return size


_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "after-all", "partition-id", "replica-id", "iota", "async-start", "call-start"),
    *("opt-barrier", "async-update"),
}


def _chain(one: Instruction) -> str | None:
    """Number that the pieces of an asynchronous collective on a TPU share."""
    found = re.search(r'chain_id="(\d+)"', one.rest)
    return None if found is None else found[1]


def _is_piece(one: Instruction) -> bool:
    """A piece of an asynchronous collective: its bytes are counted once, with the collective."""
    return _chain(one) is not None or "AsyncCollective" in one.rest


def _updates(one: Instruction, name: str) -> bool:
    """Whether a value is written into in place."""
    return one.opcode == "dynamic-update-slice" and one.operands[0] == name


def _is_buffer(one: Instruction) -> bool:
    """Memory that is only named, not touched."""
    return 'custom_call_target="AllocateBuffer"' in one.rest or "ConcatBitcast" in one.rest


def _passed(one: Instruction, first: Instruction | None, outer: Computation) -> Instruction | None:
    """What a loop's first state holds where its condition reads it."""
    index = tuple_index(one)
    if index is None or first is None or first.opcode != "tuple":
        return None
    value = outer.instructions.get(first.operands[index])
    while value is not None and value.opcode in ("copy", "bitcast", "convert"):
        value = outer.instructions.get(value.operands[0])
    return value


def ring_bytes(kind: str, size: int, group: int) -> int:
    """Bytes that one device sends, of operands of ``size`` bytes on it."""
    if kind == "all-gather":
        return size * (group - 1)
    if kind == "all-reduce":
        return 2 * size * (group - 1) // group
    if kind in ("collective-permute", "collective-broadcast"):
        return size
    return size * (group - 1) // group


def network_bytes(kind: str, size: int, group: Group) -> int:
    """Bytes of those that one device sends to other hosts.

    Sums are first formed, and what is gathered is last handed on, among the devices of a host.
    """
    if group.hosts == 1:
        return 0
    local = group.size // group.hosts if kind in ("all-reduce", "reduce-scatter") else 1
    return ring_bytes(kind, size // max(local, 1), group.hosts)
